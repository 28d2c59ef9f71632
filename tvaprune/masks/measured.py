"""Widths from a measured table: the fastest that keep nearly the most importance within the parameters.

Each layer takes one of the timed widths for each block, which is a multiple-choice knapsack of some thousand choices.
All layers share the hidden width, so one knapsack is solved for each of its values.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from tvaprune.architecture.parameter_counts import decoder_parameters, parameter_budget
from tvaprune.architecture.topology import Topology
from tvaprune.masks.importance import STEEP, lost_by_width
from tvaprune.masks.knapsack import Knapsack, Limits
from tvaprune.masks.latency_table import LatencyTable
from tvaprune.masks.masks import Masks
from tvaprune.options.axes import Axis
from tvaprune.options.choices import Latency, Layout

# Faster widths keep at least this share of the parameters, so that the result is comparable with other roundings.
SAME_PARAMETERS = 0.995
# Relative gaps of the solver: importance is learned and latency is measured to fewer digits.
_GAP = {"lost": 1e-4, "latency_ms": 1e-3}
_ROUNDING = 1e-9  # of sums, relative


class Chosen(NamedTuple):
    """Widths of a model, one a layer except for hidden, and their costs."""

    hidden: int
    intermediate: list[int]
    kv_heads: list[int]
    lost: float  # importance of the dropped units
    parameters: float  # of the decoder layers
    latency_ms: float  # predicted


def widths_within_parameters(
    topology: Topology,
    masks: Masks,
    table: LatencyTable,
    of: Latency,
    layout: Layout,
    target_sparsity: float,
    slack: float,
) -> Chosen:
    """The fastest widths among those that lose little more importance than necessary for the budget.

    The first step finds the least loss within the parameters. The second step finds the lowest predicted latency among
    widths that lose at most (1 + slack) times as much, with the same heads and at least SAME_PARAMETERS of the
    parameters. Every rounding of the masks to the table's widths is a candidate if it meets the budget and keeps the
    axes and blocks that the masks keep whole.

    The heads stay because they are slow and have little importance next to MLP units: the second step would drop heads
    first, which costs perplexity (docs/lab-log.md). A padded model computes its widest layer in every layer, so it
    takes the first step only. Raises ValueError if no widths of the table meet the budget.
    """
    budget = parameter_budget(topology, target_sparsity)
    for programs in _programs(topology, masks, table, of, layout):
        least = [(program, program.least("lost", {"parameters": (0, budget)})) for program in programs]
        found = [(program, chosen) for program, chosen in least if chosen and _fits(topology, chosen, layout)]
        if not found:
            continue
        best = min((chosen for _, chosen in found), key=lambda chosen: chosen.lost)
        if layout == "padded":
            return best
        limit = (1 + slack) * (1 + _ROUNDING) * best.lost
        limits = {"lost": (0.0, limit), "parameters": (SAME_PARAMETERS * best.parameters, budget)}
        near = [program.with_heads(best.kv_heads) for program, chosen in found if chosen.lost <= limit]
        fast = [program.least("latency_ms", limits) for program in near]
        return min([best, *(chosen for chosen in fast if chosen)], key=lambda chosen: chosen.latency_ms)
    raise ValueError(
        f"sparsity = {target_sparsity}: no widths that profile_hardware timed meet it; "
        "lower profile_hardware.intermediate_step or profile_hardware.narrowest_hidden"
    )


def _fits(topology: Topology, chosen: Chosen, layout: Layout) -> bool:
    """Whether a config for all layers takes the hidden width with the most heads of any layer, padded or not."""
    heads = max(1, *chosen.kv_heads)
    if layout == "padded":
        heads = topology.stock_heads(chosen.hidden, heads)
    return layout == "uneven" or chosen.hidden % topology.hidden_divisor(heads) == 0


class _Program(NamedTuple):
    """The choices at one hidden width: first the groups of the attention blocks, then those of the MLPs."""

    hidden: int
    layers: int  # how many each group stands for; they take the same width
    choices: Knapsack  # labelled by width; the costs are lost, parameters and latency_ms

    def is_attention(self) -> np.ndarray:
        """bool [choices]."""
        return self.choices.group < self.choices.groups // 2

    def only(self, allowed: np.ndarray) -> "_Program":
        return self._replace(choices=self.choices.only(allowed))

    def with_heads(self, counts: list[int]) -> "_Program":
        """With these numbers of heads by layer; all choices of the MLPs stay."""
        heads = np.tile(np.array(counts)[:: self.layers], 2)[self.choices.group]
        return self.only(~self.is_attention() | (self.choices.label == heads))

    def least(self, objective: str, limits: Limits) -> Chosen | None:
        """The widths of the lowest sum of one cost within limits on others."""
        solution = self.choices.least(objective, limits, _GAP[objective])
        if solution is None:
            return None
        kv_heads, intermediate = np.repeat(solution.labels, self.layers).reshape(2, -1).tolist()
        return Chosen(self.hidden, intermediate, kv_heads, **solution.sums)


def _programs(
    topology: Topology, masks: Masks, table: LatencyTable, of: Latency, layout: Layout
) -> Iterator[list[_Program]]:
    """First without choices that prune axes, or drop blocks, that the masks keep whole; then with every choice.

    One program for each hidden width. Where the layout ties the hidden width to the number of heads, one for each
    number of heads too.
    """
    whole = bool(masks.keep["hidden"].all())
    for every in (False, True):
        programs: list[_Program] = []
        for row, hidden in enumerate(table.hidden):
            if whole and not every and hidden < topology.hidden:
                continue
            program = _program(topology, masks, table, of, row, merged=layout == "uniform")
            if not every:
                program = program.only(_as_the_masks(topology, masks, program))
            programs += [program] if layout == "uneven" else _by_heads(topology, program, layout)
        yield programs


def _by_heads(topology: Topology, program: _Program, layout: Layout) -> Iterator[_Program]:
    """One program for each number of heads that fits the hidden width: that of all layers, or the most if padded."""
    attention, width = program.is_attention(), program.choices.label
    for heads in range(1, topology.kv_heads + 1):
        if program.hidden % topology.hidden_divisor(heads) == 0:
            allowed, mlp = (width == heads, width > 0) if layout == "uniform" else (width <= heads, width >= 0)
            yield program.only(np.where(attention, allowed, mlp))


def _program(topology: Topology, masks: Masks, table: LatencyTable, of: Latency, row: int, merged: bool) -> _Program:
    """All choices at one hidden width; merged: one group for all attention blocks and one for all MLPs."""
    hidden = table.hidden[row]
    layers, groups = (topology.layers, 1) if merged else (1, topology.layers)
    rest, attention, mlp = (part[row].numpy() for part in table.parts(of))
    without_units = _parameters(topology, hidden)
    blocks: tuple[tuple[Axis, list[int], np.ndarray], ...] = (
        ("kv_heads", table.kv_heads, attention),
        ("intermediate", table.intermediate, mlp),
    )
    columns = []
    for axis, widths, latency in blocks:
        by_layer = lost_by_width(topology, masks, axis, STEEP)[:, widths]
        lost = (by_layer.sum(0, keepdim=True) if merged else by_layer).flatten().numpy()
        own = [_parameters(topology, hidden, **{axis: n}) - without_units for n in widths]
        columns.append(
            [np.tile(widths, groups), lost, layers * np.tile(own, groups), layers * np.tile(latency, groups)]
        )
    label, *costs = (np.concatenate(both) for both in zip(*columns, strict=True))
    group = np.repeat(np.arange(2 * groups), np.repeat([len(table.kv_heads), len(table.intermediate)], groups))
    fixed = {
        "lost": float(lost_by_width(topology, masks, "hidden", STEEP)[0, hidden]),
        "parameters": topology.layers * without_units,
        "latency_ms": float(rest),
    }
    return _Program(hidden, layers, Knapsack(group, label, dict(zip(fixed, costs, strict=True)), fixed, 2 * groups))


def _parameters(topology: Topology, hidden: int, intermediate: int = 0, kv_heads: int = 0) -> float:
    """Of one layer."""
    return float(
        decoder_parameters(topology, torch.tensor(hidden), torch.tensor([intermediate]), torch.tensor([kv_heads]))
    )


def _as_the_masks(topology: Topology, masks: Masks, program: _Program) -> np.ndarray:
    """Choices that keep whole the axes, and keep the blocks, that the masks keep: bool [choices]."""
    group, width, groups = program.choices.group, program.choices.label, program.choices.groups // 2
    allowed = np.ones(len(group), dtype=bool)
    axes: tuple[Axis, ...] = ("kv_heads", "intermediate")
    for index, axis in enumerate(axes):
        other_axis, keep = group // groups != index, masks.keep[axis]
        if keep.all():
            allowed &= other_axis | (width == topology.width(axis))
        present = keep.any(-1).numpy() if len(keep) == groups else np.array([True])
        allowed &= other_axis | (width > 0) | ~present[group % groups]
    return allowed
