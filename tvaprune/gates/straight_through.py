"""The ablation `deterministic`: scores by gradient, through a straight-through sigmoid, from a constant start."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tvaprune.architecture.parameter_counts import unit_costs
from tvaprune.architecture.topology import Topology
from tvaprune.distributed import World
from tvaprune.gates.budget import BudgetGates, Step, adamw, take_step
from tvaprune.gates.insertion import GatedModel, SquaredGradients
from tvaprune.masks.masks import log_alpha
from tvaprune.options.axes import AXES, Axis

LEARNING_RATE = 0.02
# Slope of the sigmoid, at the start and at the end.
SLOPE = (2.0, 8.0)
INITIAL_LOG_VAR = -9.0


def tangent_to_budget(
    topology: Topology,
    keep: dict[Axis, Bool[Tensor, "..."]],
    surrogate: dict[Axis, Float[Tensor, "..."]],
    mask_gradient: dict[Axis, Float[Tensor, "..."]],
) -> dict[Axis, Float[Tensor, "..."]]:
    """The gradient on the scores, projected onto the tangent of the budget.

    With g the gradient on the masks and c the parameters that each unit owns, both times the surrogate derivative of
    each 0/1 gate with respect to its score, the component of g along c is removed: g - lambda·c with lambda =
    <g, c> / <c, c>. What is left compares units by loss per parameter across the axes, and does not move the sparsity.
    """
    costs = unit_costs(topology, *(keep[axis].sum(-1) for axis in AXES))
    along, across = {}, {}
    for axis in AXES:
        along[axis] = costs[axis].float() * surrogate[axis]
        across[axis] = mask_gradient[axis] * surrogate[axis]
    product = sum(float((across[axis] * along[axis]).sum()) for axis in AXES)
    norm = sum(float(along[axis].square().sum()) for axis in AXES)
    multiplier = product / norm if norm > 0 else 0.0
    return {axis: across[axis] - multiplier * along[axis] for axis in AXES}


class StraightThroughGates(BudgetGates):
    """The means and a log-variance by gradient; score = log_alpha of the two."""

    def start(self, gated: GatedModel, input_ids: Tensor, world: World, progress: bool) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self._set({axis: self._initial(axis, generator) for axis in AXES})

    def _initial(self, axis: Axis, generator: torch.Generator) -> Tensor:
        noise = 0.01 * torch.randn(self.topology.gate_shape(axis), generator=generator)
        return (INITIAL_LOG_VAR - getattr(self.options.head_start, axis) + noise).to(self.device)

    def _set(self, log_var: dict[Axis, Tensor]) -> None:
        self._log_var = log_var
        self._score_optimizer = adamw([log_var[axis] for axis in AXES], LEARNING_RATE)
        self.score = {axis: log_alpha(self.mean[axis], log_var[axis]) for axis in AXES}

    def rescore(self, step: Step, squares: SquaredGradients | None, world: World) -> None:
        """One step of the log-variance, downhill along the budget's tangent."""
        slope = SLOPE[0] + (SLOPE[1] - SLOPE[0]) * step.progress
        surrogate = {}
        for axis in AXES:
            score = self.score[axis] if axis in self.axes else self.score[axis] + torch.inf
            soft = torch.sigmoid(slope * (score - step.threshold))
            surrogate[axis] = slope * soft * (1 - soft)
        on_score = tangent_to_budget(self.topology, step.keep, surrogate, step.mask_gradient)
        gradients = [-on_score[axis] if axis in self.axes else torch.zeros_like(on_score[axis]) for axis in AXES]
        take_step(self._score_optimizer, gradients, LEARNING_RATE * step.learning_rate_factor)
        self.score = {axis: log_alpha(self.mean[axis], self._log_var[axis]) for axis in AXES}

    def state_dict(self) -> dict[str, Any]:
        optimizer = self._score_optimizer.state_dict()
        return {**super().state_dict(), "log_var": self._log_var, "score_optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._set({axis: log_var.to(self.device) for axis, log_var in state["log_var"].items()})
        self._score_optimizer.load_state_dict(state["score_optimizer"])
