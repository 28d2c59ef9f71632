"""Masks that meet a parameter budget: one threshold over all axes, then the best units that still fit."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tvaprune.architecture.parameter_counts import (
    decoder_parameters,
    dense_decoder_parameters,
    kept_decoder_parameters,
    parameter_budget,
    unit_costs,
)
from tvaprune.architecture.topology import Topology
from tvaprune.masks.masks import Masks
from tvaprune.options.axes import AXES, Axis

# Smallest distance from the threshold: far below any difference between two float32 scores around 1.
_NEXT_TO_THRESHOLD = 1e-30


class UnreachableSparsityError(ValueError):
    """No mask on the pruned axes has so few parameters."""


def keep_above(scores: dict[Axis, Float[Tensor, "..."]], threshold: float) -> dict[Axis, Bool[Tensor, "..."]]:
    """Keep units strictly above the threshold, and the best residual dimension."""
    keep = {axis: score > threshold for axis, score in scores.items()}
    if not keep["hidden"].any():
        keep["hidden"] = keep_best(scores["hidden"], 1)
    return keep


def ranks(scores: Float[Tensor, "*vectors units"]) -> Int[Tensor, "*vectors units"]:
    """Each unit's place among those of its vector, the last dimension: 0 is the best, ties to the lower index."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices.argsort(-1)


def keep_best(scores: Float[Tensor, " units"], count: int) -> Bool[Tensor, " units"]:
    """The `count` best units of one vector, ties to the lower index."""
    return ranks(scores) < count


def level_layers(scores: Float[Tensor, "layers units"]) -> Float[Tensor, "layers units"]:
    """Scores with which every threshold keeps as many units in each layer, and in each its best.

    A layer's unit of rank r gets the mean, over the layers, of the scores of rank r.
    """
    ranked, order = torch.sort(scores, dim=-1, descending=True, stable=True)
    return torch.empty_like(scores).scatter_(-1, order, ranked.mean(0).expand_as(scores))


def keep_widths(masks: Masks, hidden: int, intermediate: Sequence[int], kv_heads: Sequence[int]) -> Masks:
    """Masks of these widths, the latter two by layer: every vector's best units."""

    def by_layer(axis: Axis, counts: Sequence[int]) -> Tensor:
        return torch.stack([keep_best(score, n) for score, n in zip(masks.score[axis], counts, strict=True)])

    keep: dict[Axis, Tensor] = {
        "hidden": keep_best(masks.score["hidden"], hidden),
        "intermediate": by_layer("intermediate", intermediate),
        "kv_heads": by_layer("kv_heads", kv_heads),
    }
    return replace(masks, keep=keep)


def solve_threshold(
    topology: Topology,
    scores: dict[Axis, Float[Tensor, "..."]],
    target_sparsity: float,
) -> float:
    """The lowest threshold whose kept parameters are within the budget, by bisection.

    Higher scores = keep; a unit at +inf is never dropped. Sparsity is a share of the decoder layers' parameters.

    Raises:
        UnreachableSparsityError: dropping every unit that may be dropped is not enough.
    """
    budget = parameter_budget(topology, target_sparsity)
    ascending = {axis: score.detach().cpu().sort(-1).values for axis, score in scores.items()}
    finite = torch.cat([score[score.isfinite()].flatten() for score in ascending.values()])

    def parameters(threshold: float) -> float:
        """Kept when every unit strictly above the threshold is: counts by binary search, as this runs every step."""
        at = torch.tensor([threshold], dtype=finite.dtype)
        counts = {}
        for axis, values in ascending.items():
            per_vector = at.expand(*values.shape[:-1], 1).contiguous()
            counts[axis] = values.shape[-1] - torch.searchsorted(values, per_vector, right=True).squeeze(-1)
        counts["hidden"] = counts["hidden"].clamp_min(1)
        return float(decoder_parameters(topology, counts["hidden"], counts["intermediate"], counts["kv_heads"]))

    def fits(threshold: float) -> bool:
        return parameters(threshold) <= budget

    # Nothing may be dropped where every unit is at +inf.
    low, high = (float(finite.min() - 1), float(finite.max())) if len(finite) else (0.0, 0.0)
    if not fits(high):
        reachable = 1 - parameters(high) / dense_decoder_parameters(topology)
        raise UnreachableSparsityError(
            f"sparsity = {target_sparsity}: the pruned axes reach {reachable:.3f} at most; "
            "lower sparsity or add axes to learn_masks.axes"
        )
    if fits(low):
        return low
    # Scores are float32, so a threshold is told apart from another only as one: stop where none lies between.
    while True:
        middle = float(torch.tensor((low + high) / 2, dtype=finite.dtype))
        if not low < middle < high:
            return high
        if fits(middle):
            high = middle
        else:
            low = middle


def project(
    topology: Topology,
    scores: dict[Axis, Float[Tensor, "..."]],
    target_sparsity: float,
    axes: tuple[Axis, ...] = AXES,
) -> Masks:
    """Masks that meet the budget exactly, as near as one cheapest unit allows.

    A single threshold on the scores over all axes, then the best of the units just below it that still fit: a residual
    dimension or a head can be worth many intermediate units, so the threshold alone may overshoot. The scores are
    shifted so that the threshold is 0. Axes outside of `axes` are kept whole.

    Raises:
        UnreachableSparsityError: the pruned axes cannot remove so much.
    """
    pruned = {axis: scores[axis] if axis in axes else torch.full_like(scores[axis], torch.inf) for axis in AXES}
    threshold = solve_threshold(topology, pruned, target_sparsity)
    keep = _fill(topology, pruned, keep_above(pruned, threshold), parameter_budget(topology, target_sparsity))
    return Masks(keep, {axis: scores[axis] - threshold for axis in AXES})


def make_scores_match_mask(keep: dict[Axis, Bool[Tensor, "..."]], scores: dict[Axis, Float[Tensor, "..."]]) -> Masks:
    """Make the score > 0 exactly where a unit is kept, without a change to the ranking within a vector.

    Kept units with a score of at most 0 get scores just above 0, in their order, and dropped units with a score above
    0 get scores just below. On axes without scores the score is 1; `keep` has every axis.
    """
    matched = {axis: torch.ones_like(mask, dtype=torch.float32) for axis, mask in keep.items()}
    for axis, score in scores.items():
        values = score.float()
        rank = torch.argsort(torch.argsort(values, dim=-1, stable=True), dim=-1).float()
        values = torch.where(keep[axis] & (values <= 0), _NEXT_TO_THRESHOLD * (rank + 1), values)
        below = -_NEXT_TO_THRESHOLD * (values.shape[-1] - rank)
        matched[axis] = torch.where(~keep[axis] & (values > 0), below, values)
    return Masks(keep, matched)


def _fill(
    topology: Topology, scores: dict[Axis, Float[Tensor, "..."]], keep: dict[Axis, Bool[Tensor, "..."]], budget: float
) -> dict[Axis, Tensor]:
    """Bring back dropped units, best first, until the budget has no room for the cheapest of them."""
    keep = {axis: mask.clone() for axis, mask in keep.items()}
    dropped = [
        (-float(scores[axis].flatten()[index]), AXES.index(axis), int(index))
        for axis in AXES
        for index in (~keep[axis]).flatten().nonzero().flatten().tolist()
    ]
    counts = (keep["hidden"].sum(), keep["intermediate"].sum(-1), keep["kv_heads"].sum(-1))
    cheapest = min(float(cost.min()) for cost in unit_costs(topology, *counts).values())
    room = budget - kept_decoder_parameters(topology, keep)
    for _, axis_index, index in sorted(dropped):
        if room < cheapest:
            break
        mask = keep[AXES[axis_index]].view(-1)
        mask[index] = True
        room_after = budget - kept_decoder_parameters(topology, keep)
        if room_after < 0:
            mask[index] = False
        else:
            room = room_after
    return keep
