"""Scores in closed form: how much loss a unit saves per parameter, to second order. The default of `tva`.

A gate's noise of variance sigma² raises the loss by ½·H·sigma², with H the curvature of the loss in the gate, and
lowers a KL term of weight p by ½·p·log sigma² (TVA-Prune Eq. 1). Their sum is stationary at sigma² = p / H, where

    log_alpha = log(mean² / sigma²) = log(mean²·H / p).

With p the unit's parameter count, one threshold serves all axes. The score is this log_alpha, standardised. It follows
from the curvature, so no variance is trained and no noise is sampled (departure from section 3.1; docs/method.md
says where its effect was measured).
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tvaprune.architecture.parameter_counts import dense_unit_costs
from tvaprune.architecture.topology import Topology
from tvaprune.distributed import World
from tvaprune.gates.budget import BudgetGates, Step
from tvaprune.gates.curvature import RunningCurvature, gate_curvature
from tvaprune.gates.insertion import GatedModel, SquaredGradients
from tvaprune.masks.masks import EPSILON
from tvaprune.options.axes import AXES, Axis


def importance(
    topology: Topology, mean: dict[Axis, Float[Tensor, "..."]], curvature: dict[Axis, Float[Tensor, "..."]]
) -> dict[Axis, Float[Tensor, "..."]]:
    """log(mean²·H / parameters), natural logarithm, with a unit's parameters in the dense model.

    All are float32, of the shapes of `Topology.gate_shape`; curvature H >= 0.
    """
    found = {}
    for axis in AXES:
        parameters = dense_unit_costs(topology)[axis].float().to(curvature[axis].device)
        found[axis] = torch.log(mean[axis].square() + EPSILON) - (
            torch.log(parameters) - torch.log(curvature[axis] + 1e-12)
        )
    return found


class ClosedFormGates(BudgetGates):
    """The means by gradient; the scores from the means and a running curvature, at every step."""

    def start(self, gated: GatedModel, input_ids: Tensor, world: World, progress: bool) -> None:
        """Measure the dense model's curvature; its importances set the scale of the scores for the whole run.

        The scale of a logarithm per parameter is arbitrary: it becomes the standard deviation of the intermediate
        units' importance, so that head starts mean the same on every model.

        Raises:
            ValueError: curvature_tokens does not divide the windows.
        """
        windows = input_ids[-self.options.curvature_windows :].long().to(self.device)
        block = self.options.curvature_tokens or windows.shape[1]
        if windows.shape[1] % block:
            raise ValueError(
                f"learn_masks.tva.curvature_tokens = {block} does not divide windows of {windows.shape[1]} tokens"
            )
        start = gate_curvature(gated, windows, block, seed=self.seed, progress=progress, world=world)
        self._curvature = RunningCurvature(start, len(windows))
        units = importance(self.topology, self.mean, start)["intermediate"]
        self._centre, self._scale = float(units.mean()), float(units.std())
        self._score(start)

    def squares(self, seq_len: int) -> SquaredGradients:
        return SquaredGradients(self.topology, self.options.curvature_tokens or seq_len, self.device)

    def rescore(self, step: Step, squares: SquaredGradients | None, world: World) -> None:
        """Add this step's gradients to the curvature, and score again."""
        assert squares is not None
        # Each process averages over its own windows, so its gradients are `size` times too large for the whole batch.
        share = (step.clip_factor / world.size) ** 2
        sums = {axis: world.sum_(squares.sums[axis]) * share for axis in AXES}
        self._curvature.add(sums, step.keep, self.options.batch_size)
        self._score(self._curvature.mean())

    def _score(self, curvature: dict[Axis, Tensor]) -> None:
        self.score = {
            axis: (value - self._centre) / self._scale + getattr(self.options.head_start, axis)
            for axis, value in importance(self.topology, self.mean, curvature).items()
        }

    def state_dict(self) -> dict[str, Any]:
        curvature = self._curvature.state_dict()
        return {**super().state_dict(), "curvature": curvature, "centre": self._centre, "scale": self._scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._curvature = RunningCurvature.from_state(state["curvature"], self.device)
        self._centre, self._scale = state["centre"], state["scale"]
