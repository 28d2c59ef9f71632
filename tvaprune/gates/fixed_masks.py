"""Means on given masks: what a method's masks are worth once the weights they keep are scaled as `tva`'s are.

The masks hold from the first step to the last; only the means are trained, by the step of `budget`.
"""

import torch
from jaxtyping import Bool
from torch import Tensor

from tvaprune.architecture.parameter_counts import sparsity
from tvaprune.architecture.topology import Topology
from tvaprune.gates.budget import BudgetGates
from tvaprune.masks.masks import Masks
from tvaprune.masks.update import WeightUpdate
from tvaprune.options.axes import AXES, Axis
from tvaprune.options.gates import TvaOptions


class FixedMaskGates(BudgetGates):
    """Gates whose masks are given; `options` say how the means are trained, by `tva`'s own learning-rate schedule."""

    def __init__(self, topology: Topology, options: TvaOptions, masks: Masks, device: torch.device) -> None:
        reached = sparsity(topology, masks.widths())
        super().__init__(topology, options, reached, AXES, device, seed=0)
        self._masks = masks
        self.score = {axis: score.to(device) for axis, score in masks.score.items()}
        self._keep = {axis: keep.to(device) for axis, keep in masks.keep.items()}

    def scheduled(self, progress: float) -> float:
        """That of the masks, at every step."""
        return self.target

    def select(self, scheduled: float) -> tuple[dict[Axis, Bool[Tensor, "..."]], float]:
        """The given masks, whatever the schedule says."""
        return self._keep, 0.0

    def learned(self) -> tuple[Masks, WeightUpdate]:
        """The given masks as they are, and the means; on the CPU."""
        return self._masks, self.learned_means()
