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

from tvaprune.architecture.topology import LayerWidths, Topology
from tvaprune.masks.latency_table import AIM, LatencyTable
from tvaprune.options.axes import AXES, Axis
from tvaprune.options.choices import Latency

_ROUNDING = 1e-9  # of sums, relative


class Hull(NamedTuple):
    """The widths of one vector of units that some threshold chooses, ascending."""

    vertices: list[int]  # indices into the table's widths
    worth: list[float]  # of each step from one vertex to the next, a unit of latency; descending


def upper_hull(value: list[float], latency: list[float], first: int = 0) -> Hull:
    """The upper convex hull of what is kept against latency, both ascending by width, from the width of index `first`.

    Widths between two vertices are never the best of any threshold. A step that takes no time is worth infinity.
    """
    vertices, worth = [first], list[float]()

    def step(low: int, high: int) -> float:
        time = latency[high] - latency[low]
        return (value[high] - value[low]) / time if time > 0 else math.inf

    for index in range(first + 1, len(value)):
        while worth and step(vertices[-1], index) >= worth[-1]:
            vertices.pop()
            worth.pop()
        worth.append(step(vertices[-1], index))
        vertices.append(index)
    return Hull(vertices, worth)


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

    def share(self, widths: LayerWidths) -> float:
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

    def _narrowest(self) -> LayerWidths:
        layers, axes = self._topology.layers, self._axes
        hidden, intermediate, kv_heads = (self._widths[axis][0 if axis in axes else -1] for axis in AXES)
        return LayerWidths(hidden, layers * [intermediate], layers * [kv_heads])

    def choose(self, value: dict[Axis, Tensor], current: LayerWidths, share: float) -> LayerWidths:
        """The widths that the lowest threshold within a share of the dense latency keeps, then what still fits.

        Steps below the threshold that still fit are taken, most worth first, except of hidden: its steps are large.

        Args:
            value: what each unit is worth, >= 0; shapes of `Topology.gate_shape`, on the CPU.
            current: widths of the table, at which steps are priced.
        """
        share *= 1 + _ROUNDING
        hulls = self._hulls(value, current)
        steps = np.unique([worth for each in hulls for worth in each.worth])
        thresholds = [-1.0, *steps.tolist()]
        low, high = -1, len(thresholds) - 1  # the highest keeps the narrowest widths, which fit
        while high - low > 1:
            middle = (low + high) // 2
            if self.share(self._kept(hulls, thresholds[middle])[0]) <= share:
                high = middle
            else:
                low = middle
        widths, taken = self._kept(hulls, thresholds[high])
        return self._fill(hulls, widths, taken, share)

    def _by_hidden(self, widths: LayerWidths) -> np.ndarray:
        """The predicted latency at every hidden width of the table."""
        total = self._rest.copy()
        for axis, table in self._blocks.items():
            total += table[:, np.searchsorted(self._widths[axis], getattr(widths, axis))].sum(1)
        return total

    def _hulls(self, value: dict[Axis, Tensor], current: LayerWidths) -> list[Hull]:
        """Of hidden, of each layer's intermediate units, and of each layer's heads."""
        row = self._widths["hidden"].index(current.hidden)
        found = []
        for axis in AXES:
            widths = self._widths[axis]
            latency = (self._by_hidden(current) if axis == "hidden" else self._blocks[axis][row]).tolist()
            ranked = torch.sort(value[axis].double(), dim=-1, descending=True).values.cumsum(-1)
            kept = torch.nn.functional.pad(ranked, (1, 0)).view(-1, self._topology.width(axis) + 1)[:, widths]
            first = 0 if axis in self._axes else len(widths) - 1
            found += [upper_hull(each, latency, first) for each in kept.tolist()]
        return found

    def _kept(self, hulls: list[Hull], threshold: float) -> tuple[LayerWidths, list[int]]:
        """The widths whose steps are all worth more than a threshold, and the steps taken along each hull."""
        taken = [sum(worth > threshold for worth in each.worth) for each in hulls]
        return self._at(hulls, taken), taken

    def _at(self, hulls: list[Hull], taken: list[int]) -> LayerWidths:
        vertices = [each.vertices[count] for each, count in zip(hulls, taken, strict=True)]
        layers = self._topology.layers
        intermediate = [self._widths["intermediate"][index] for index in vertices[1 : 1 + layers]]
        return LayerWidths(
            self._widths["hidden"][vertices[0]],
            intermediate,
            [self._widths["kv_heads"][index] for index in vertices[1 + layers :]],
        )

    def _fill(self, hulls: list[Hull], widths: LayerWidths, taken: list[int], share: float) -> LayerWidths:
        row, layers = self._widths["hidden"].index(widths.hidden), self._topology.layers
        room, taken = share - self.share(widths), list(taken)
        left = [
            (-worth, vector, step)
            for vector, each in enumerate(hulls[1:], 1)
            for step, worth in enumerate(each.worth)
            if step >= taken[vector]
        ]
        for _, vector, step in sorted(left):
            latency = self._blocks["intermediate" if vector <= layers else "kv_heads"][row]
            vertices = hulls[vector].vertices
            cost = float(latency[vertices[step + 1]] - latency[vertices[step]])
            if taken[vector] == step and cost <= room:
                taken[vector], room = step + 1, room - cost
        return self._at(hulls, taken)
