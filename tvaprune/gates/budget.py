"""Gates under an exact parameter budget: the step that `tva` and its ablation share.

Trained by gradient: the gates' means, and the means per channel. Each step keeps the units with the best scores, as
many as the scheduled sparsity leaves room for, and multiplies by 0 or the mean. Where scores come from is up to the
subclass: in closed form (`closed_form`), by a straight-through gradient (`straight_through`), or from a baseline
(`fixed_masks`).

Departures from TVA-Prune section 3.1: no noise is sampled, and there is no KL term and no Lagrangian (`paper` has
them). The kept parameters are within the schedule at every step, and at most one unit below it. Dropped dimensions are
zero and outside of the norm while training.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tvaprune.architecture.parameter_counts import sparsity
from tvaprune.architecture.topology import GATED_SITES, Topology
from tvaprune.distributed import World
from tvaprune.gates.insertion import GatedModel, SquaredGradients
from tvaprune.gates.objective import Row, average, gradient, objective, row
from tvaprune.masks.masks import Masks
from tvaprune.masks.projection import keep_above, level_layers, project, solve_threshold
from tvaprune.masks.update import WeightUpdate
from tvaprune.options.axes import AXES, Axis
from tvaprune.options.gates import TvaOptions

# Learning rate of the means for a target of 1. The more is removed, the further the means of the rest have to move; a
# faster rate learns the calibration text instead (docs/lab-log.md).
MEAN_RATE = 0.01


def cubic_ramp(progress: float, target: float, ramp: float) -> float:
    """Scheduled sparsity: rises fast, then slowly, over a share `ramp` of the steps; 0: at once (Zhu, Gupta 2017)."""
    rising = min(progress / ramp, 1.0) if ramp > 0 else 1.0
    return target * (1 - (1 - rising) ** 3)


class RunningNorm:
    """Clipping relative to the root mean square of gradient norms, over some 20 steps because the model shrinks.

    In some windows the gradient of a pruned model explodes (docs/lab-log.md). Squared, one such draw of the curvature
    outweighs all before it together, and units that it did not touch are dropped for good.
    """

    DECAY = 0.95

    def __init__(self) -> None:
        self._mean_square, self._steps = 0.0, 0

    def clip(self, gradients: list[Tensor], ratio: float | None) -> tuple[float, float]:
        """Scale gradients in place to at most `ratio` times that; returns the norm before, and the factor."""
        norm = float(torch.nn.utils.get_total_norm(gradients))
        factor = 1.0 if ratio is None else self.factor(norm**2, ratio)
        if factor < 1.0:
            for each in gradients:
                each.mul_(factor)
        return norm, factor

    def factor(self, square: float, ratio: float) -> float:
        """The factor for a gradient of this squared norm, which joins the mean."""
        factor = 1.0
        if self._steps > 0 and square > ratio**2 * self._mean_square:
            factor = ratio * (self._mean_square / square) ** 0.5
        past = min(self.DECAY, self._steps / (self._steps + 1))
        self._mean_square = past * self._mean_square + (1 - past) * square * factor**2
        self._steps += 1
        return factor

    def state_dict(self) -> dict[str, Any]:
        return {"mean_square": self._mean_square, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._mean_square, self._steps = state["mean_square"], state["steps"]


class Step(NamedTuple):
    """What a step did, for the scores that follow from it."""

    keep: dict[Axis, Bool[Tensor, "..."]]
    threshold: float  # units with a score above it were kept
    mask_gradient: dict[Axis, Float[Tensor, "..."]]  # of the loss with respect to the masks, were they numbers
    learning_rate_factor: float
    clip_factor: float  # what the gradients were multiplied by
    progress: float  # share of the steps done with this one, 0 to 1


def adamw(parameters: list[Tensor], lr: float, maximize: bool = False) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, maximize=maximize)


def take_step(optimizer: torch.optim.Optimizer, gradients: list[Tensor], lr: float) -> None:
    """One step of an optimizer whose only group has as many parameters as there are gradients."""
    (group,) = optimizer.param_groups
    group["lr"] = lr
    for parameter, each in zip(group["params"], gradients, strict=True):
        parameter.grad = each
    optimizer.step()


class BudgetGates:
    """Means of the gates and their training; subclasses give the scores.

    Axes outside of `axes` stay whole. `target` is the final share of the budget to remove: here of the decoder layers'
    parameters.

    Attributes:
        mean: per axis, shapes of `Topology.gate_shape`; starts at 1 (VIBNet: N(1, 0.01)), so that the model starts as
            the dense one.
        channel_mean: per site, shapes of `Topology.site_shape`; empty without `channel_means`.
        score: per axis; higher = keep.
    """

    score: dict[Axis, Tensor]

    def __init__(
        self,
        topology: Topology,
        options: TvaOptions,
        target: float,
        axes: tuple[Axis, ...],
        device: torch.device,
        seed: int,
    ) -> None:
        self.topology, self.options, self.target, self.axes = topology, options, target, axes
        self.device, self.seed = device, seed
        self.mean = {axis: torch.ones(topology.gate_shape(axis), device=device) for axis in AXES}
        sites = GATED_SITES if options.channel_means else ()
        self.channel_mean = {site: torch.ones(topology.site_shape(site), device=device) for site in sites}
        self._mean_lr = MEAN_RATE * target if options.mean_lr is None else options.mean_lr
        self._optimizer = adamw([*self.mean.values(), *self.channel_mean.values()], self._mean_lr)
        self._norm = RunningNorm()

    def start(self, gated: GatedModel, input_ids: Tensor, world: World, progress: bool) -> None:
        """Give the first scores; not called where a run is resumed."""

    def squares(self, seq_len: int) -> SquaredGradients | None:
        """What the step is to collect for the scores, if anything."""
        return None

    def rescore(self, step: Step, squares: SquaredGradients | None, world: World) -> None:
        """Move the scores, after the means; they stay where a subclass does not."""

    def scheduled(self, progress: float) -> float:
        """The share of the budget to remove, at a share of the run, 0 to 1."""
        return cubic_ramp(progress, self.target, self.options.ramp)

    def select(self, scheduled: float) -> tuple[dict[Axis, Bool[Tensor, "..."]], float]:
        """The units that a step keeps, and the threshold that their scores are above."""
        scores = self._comparable_scores()
        scores = {axis: score if axis in self.axes else score + torch.inf for axis, score in scores.items()}
        threshold = solve_threshold(self.topology, scores, scheduled)
        return keep_above(scores, threshold), threshold

    def _comparable_scores(self) -> dict[Axis, Tensor]:
        """The scores that a threshold is compared with: those of a layer's units, or of their rank in the layer."""
        if not self.options.uniform_layers:
            return self.score
        return {axis: score if axis == "hidden" else level_layers(score) for axis, score in self.score.items()}

    def step(self, gated: GatedModel, input_ids: Tensor, index: int, world: World) -> Row:
        """One optimizer step under the budget, `index` from 0; gradients are averaged over the world's processes."""
        options, topology = self.options, self.topology
        progress = (index + 1) / options.steps
        scheduled = self.scheduled(progress)
        keep, threshold = self.select(scheduled)
        gates = {axis: (keep[axis] * self.mean[axis]).requires_grad_() for axis in AXES}
        channel_mean = {site: mean.detach().clone().requires_grad_() for site, mean in self.channel_mean.items()}
        squares = self.squares(input_ids.shape[1])
        gated.set(gates, int(keep["hidden"].sum()), channel_mean, squares)
        loss = objective(gated.model, input_ids)
        loss.backward()
        gradients = [leaf.grad for leaf in (*gates.values(), *channel_mean.values()) if leaf.grad is not None]
        loss = average(world, loss, gradients)
        norm, clip_factor = self._norm.clip(gradients, options.clip_ratio)
        with torch.no_grad():
            on_gates = {axis: gradient(gates[axis]) for axis in AXES}
            decay = 1.0 if progress <= options.ramp else max((1 - progress) / (1 - options.ramp), 0.02)
            on_means = [on_gates[axis] * keep[axis] for axis in AXES] + [gradient(m) for m in channel_mean.values()]
            on_masks = {axis: on_gates[axis] * self.mean[axis] for axis in AXES}
            take_step(self._optimizer, on_means, self._mean_lr * decay)
            self.rescore(Step(keep, threshold, on_masks, decay, clip_factor, progress), squares, world)
        widths = {axis: keep[axis].sum(-1) for axis in AXES}
        return row(loss, norm, sparsity(topology, widths), scheduled, widths["hidden"])

    def learned(self) -> tuple[Masks, WeightUpdate]:
        """Masks, projected onto the target, and means; on the CPU."""
        scores = {axis: score.cpu() for axis, score in self._comparable_scores().items()}
        return project(self.topology, scores, self.target, self.axes), self.learned_means()

    def learned_means(self) -> WeightUpdate:
        """The means per unit and per channel, on the CPU; none with the ablation `vtrans`."""
        if self.options.ablation == "vtrans":
            return WeightUpdate.none(self.topology)
        means = {axis: mean.cpu() for axis, mean in self.mean.items()}
        return WeightUpdate(means, {}, {site: mean.cpu() for site, mean in self.channel_mean.items()})

    def state_dict(self) -> dict[str, Any]:
        return {
            "mean": self.mean,
            "channel_mean": self.channel_mean,
            "score": self.score,
            "optimizer": self._optimizer.state_dict(),
            "norm": self._norm.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.score = {axis: score.to(self.device) for axis, score in state["score"].items()}
        for axis in AXES:
            self.mean[axis].copy_(state["mean"][axis])
        for site, mean in self.channel_mean.items():
            mean.copy_(state["channel_mean"][site])
        self._optimizer.load_state_dict(state["optimizer"])
        self._norm.load_state_dict(state["norm"])
