"""Gates under a latency budget: the scores of `closed_form`, with prices of a measured table in place of parameters.

A unit is worth mean²·H, by its score; the head start multiplies that, as it adds to the score. At every step the widths
follow from what the units are worth and from the table at the widths of the step before
(`tvaprune.masks.latency_budget`). The schedule is of the predicted latency: the share of the dense one to remove.
"""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tvaprune.architecture.parameter_counts import dense_unit_costs
from tvaprune.architecture.topology import LayerWidths, Topology
from tvaprune.gates.closed_form import ClosedFormGates
from tvaprune.masks.latency_budget import LatencyBudget
from tvaprune.masks.latency_table import AIM, LatencyTable
from tvaprune.masks.masks import Masks
from tvaprune.masks.projection import ranks
from tvaprune.masks.update import WeightUpdate
from tvaprune.options.axes import AXES, Axis
from tvaprune.options.gates import LatencyGoal, TvaOptions


class LatencyGates(ClosedFormGates):
    """`target` and the schedule are shares of the dense model's predicted latency to remove."""

    def __init__(
        self,
        topology: Topology,
        options: TvaOptions,
        goal: LatencyGoal,
        table: LatencyTable,
        axes: tuple[Axis, ...],
        device: torch.device,
        seed: int,
    ) -> None:
        super().__init__(topology, options, 1 - AIM * goal.ratio, axes, device, seed)
        self._budget = LatencyBudget(topology, table, goal.phase, axes)
        self._widths = LayerWidths.dense(topology)
        self._budget.check(1 - self.target)

    def select(self, scheduled: float) -> tuple[dict[Axis, Bool[Tensor, "..."]], float]:
        """The units that a step keeps; NaN, as every vector of units has its own threshold on the score."""
        self._widths = self._budget.choose(self._worth(), self._widths, 1 - scheduled)
        return {axis: ranks(score) < self._counts(axis) for axis, score in self.score.items()}, math.nan

    def _worth(self) -> dict[Axis, Float[Tensor, "..."]]:
        """What a unit's score says that it is worth in all, in place of by parameter: float64 on the CPU."""
        parameters = dense_unit_costs(self.topology)
        return {
            axis: parameters[axis] * (score.cpu().double() * self._scale + self._centre).exp()
            for axis, score in self.score.items()
        }

    def _counts(self, axis: Axis) -> Tensor:
        counts = torch.tensor(getattr(self._widths, axis), device=self.device)
        return counts if axis == "hidden" else counts[:, None]

    def learned(self) -> tuple[Masks, WeightUpdate]:
        """Masks at the target, and means; on the CPU. The threshold 0 of a score is that of its own vector."""
        keep, _ = self.select(self.target)
        score = {axis: _around_zero(self.score[axis], keep[axis]).cpu() for axis in AXES}
        return Masks({axis: score[axis] > 0 for axis in AXES}, score), self.learned_means()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "widths": list(self._widths)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._widths = LayerWidths(*state["widths"])


def _around_zero(score: Float[Tensor, "..."], keep: Bool[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Scores shifted by vector, so that those of kept units, which are the best, and of no others are above 0."""
    best_dropped = torch.where(keep, -torch.inf, score).amax(-1, keepdim=True)
    worst_kept = torch.where(keep, score, torch.inf).amin(-1, keepdim=True)
    best_dropped = torch.where(best_dropped.isfinite(), best_dropped, worst_kept - 1)
    shifted = score - best_dropped
    # Equal scores on both sides of the cut: the shift alone would drop both.
    return torch.where(keep, shifted.clamp_min(torch.finfo(score.dtype).tiny), shifted.clamp_max(0))
