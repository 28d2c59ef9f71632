"""The same widths for every layer, so that the base family's own config describes the pruned model."""

from bisect import bisect_right
from functools import partial
from typing import NamedTuple

import torch

from tvaprune.architecture.parameter_counts import decoder_parameters, parameter_budget
from tvaprune.architecture.topology import Topology
from tvaprune.masks.importance import lost_by_width
from tvaprune.masks.masks import Masks
from tvaprune.options.axes import AXES, Axis


class UniformWidths(NamedTuple):
    """Kept units, the same in every layer."""

    hidden: int
    intermediate: int
    kv_heads: int


def uniform_widths(
    topology: Topology, masks: Masks, target_sparsity: float, hidden_multiple: int, intermediate_multiple: int
) -> UniformWidths:
    """The widths within the budget whose dropped units matter least, of those that the family's config takes.

    For every number of heads and every hidden width, the intermediate width is the largest that the budget leaves;
    the best of these triples wins. An axis that the masks left whole stays whole, unless nothing fits then (a single
    head that one layer dropped, say). Raises ValueError if no triple of multiples fits the budget and the config.
    """
    lost = {axis: lost_by_width(topology, masks, axis).sum(0) for axis in AXES}
    budget = parameter_budget(topology, target_sparsity)
    multiples: dict[Axis, int] = {"hidden": hidden_multiple, "intermediate": intermediate_multiple, "kv_heads": 1}
    every = {axis: range(m, topology.width(axis) + 1, m) for axis, m in multiples.items()}
    prunable = {axis: every[axis][-1:] if masks.keep[axis].all() else every[axis] for axis in AXES}
    for candidates in (prunable, every):
        fitting = _fitting(topology, budget, candidates)
        if fitting:
            return min(fitting, key=lambda widths: sum(float(lost[axis][getattr(widths, axis)]) for axis in AXES))
    raise ValueError(
        f"sparsity = {target_sparsity}: no uniform widths in multiples of {hidden_multiple} (hidden) and "
        f"{intermediate_multiple} (intermediate) meet it; use a smaller adapt_dimensions.multiple or more axes"
    )


def _fitting(topology: Topology, budget: float, candidates: dict[Axis, range]) -> list[UniformWidths]:
    """For every hidden width and number of heads that the config takes, the widest MLP within the budget."""
    found = []
    for kv_heads in candidates["kv_heads"]:
        for hidden in candidates["hidden"]:
            if hidden % topology.hidden_divisor(kv_heads):
                continue
            parameters = partial(_parameters, topology, hidden, kv_heads)
            fitting = bisect_right(candidates["intermediate"], budget, key=parameters)
            if fitting:
                found.append(UniformWidths(hidden, candidates["intermediate"][fitting - 1], kv_heads))
    return found


def _parameters(topology: Topology, hidden: int, kv_heads: int, intermediate: int) -> float:
    full = torch.ones(topology.layers, dtype=torch.float64)
    return float(decoder_parameters(topology, torch.tensor(hidden), full * intermediate, full * kv_heads))
