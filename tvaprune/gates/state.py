"""The gates' trained parameters, how they are set to be trained, and their optimiser."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tvaprune.architecture.parameter_counts import unit_costs
from tvaprune.architecture.topology import AXES, SITES, Axis, Site, Topology
from tvaprune.gates.curvature import RunningCurvature
from tvaprune.gates.vib import stationary_log_var
from tvaprune.masks.masks import EPSILON, Masks, log_alpha
from tvaprune.masks.update import WeightUpdate


@dataclass(frozen=True)
class GateTraining:
    """How gates are learned; every number is a parameter of `learn_masks`.

    Attributes:
        steps: optimiser steps.
        batch_size: windows a step.
        constraint: "budget" meets the scheduled target exactly at every step (ours); "lagrangian" is the
            paper's (CoFi's) penalty.
        ramp: share of the steps over which the target sparsity rises.
        init: "curvature" starts log_var at the bottleneck's stationary point, "constant" at init_log_var.
        init_log_var: mean of the normal (std 0.01) that log_var starts from with init "constant".
        curvature_windows: calibration windows for init "curvature".
        curvature_tokens: tokens whose gradients are summed before they are squared, at the start and in training; None:
            whole windows (`tvaprune.gates.insertion.GradientDraws`).
        log_var: "tracked" keeps it at the stationary point through training, with the curvature averaged over the
            start's windows and the training's own (`RunningCurvature`); needs constraint "budget" and init
            "curvature", and learns nothing by log_var_lr, slope or KL on log_var. "trained" follows the gradient.
        head_start: added to log_alpha at the start, per axis, on the scale of a standard deviation.
        log_var_lr, mu_lr, lambda_lr: AdamW learning rates.
        channel_means: learn `channel_mu` too, at mu's rate: a mean by channel and layer where one gate spans several
            (see `tvaprune.gates.insertion`). The bottleneck's KL stays on the gates' own means.
        noise: share of sigma that is sampled in training, 0 (none) to 1 (the paper).
        kl_weight: weight of the KL per axis.
        ce_weight, distillation_weight: the objective's parts, on labels and on the dense model's own logits.
        slope: slopes of the straight-through sigmoid at the start and at the end (budget), or of the soft keep
            probability (lagrangian).
        clip: gradient norm of the gates' parameters at most; None = not clipped.
        clip_ratio: norm of the loss's own gradient in the gates over its running mean at most; None = not clipped
            (`UsualNorm`).
    """

    steps: int
    batch_size: int
    constraint: Literal["budget", "lagrangian"]
    ramp: float
    init: Literal["curvature", "constant"]
    init_log_var: float
    curvature_windows: int
    curvature_tokens: int | None
    log_var: Literal["tracked", "trained"]
    head_start: dict[Axis, float]
    log_var_lr: float
    mu_lr: float
    lambda_lr: float
    channel_means: bool
    noise: float
    kl_weight: dict[Axis, float]
    ce_weight: float
    distillation_weight: float
    slope: tuple[float, float]
    clip: float | None
    clip_ratio: float | None


class UsualNorm:
    """What gradients usually are, so that one that is nothing like them does not undo what all others taught.

    In some windows the gradient of a pruned model explodes: on SmolLM2 at 0.5 three of 800 had 30 to 90 times the norm
    of the others, which stay within twice. Squared, one such draw of the curvature outweighs all before it together;
    units that it did not touch fall below the threshold, and do not come back, because what is dropped is not drawn
    again (docs/lab-log.md). The mean is over some 20 steps, so that it follows the model as it shrinks.
    """

    DECAY = 0.95

    def __init__(self) -> None:
        self._mean_square, self._steps = 0.0, 0

    def factor(self, square: float, ratio: float) -> float:
        """By what to multiply a gradient of this squared norm so that its norm is at most `ratio` times the usual."""
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


class Gates:
    """The trained parameters, their optimiser, and one step of it."""

    def __init__(
        self, topology: Topology, settings: GateTraining, axes: tuple[Axis, ...], device: torch.device, seed: int
    ) -> None:
        self.topology, self.settings, self.axes = topology, settings, axes
        generator = torch.Generator().manual_seed(seed)

        def normal(axis: Axis, mean: float, std: float) -> Tensor:
            return (mean + std * torch.randn(topology.gate_shape(axis), generator=generator)).to(device)

        # VIBNet starts mu at N(1, 0.01); ours starts at 1, so that the model starts as the dense one.
        mu_std = 0.0 if settings.constraint == "budget" else 0.01
        self.mu = {axis: normal(axis, 1.0, mu_std) for axis in AXES}
        self.log_var = {axis: normal(axis, settings.init_log_var - settings.head_start[axis], 0.01) for axis in AXES}
        sites = SITES if settings.channel_means else ()
        self.channel_mu = {site: torch.ones(topology.site_shape(site), device=device) for site in sites}
        self.multipliers = torch.zeros(2, device=device)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(self.log_var.values()), "lr": settings.log_var_lr},
                {"params": [*self.mu.values(), *self.channel_mu.values()], "lr": settings.mu_lr},
                {"params": [self.multipliers], "lr": settings.lambda_lr, "maximize": True},
            ],
            betas=(0.9, 0.99),
            weight_decay=0.0,
        )
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self._curvature: RunningCurvature | None = None
        self._usual = UsualNorm()
        self._scale = 0.0, 1.0

    def start_at_stationary_point(self, curvature: dict[Axis, Tensor]) -> None:
        """log_var where KL and curvature balance, one price a parameter, on a common scale over the axes.

        The spread of the logarithms over units is wide and its scale arbitrary (the price of a nat); it is set
        to one standard deviation of the intermediate units' log_alpha, so that learning rates mean the same on
        every model.
        """
        self._curvature = RunningCurvature(curvature, self.settings.curvature_windows)
        balance = self._balance(curvature)["intermediate"]
        self._scale = float(balance.mean()), float(balance.std())
        self._follow(curvature)

    def calm(self, gradients: list[Tensor]) -> tuple[float, float]:
        """Scale gradients in place, all alike, where clip_ratio says so; their norm before, and the factor."""
        norm = float(torch.nn.utils.get_total_norm(gradients))
        ratio = self.settings.clip_ratio
        factor = 1.0 if ratio is None else self._usual.factor(norm**2, ratio)
        if factor < 1.0:
            for gradient in gradients:
                gradient.mul_(factor)
        return norm, factor

    def track(self, squares: dict[Axis, Tensor], keep: dict[Axis, Tensor]) -> None:
        """Move log_var to the stationary point as this step's gradients, too, see it.

        Args:
            squares: `GradientDraws.squares` of the mean loss of the whole batch, float32 per axis.
            keep: bool per axis, the step's gates.
        """
        assert self._curvature is not None, "log_var is tracked from the stationary point on"
        self._curvature.add(squares, keep, self.settings.batch_size)
        self._follow(self._curvature.mean())

    def _balance(self, curvature: dict[Axis, Tensor]) -> dict[Axis, Tensor]:
        """log(mu²·H / price) per axis, the price a unit's parameters in the dense model."""
        full = [torch.tensor(float(self.topology.hidden))]
        full += [torch.full((self.topology.layers,), float(self.topology.width(a))) for a in AXES[1:]]
        costs = unit_costs(self.topology, *full)
        balance = {}
        for axis, cost in zip(AXES, costs, strict=True):
            price = cost.float().to(curvature[axis].device)
            price = price if axis == "hidden" else price[:, None]
            balance[axis] = log_alpha(self.mu[axis], stationary_log_var(self.mu[axis], curvature[axis], price))
        return balance

    def _follow(self, curvature: dict[Axis, Tensor]) -> None:
        centre, scale = self._scale
        for axis, balance in self._balance(curvature).items():
            score = (balance - centre) / scale + self.settings.head_start[axis]
            self.log_var[axis].copy_(torch.log(self.mu[axis].square() + EPSILON) - score)

    def scores(self) -> dict[Axis, Tensor]:
        """log_alpha per axis; +inf on the axes that are not in play, so that they stay whole."""
        return {
            axis: log_alpha(self.mu[axis], self.log_var[axis])
            if axis in self.axes
            else torch.full_like(self.mu[axis], torch.inf)
            for axis in AXES
        }

    def channel_leaves(self) -> dict[Site, Tensor]:
        """channel_mu as leaves of a step's own graph."""
        return {site: mean.detach().clone().requires_grad_() for site, mean in self.channel_mu.items()}

    def found(self) -> tuple[Masks, WeightUpdate]:
        """As learned: keep where log_alpha > 0, not yet projected; on the CPU."""
        scores = {axis: log_alpha(self.mu[axis], self.log_var[axis]).cpu() for axis in AXES}
        means = {axis: mean.cpu() for axis, mean in self.mu.items()}
        channels = {site: mean.cpu() for site, mean in self.channel_mu.items()}
        return Masks({axis: score > 0 for axis, score in scores.items()}, scores), WeightUpdate(means, {}, channels)

    def state_dict(self) -> dict[str, Any]:
        return {
            "mu": self.mu,
            "channel_mu": self.channel_mu,
            "log_var": self.log_var,
            "multipliers": self.multipliers,
            "optimizer": self.optimizer.state_dict(),
            "curvature": None if self._curvature is None else self._curvature.state_dict(),
            "usual": self._usual.state_dict(),
            "scale": self._scale,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for axis in AXES:
            self.mu[axis].copy_(state["mu"][axis])
            self.log_var[axis].copy_(state["log_var"][axis])
        for site, mean in self.channel_mu.items():
            mean.copy_(state["channel_mu"][site])
        self.multipliers.copy_(state["multipliers"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._curvature = None if state["curvature"] is None else RunningCurvature.from_state(state["curvature"])
        self._usual.load_state_dict(state["usual"])
        self._scale = state["scale"]

    def step(
        self,
        mu_gradient: dict[Axis, Tensor],
        channel_gradient: dict[Site, Tensor],
        log_var_gradient: dict[Axis, Tensor],
        ascent: Tensor,
        decay: float,
    ) -> None:
        """One AdamW step, learning rates times `decay` (lambda's is not decayed)."""
        for axis in AXES:
            self.mu[axis].grad = mu_gradient[axis]
            self.log_var[axis].grad = log_var_gradient[axis]
        for site, mean in self.channel_mu.items():
            mean.grad = channel_gradient[site]
        self.multipliers.grad = ascent
        if self.settings.clip is not None:
            trained = [*self.mu.values(), *self.channel_mu.values(), *self.log_var.values()]
            nn.utils.clip_grad_norm_(trained, self.settings.clip)
        groups = self.optimizer.param_groups
        for index, (group, rate) in enumerate(zip(groups, self._rates, strict=True)):
            group["lr"] = rate if index == 2 else rate * decay
        self.optimizer.step()
