"""Widths whose predicted latency is within a budget, by one threshold on what a step of widths is worth a millisecond.

Widths are those of the measured table. A step from one of them to the next costs their difference in the table, at the
current widths of the other axes; a block's first step also costs what the block takes at any width, as a layer without
the block is in the table too. Where a step is worth more than the one before it, both are one step: nobody pays the
fixed cost of a block for its second unit only. So one threshold keeps the best units of every layer.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tvaprune.architecture.topology import AXES, Axis, Topology
from tvaprune.masks.latency_table import AIM, Latency, LatencyTable

_ROUNDING = 1e-9  # of sums, relative


class Widths(NamedTuple):
    """Kept units, the latter two by layer."""

    hidden: int
    intermediate: list[int]
    kv_heads: list[int]


class Ladder(NamedTuple):
    """The widths of one vector of units that some threshold chooses, ascending."""

    rungs: list[int]  # indices into the table's widths
    worth: list[float]  # of each step from one rung to the next, a unit of latency; descending


def ladder(value: list[float], latency: list[float], first: int = 0) -> Ladder:
    """The upper hull of what is kept against latency, both by width and ascending, from the width of index `first`.

    Widths between two rungs are never the best of any threshold. A step that takes no time is worth infinity.
    """
    rungs, worth = [first], list[float]()

    def step(low: int, high: int) -> float:
        time = latency[high] - latency[low]
        return (value[high] - value[low]) / time if time > 0 else math.inf

    for index in range(first + 1, len(value)):
        while worth and step(rungs[-1], index) >= worth[-1]:
            rungs.pop()
            worth.pop()
        worth.append(step(rungs[-1], index))
        rungs.append(index)
    return Ladder(rungs, worth)


class LatencyBudget:
    """A table's prices and predictions for one phase; latencies are shares of the dense model's.

    Axes outside of `axes` stay whole. `table` rises with every width (`LatencyTable.rising`).
    """

    def __init__(self, topology: Topology, table: LatencyTable, of: Latency, axes: tuple[Axis, ...] = AXES) -> None:
        self._topology, self._axes = topology, axes
        self._widths: dict[Axis, list[int]] = {axis: getattr(table, axis) for axis in AXES}
        dense = table.dense(of, topology)
        rest, attention, mlp = (part.numpy() / dense for part in table.parts(of))
        self._rest: np.ndarray = rest
        self._blocks: dict[Axis, np.ndarray] = {"kv_heads": attention, "intermediate": mlp}

    def dense(self) -> Widths:
        """Nothing removed."""
        topology = self._topology
        every = topology.layers * [topology.intermediate], topology.layers * [topology.kv_heads]
        return Widths(topology.hidden, *every)

    def share(self, widths: Widths) -> float:
        """The predicted latency of widths of the table."""
        return float(self._by_hidden(widths)[self._widths["hidden"].index(widths.hidden)])

    def check(self, share: float) -> None:
        """Raise a ValueError if no widths of the table are predicted to take at most a share of the dense latency."""
        least = self.share(self._narrowest())
        if least > share:
            raise ValueError(
                f"learn_masks.latency.ratio = {share / AIM:.4g}: the narrowest widths that profile_hardware timed take "
                f"{least / AIM:.2f} of the dense model's latency; raise it, add axes to learn_masks.axes, or lower "
                "profile_hardware.narrowest_hidden"
            )

    def _narrowest(self) -> Widths:
        layers, axes = self._topology.layers, self._axes
        hidden, intermediate, kv_heads = (self._widths[axis][0 if axis in axes else -1] for axis in AXES)
        return Widths(hidden, layers * [intermediate], layers * [kv_heads])

    def choose(self, value: dict[Axis, Tensor], current: Widths, share: float) -> Widths:
        """The widths that the lowest threshold within a share of the dense latency keeps, then what still fits.

        Steps below the threshold that still fit are taken, most worth first, except of hidden: its steps are large.

        Args:
            value: what each unit is worth, >= 0; shapes of `Topology.gate_shape`, on the CPU.
            current: widths of the table, at which steps are priced.
        """
        share *= 1 + _ROUNDING
        ladders = self._ladders(value, current)
        steps = np.unique([worth for each in ladders for worth in each.worth])
        thresholds = [-1.0, *steps.tolist()]
        low, high = -1, len(thresholds) - 1  # the highest keeps the narrowest widths, which fit
        while high - low > 1:
            middle = (low + high) // 2
            if self.share(self._kept(ladders, thresholds[middle])[0]) <= share:
                high = middle
            else:
                low = middle
        widths, taken = self._kept(ladders, thresholds[high])
        return self._fill(ladders, widths, taken, share)

    def _by_hidden(self, widths: Widths) -> np.ndarray:
        """The predicted latency at every hidden width of the table."""
        total = self._rest.copy()
        for axis, table in self._blocks.items():
            total += table[:, np.searchsorted(self._widths[axis], getattr(widths, axis))].sum(1)
        return total

    def _ladders(self, value: dict[Axis, Tensor], current: Widths) -> list[Ladder]:
        """Of hidden, of each layer's intermediate units, and of each layer's heads."""
        row = self._widths["hidden"].index(current.hidden)
        found = []
        for axis in AXES:
            widths = self._widths[axis]
            latency = (self._by_hidden(current) if axis == "hidden" else self._blocks[axis][row]).tolist()
            ranked = torch.sort(value[axis].double(), dim=-1, descending=True).values.cumsum(-1)
            kept = torch.nn.functional.pad(ranked, (1, 0)).view(-1, self._topology.width(axis) + 1)[:, widths]
            first = 0 if axis in self._axes else len(widths) - 1
            found += [ladder(each, latency, first) for each in kept.tolist()]
        return found

    def _kept(self, ladders: list[Ladder], threshold: float) -> tuple[Widths, list[int]]:
        """The widths whose steps are all worth more than a threshold, and the steps taken of each ladder."""
        taken = [sum(worth > threshold for worth in each.worth) for each in ladders]
        return self._at(ladders, taken), taken

    def _at(self, ladders: list[Ladder], taken: list[int]) -> Widths:
        rungs = [each.rungs[count] for each, count in zip(ladders, taken, strict=True)]
        layers = self._topology.layers
        intermediate = [self._widths["intermediate"][index] for index in rungs[1 : 1 + layers]]
        return Widths(
            self._widths["hidden"][rungs[0]],
            intermediate,
            [self._widths["kv_heads"][index] for index in rungs[1 + layers :]],
        )

    def _fill(self, ladders: list[Ladder], widths: Widths, taken: list[int], share: float) -> Widths:
        row, layers = self._widths["hidden"].index(widths.hidden), self._topology.layers
        room, taken = share - self.share(widths), list(taken)
        left = [
            (-worth, vector, step)
            for vector, each in enumerate(ladders[1:], 1)
            for step, worth in enumerate(each.worth)
            if step >= taken[vector]
        ]
        for _, vector, step in sorted(left):
            latency = self._blocks["intermediate" if vector <= layers else "kv_heads"][row]
            rungs = ladders[vector].rungs
            cost = float(latency[rungs[step + 1]] - latency[rungs[step]])
            if taken[vector] == step and cost <= room:
                taken[vector], room = step + 1, room - cost
        return self._at(ladders, taken)
