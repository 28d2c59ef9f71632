"""From a method's scores to masks that meet the parameter budget, by the allocation that the method has.

    uniform    the same share of units stays in every layer and on every axis
    balanced   one ranking per axis over all layers; the same share is dropped on every axis
    global     one threshold on the scores as they are, over all layers and axes (`tvaprune.masks.projection.project`)

Scores are given for the pruned axes; the other axes stay whole. The masks' scores keep the method's ranking within
a layer, and are above 0 exactly where a unit is kept.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tvaprune.architecture.parameter_counts import (
    decoder_parameters,
    dense_unit_costs,
    parameter_budget,
)
from tvaprune.architecture.topology import Topology
from tvaprune.masks.masks import Masks
from tvaprune.masks.projection import make_scores_match_mask, project, ranks
from tvaprune.options.axes import AXES, Axis

Keep = dict[Axis, Bool[Tensor, "..."]]  # True = keep
# float32 for the pruned axes, shapes of `Topology.gate_shape`; higher = keep.
Scores = dict[Axis, Float[Tensor, "..."]]


def percentiles(scores: Float[Tensor, "*vectors units"]) -> Float[Tensor, "*vectors units"]:
    """Rank within the last dimension, from the bottom, as (rank + ½) / units: float32 in (0, 1).

    Of equal scores the lower index ranks higher, as in `keep_best`.
    """
    units = scores.shape[-1]
    return (units - ranks(scores).float() - 0.5) / units


def percentiles_over_layers(scores: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`percentiles` among all units of an axis."""
    return percentiles(scores.flatten()).view_as(scores)


def allocate_global(topology: Topology, scores: Scores, target_sparsity: float) -> Masks:
    """Keep what is above one threshold on the scores as they are."""
    return make_scores_match_mask(*_on_budget(topology, scores, target_sparsity))


def allocate_balanced(
    topology: Topology, scores: Scores, target_sparsity: float, mlp_to_attention: float = 1.0
) -> Masks:
    """Rank each axis's units over all layers, and drop the same share of every axis; each layer keeps its best unit.

    `mlp_to_attention` is the share of intermediate units dropped over the share of kv heads dropped.
    """
    ranked = {axis: percentiles_over_layers(score).cpu() for axis, score in scores.items()}
    if "kv_heads" in ranked:
        ranked["kv_heads"] = ranked["kv_heads"] * mlp_to_attention
    protected = dict(ranked)
    for axis, rank in ranked.items():
        if axis != "hidden":
            protected[axis] = rank.scatter(-1, rank.argmax(-1, keepdim=True), torch.inf)
    keep, shifted = _on_budget(topology, protected, target_sparsity)
    threshold = _threshold(protected, shifted)
    return make_scores_match_mask(keep, {axis: rank - threshold for axis, rank in ranked.items()})


def allocate_uniform(
    topology: Topology, scores: Scores, target_sparsity: float, protect_first: int = 0, protect_last: int = 0
) -> Masks:
    """Keep the same share of units in every layer and on every pruned axis.

    The share is solved for. Every axis keeps that share rounded to whole units (at least one); then the axis whose
    units are the cheapest makes up for the rounding. Units that do not divide evenly go to the first layers. Protected
    layers stay whole; the others make up for them.

    Raises:
        ValueError: every layer is protected.
        UnreachableSparsityError: the rest cannot remove so much.
    """
    whole = protected_layers(topology, protect_first, protect_last)
    counts = _rounded_counts(topology, target_sparsity, tuple(scores), whole)
    finest = _finest(topology, scores)
    ranked = {axis: percentiles(score).cpu() for axis, score in scores.items()}
    shifted = {axis: rank - (1 - counts[axis] / topology.width(axis)) for axis, rank in ranked.items()}
    fixed = {axis: torch.where(values > 0, torch.inf, -torch.inf) for axis, values in shifted.items()}
    fixed[finest] = ranked[finest].clone()
    per_layer = [axis for axis in scores if axis != "hidden"]
    for axis in per_layer:
        fixed[axis][whole] = torch.inf
    keep, found = _on_budget(topology, fixed, target_sparsity)
    shifted[finest] = ranked[finest] - _threshold(fixed, found)
    for axis in per_layer:
        shifted[axis][whole] += 1
    return make_scores_match_mask(keep, shifted)


def widths_of_uniform_share(
    topology: Topology, axes: tuple[Axis, ...], target_sparsity: float, protect_first: int = 0, protect_last: int = 0
) -> dict[Axis, Int[Tensor, "..."]]:
    """The widths that `allocate_uniform` leaves on the axes, as in `Masks.widths`. They do not depend on the scores."""
    any_order = {axis: torch.arange(float(topology.width(axis))).expand(topology.gate_shape(axis)) for axis in axes}
    widths = allocate_uniform(topology, any_order, target_sparsity, protect_first, protect_last).widths()
    return {axis: widths[axis] for axis in axes}


class StagedPruning:
    """Pruning in stages: dropped units rank below those that a later stage drops.

    They stay dropped, unless a later stage's budget has room for more than is left: where its threshold stops at a
    residual dimension or a head, which are worth many units. Then the best of them come back.
    """

    def __init__(
        self, topology: Topology, axes: tuple[Axis, ...], protect_first: int = 0, protect_last: int = 0
    ) -> None:
        self.topology = topology
        self.keep: Keep = Masks.dense(topology).keep  # the units left
        self._whole = protected_layers(topology, protect_first, protect_last)
        self._score: Scores = {axis: torch.ones(topology.gate_shape(axis)) for axis in axes}

    def prune(self, scores: Scores, target_sparsity: float) -> None:
        """Drop the units with the lowest scores until the sparsity is met.

        Scores are in [0, 2]; those of dropped units are not read.
        """
        # Dropped units have scores of at most 0, in the order in which they were dropped.
        ranked = {axis: scores[axis].cpu().where(self.keep[axis], old - 1) for axis, old in self._score.items()}
        for axis in ranked:
            if axis != "hidden":
                ranked[axis][self._whole] = torch.inf
        self.keep, shifted = _on_budget(self.topology, ranked, target_sparsity)
        self._score = {axis: score.clamp_max(2) for axis, score in shifted.items()}

    def prune_alike(self, scores: Scores, widths: dict[Axis, Int[Tensor, " layers"]], share: float) -> None:
        """Drop, in every layer, a share of what separates it from its last width, by the lowest scores.

        The number dropped is rounded down. The last stage's share is 1.

        Args:
            scores: those of dropped units are not read.
            widths: units to be left after the last stage, by pruned axis.
        """
        for axis, score in self._score.items():
            width = self.topology.width(axis)
            left = self.keep[axis]
            rank = percentiles(scores[axis].cpu().where(left, -torch.inf))
            dropped = (share * (width - widths[axis].cpu()) + 1e-9).int()[:, None]
            shifted = rank - dropped / width
            self._score[axis] = torch.where(left, shifted, score - 3)
            self.keep[axis] = left & (shifted > 0)

    def masks(self) -> Masks:
        return make_scores_match_mask(self.keep, self._score)


def protected_layers(topology: Topology, first: int, last: int) -> Bool[Tensor, " layers"]:
    """Layers that stay whole; a ValueError if all do."""
    if first + last >= topology.layers:
        raise ValueError(
            f"learn_masks protects the first {first} and the last {last} layers, and the model has {topology.layers}; "
            "lower the method's protect_first or protect_last"
        )
    whole = torch.zeros(topology.layers, dtype=torch.bool)
    whole[:first] = True
    whole[topology.layers - last :] = True
    return whole


def _on_budget(topology: Topology, scores: Scores, target_sparsity: float) -> tuple[Keep, Scores]:
    """What to keep on every axis, and the scores shifted so that the threshold is 0; on the CPU."""
    given = {axis: score.float().cpu() for axis, score in scores.items()}
    masks = project(topology, Masks.dense(topology).score | given, target_sparsity, tuple(given))
    return masks.keep, {axis: masks.score[axis] for axis in given}


def _threshold(scores: Scores, shifted: Scores) -> float:
    """The threshold that `project` subtracted from the scores."""
    return float(torch.cat([(scores[axis] - shifted[axis])[scores[axis].isfinite()] for axis in scores])[0])


def _finest(topology: Topology, scores: Scores) -> Axis:
    """The pruned axis whose units own the fewest parameters."""
    return min(scores, key=lambda axis: float(dense_unit_costs(topology)[axis].min()))


def _rounded_counts(
    topology: Topology, target_sparsity: float, axes: tuple[Axis, ...], whole: Bool[Tensor, " layers"]
) -> dict[Axis, int]:
    """The share of units that meets the budget, by bisection, in whole units per pruned axis."""
    budget = parameter_budget(topology, target_sparsity)

    def parameters(share: float) -> float:
        soft = {}
        for axis in AXES:
            width = torch.full(topology.gate_shape(axis)[:-1], float(topology.width(axis)))
            kept = width * share if axis in axes else width
            soft[axis] = kept if axis == "hidden" else kept.where(~whole, width)
        return float(decoder_parameters(topology, soft["hidden"], soft["intermediate"], soft["kv_heads"]))

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if parameters(middle) <= budget else (low, middle)
    return {axis: max(1, int(low * topology.width(axis) + 0.5)) for axis in axes}
