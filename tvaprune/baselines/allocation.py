"""From a method's scores to masks that meet the parameter budget, by the allocation that the method has.

    uniform    the same share of units stays in every layer and on every axis
    balanced   one ranking per axis over all layers; the same share is dropped on every axis
    global     one threshold on the scores as they are, over all layers and axes (`tvaprune.masks.masks.project`)

Each ends with scores such that a unit is kept iff its score > 0, ranked within a layer as the method
ranks it.
"""

import torch
from torch import Tensor

from tvaprune.architecture.parameter_counts import (
    decoder_parameters,
    dense_decoder_parameters,
    dense_unit_costs,
    kept_decoder_parameters,
    unit_costs,
)
from tvaprune.architecture.topology import AXES, Axis, Topology
from tvaprune.masks.masks import Masks
from tvaprune.masks.projection import keep_best, project

Scores = dict[Axis, Tensor]

# Smallest distance from the threshold: far below any difference between two float32 scores around 1.
_NEXT_TO_THRESHOLD = 1e-30


def percentiles(scores: Tensor) -> Tensor:
    """Rank within the last dimension, from the bottom, as (rank + ½) / units: float [..., units] to float32, in (0, 1).

    Of equal scores the lower index ranks higher, as in `keep_best`.
    """
    units = scores.shape[-1]
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    from_top = torch.empty_like(order)
    from_top.scatter_(-1, order, torch.arange(units, device=scores.device).expand_as(order).contiguous())
    return (units - from_top.float() - 0.5) / units


def allocate_global(topology: Topology, scores: Scores, target_sparsity: float, axes: tuple[Axis, ...]) -> Masks:
    """Keep what is above one threshold on the scores as they are.

    Args:
        scores: float32 for the axes in play, shapes of `Topology.gate_shape`; higher = keep.
    """
    masks = _on_budget(topology, scores, target_sparsity, axes)
    return make_scores_match_mask(masks, axes)


def allocate_balanced(
    topology: Topology,
    scores: Scores,
    target_sparsity: float,
    axes: tuple[Axis, ...],
    mlp_to_attention: float = 1.0,
    keep_one: bool = False,
) -> Masks:
    """Rank each axis's units over all layers, and drop the same share of every axis.

    Args:
        mlp_to_attention: share of intermediate units dropped over the share of kv heads dropped.
        keep_one: the best unit of every layer stays, on every axis.
    """
    ranked: Scores = {}
    for axis in axes:
        ranked[axis] = percentiles(scores[axis].flatten()).view_as(scores[axis]).cpu()
        if axis == "kv_heads":
            ranked[axis] = ranked[axis] * mlp_to_attention
    protected = dict(ranked)
    for axis in axes:
        if keep_one and axis != "hidden":
            protected[axis] = ranked[axis].scatter(-1, ranked[axis].argmax(-1, keepdim=True), torch.inf)
    masks = _on_budget(topology, protected, target_sparsity, axes)
    threshold = _threshold(protected, masks, axes)
    score = {axis: ranked[axis] - threshold if axis in axes else masks.score[axis] for axis in AXES}
    return make_scores_match_mask(Masks(masks.keep, score), axes)


def allocate_uniform(
    topology: Topology,
    scores: Scores,
    target_sparsity: float,
    axes: tuple[Axis, ...],
    protect_first: int = 0,
    protect_last: int = 0,
) -> Masks:
    """Keep the same share of units in every layer and on every axis in play.

    The share is solved for; the coarser axes keep that share rounded to whole units (at least one), and the axis
    whose units are the cheapest takes up the rounding. What one unit a layer is too coarse for goes to the first
    layers.

    Args:
        protect_first, protect_last: layers at either end that stay whole; the others make up for them.

    Raises:
        ValueError: every layer is protected.
        UnreachableSparsityError: the rest cannot remove so much.
    """
    whole = _protected(topology, protect_first, protect_last)
    counts = _rounded_counts(topology, target_sparsity, axes, whole)
    finest = _finest(topology, axes)
    fixed: Scores = {}
    shifted: Scores = {}
    for axis in axes:
        rank = percentiles(scores[axis]).cpu()
        count = counts[axis]
        keep = keep_best(rank, count) if axis == "hidden" else torch.stack([keep_best(row, count) for row in rank])
        fixed[axis] = torch.where(keep, torch.inf, -torch.inf)
        if axis == finest:
            fixed[axis] = rank.clone()
        if axis != "hidden":
            fixed[axis][whole] = torch.inf
        shifted[axis] = rank - (1 - count / topology.width(axis))
    masks = _on_budget(topology, fixed, target_sparsity, axes)
    shifted[finest] = percentiles(scores[finest]).cpu() - _threshold(fixed, masks, axes)
    for axis in axes:
        if axis != "hidden":
            shifted[axis][whole] += 1
    return make_scores_match_mask(Masks(masks.keep, shifted), axes)


class Stages:
    """Pruning in stages: what a stage dropped stays dropped, and ranks below what a later stage dropped.

    Attributes:
        keep: bool per axis; what is left.
    """

    def __init__(
        self, topology: Topology, axes: tuple[Axis, ...], protect_first: int = 0, protect_last: int = 0
    ) -> None:
        self.topology, self.axes = topology, axes
        self._whole = _protected(topology, protect_first, protect_last)
        self.keep = {axis: torch.ones(topology.gate_shape(axis), dtype=torch.bool) for axis in AXES}
        self._score = {axis: torch.ones(topology.gate_shape(axis)) for axis in AXES}

    def prune(self, scores: Scores, target_sparsity: float) -> None:
        """Drop the units with the lowest scores until the sparsity is met.

        Args:
            scores: float32 for the axes in play, in [0, 2]; those of dropped units are not read.
        """
        left = {axis: scores[axis].cpu().where(self.keep[axis], -torch.inf) for axis in self.axes}
        for axis in self.axes:
            if axis != "hidden":
                left[axis][self._whole] = torch.inf
        masks = _on_budget(self.topology, left, target_sparsity, self.axes)
        for axis in self.axes:
            # A stage's scores span less than 3, so that stages cannot overlap.
            sunk = self._score[axis] - 3
            self._score[axis] = torch.where(self.keep[axis], masks.score[axis].clamp_max(2), sunk)
        self.keep = masks.keep

    def masks(self) -> Masks:
        return make_scores_match_mask(Masks(self.keep, self._score), self.axes)


def make_scores_match_mask(masks: Masks, axes: tuple[Axis, ...]) -> Masks:
    """Make the score > 0 exactly where a unit is kept, without a change to the ranking within a vector.

    Units that filled the last of the budget, or stay for another reason than their score, end up just above 0 in
    their order. Axes that are not in play are 1.
    """
    score = dict(masks.score)
    for axis in AXES:
        keep = masks.keep[axis]
        if axis not in axes:
            score[axis] = torch.ones_like(keep, dtype=torch.float32)
            continue
        values = score[axis].float()
        rank = torch.argsort(torch.argsort(values, dim=-1, stable=True), dim=-1).float()
        values = torch.where(keep & (values <= 0), _NEXT_TO_THRESHOLD * (rank + 1), values)
        below = -_NEXT_TO_THRESHOLD * (values.shape[-1] - rank)
        score[axis] = torch.where(~keep & (values > 0), below, values)
    return Masks(masks.keep, score)


def _protected(topology: Topology, first: int, last: int) -> Tensor:
    """Layers that stay whole: bool [layers].

    Raises:
        ValueError: they are all the layers.
    """
    if first + last >= topology.layers:
        raise ValueError(
            f"learn_masks protects the first {first} and the last {last} layers, and the model has {topology.layers}"
        )
    whole = torch.zeros(topology.layers, dtype=torch.bool)
    whole[:first] = True
    whole[topology.layers - last :] = True
    return whole


def _on_budget(topology: Topology, scores: Scores, target_sparsity: float, axes: tuple[Axis, ...]) -> Masks:
    """`project`, and then the best dropped units of the cheapest axis, as many as the budget still has room for.

    Where the threshold stops at a residual dimension or a head, the room that it leaves is worth hundreds of
    intermediate units, more than `project` tries.
    """
    masks = project(topology, _masks(topology, scores), target_sparsity, axes)
    finest = _finest(topology, axes)
    keep = masks.keep[finest]
    room = (1 - target_sparsity) * dense_decoder_parameters(topology) - kept_decoder_parameters(topology, masks.keep)
    widths = masks.widths()
    costs = dict(
        zip(AXES, unit_costs(topology, widths["hidden"], widths["intermediate"], widths["kv_heads"]), strict=True)
    )
    count = int(room / float(costs[finest].max()))
    # A layer that lost all its units would bring back a norm too.
    open_to_more = ~keep & scores[finest].cpu().isfinite() & keep.any(-1, keepdim=True)
    count = min(count, int(open_to_more.sum()))
    candidates = masks.score[finest].masked_fill(~open_to_more, -torch.inf)
    added = keep_best(candidates.flatten(), count).view_as(keep)
    return masks.with_keep({**masks.keep, finest: keep | added})


def _masks(topology: Topology, scores: Scores) -> Masks:
    """Scores as masks to project, on the CPU; ones on the axes without scores."""
    dense = Masks.dense(topology)
    score = {axis: scores[axis].float().cpu() if axis in scores else dense.score[axis] for axis in AXES}
    return Masks(dense.keep, score)


def _threshold(scores: Scores, masks: Masks, axes: tuple[Axis, ...]) -> float:
    """The threshold by which `project` shifted the scores."""
    shift = torch.cat([(scores[axis] - masks.score[axis])[scores[axis].isfinite()] for axis in axes])
    return float(shift[0])


def _finest(topology: Topology, axes: tuple[Axis, ...]) -> Axis:
    """The axis in play whose units own the fewest parameters."""
    return min(axes, key=lambda axis: float(getattr(dense_unit_costs(topology), axis).min()))


def _rounded_counts(
    topology: Topology, target_sparsity: float, axes: tuple[Axis, ...], whole: Tensor
) -> dict[Axis, int]:
    """The share of units that meets the budget, by bisection, in whole units per axis in play."""
    budget = (1 - target_sparsity) * dense_decoder_parameters(topology)

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
