"""Learn the gates over frozen weights, under a parameter budget that is met at every step."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tvaprune.device import synchronise
from tvaprune.gates.constraint import (
    cubic_ramp,
    hard_gates_under_budget,
    lagrangian,
    linear_ramp,
    tangent_to_budget,
)
from tvaprune.gates.curvature import gate_curvature
from tvaprune.gates.insertion import GatedModel, NoisePool
from tvaprune.gates.vib import EPSILON, kl, kl_gradient, log_alpha, soft_keep, stationary_log_var
from tvaprune.losses import DistillationLoss, distillation_loss, next_token_labels
from tvaprune.model import topology as layout
from tvaprune.model.sparsity import unit_costs
from tvaprune.model.topology import AXES, Axis, Topology
from tvaprune.widths.masks import Masks, project, sparsity


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
        head_start: added to log_alpha at the start, per axis, on the scale of a standard deviation.
        log_var_lr, mu_lr, lambda_lr: AdamW learning rates.
        noise: share of sigma that is sampled in training, 0 (none) to 1 (the paper).
        kl_weight: weight of the KL per axis.
        ce_weight, distillation_weight: the objective's parts, on labels and on the dense model's own logits.
        slope: slopes of the straight-through sigmoid at the start and at the end (budget), or of the soft keep
            probability (lagrangian).
        clip: gradient norm of the gates' parameters at most; None = not clipped.
    """

    steps: int
    batch_size: int
    constraint: Literal["budget", "lagrangian"]
    ramp: float
    init: Literal["curvature", "constant"]
    init_log_var: float
    curvature_windows: int
    head_start: dict[Axis, float]
    log_var_lr: float
    mu_lr: float
    lambda_lr: float
    noise: float
    kl_weight: dict[Axis, float]
    ce_weight: float
    distillation_weight: float
    slope: tuple[float, float]
    clip: float | None


@dataclass(frozen=True)
class Learned:
    """What training gives.

    Attributes:
        masks: projected onto the target, threshold 0.
        curve: one row a step: step, loss, ce, distillation, sparsity, target, hidden_kept.
        step_seconds: median over steps of the whole step but the teacher's forward.
        bare_step_seconds: median of the same forward, objective and backward (to the embeddings) without gates, on
            some of the same batches, in between.
        teacher_seconds: median of the dense model's forward for distillation; 0 without.
    """

    masks: Masks
    curve: list[dict[str, float | int]]
    step_seconds: float
    bare_step_seconds: float
    teacher_seconds: float


@runtime_checkable
class Saver(Protocol):
    """Where training keeps its state; `tvaprune.resume.ResumableRun` is one."""

    def load(self) -> dict[str, Any] | None: ...
    def save(self, state: dict[str, Any]) -> None: ...


BARE_EVERY = 25  # a bare step is timed once in so many steps
SAVE_EVERY = 10


def learn_gates(
    model: nn.Module,
    topology: Topology,
    input_ids: Tensor,
    target_sparsity: float,
    settings: GateTraining,
    *,
    axes: tuple[Axis, ...] = AXES,
    seed: int = 0,
    saver: Saver | None = None,
    progress: bool = True,
) -> Learned:
    """Train mu and log_var (and lambda) until the target is met; the model's weights stay frozen.

    Departures from section 3.1, each with its ablation in docs/lab-log.md: gates are 0 or mu in the forward, the
    gradient passes straight through a sigmoid, and the threshold is solved at every step so that the kept
    parameters are the schedule's (constraint "budget"); the starting point is the bottleneck's own stationary
    point; dropped dimensions are zero and outside the norm while training.

    Args:
        model: causal LM on its device; weights in any floating dtype.
        input_ids: int32 or int64 [samples, seq_len]; taken in order, again from the start when exhausted.
        target_sparsity: share of the decoder layers' parameters to remove.
        saver: state is read from it first and written to it as training goes.
    """
    device = next(model.parameters()).device
    gates = _Gates(topology, settings, axes, device, seed)
    timings: dict[str, list[float]] = {"step": [], "bare": [], "teacher": []}
    curve: list[dict[str, float | int]] = []
    start = 0
    state = saver.load() if saver is not None else None
    noise = None
    if settings.noise > 0:
        noise = NoisePool(seed, device, next(model.parameters()).dtype, _pool_size(topology, settings, input_ids))
    with GatedModel(model, topology).inserted() as gated:
        if state is not None:
            gates.load_state_dict(state["gates"])
            curve, timings, start = state["curve"], state["timings"], state["step"]
        elif settings.init == "curvature":
            windows = input_ids[-settings.curvature_windows :].long().to(device)
            curvature = gate_curvature(gated, windows, seed=seed, progress=progress)
            gates.start_at_stationary_point(curvature)
        steps = range(start, settings.steps)
        bar = tqdm(steps, initial=start, total=settings.steps, desc="gates", disable=not progress)
        for step in bar:
            batch = _batch(input_ids, step, settings.batch_size).to(device)
            labels = next_token_labels(batch)
            teacher = None
            if settings.distillation_weight > 0:
                teacher, seconds = _timed(partial(_teacher_hidden, gated, batch), device)
                timings["teacher"].append(seconds)
            if step % BARE_EVERY == min(BARE_EVERY // 2, settings.steps - 1):
                timings["bare"].append(_timed(partial(_bare_step, gated, settings, batch, labels, teacher), device)[1])
            work = partial(_step, gated, gates, batch, labels, teacher, step, target_sparsity, noise)
            row, seconds = _timed(work, device)
            timings["step"].append(seconds)
            curve.append(row)
            shown = {name: f"{row[name]:.3f}" for name in ("loss", "sparsity", "target")}
            bar.set_postfix(shown, refresh=False)
            if saver is not None and (step + 1) % SAVE_EVERY == 0:
                saver.save({"gates": gates.state_dict(), "curve": curve, "timings": timings, "step": step + 1})
    masks = project(topology, gates.masks(), target_sparsity, axes)
    return Learned(
        masks,
        curve,
        step_seconds=_median(timings["step"]),
        bare_step_seconds=_median(timings["bare"]),
        teacher_seconds=_median(timings["teacher"]),
    )


class _Gates:
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
        self.multipliers = torch.zeros(2, device=device)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(self.log_var.values()), "lr": settings.log_var_lr},
                {"params": list(self.mu.values()), "lr": settings.mu_lr},
                {"params": [self.multipliers], "lr": settings.lambda_lr, "maximize": True},
            ],
            betas=(0.9, 0.99),
            weight_decay=0.0,
        )
        self._rates = [group["lr"] for group in self.optimizer.param_groups]

    def start_at_stationary_point(self, curvature: dict[Axis, Tensor]) -> None:
        """log_var where KL and curvature balance, one price a parameter, on a common scale over the axes.

        The spread of the logarithms over units is wide and its scale arbitrary (the price of a nat); it is set
        to one standard deviation of the intermediate units' log_alpha, so that learning rates mean the same on
        every model.
        """
        full = [torch.tensor(float(self.topology.hidden))]
        full += [torch.full((self.topology.layers,), float(self.topology.width(a))) for a in AXES[1:]]
        costs = unit_costs(self.topology, *full)
        scores = {}
        for axis, cost in zip(AXES, costs, strict=True):
            price = cost.float().to(curvature[axis].device)
            price = price if axis == "hidden" else price[:, None]
            scores[axis] = log_alpha(self.mu[axis], stationary_log_var(self.mu[axis], curvature[axis], price))
        centre, scale = scores["intermediate"].mean(), scores["intermediate"].std()
        for axis in AXES:
            score = (scores[axis] - centre) / scale + self.settings.head_start[axis]
            self.log_var[axis].copy_(torch.log(self.mu[axis].square() + EPSILON) - score)

    def scores(self) -> dict[Axis, Tensor]:
        """log_alpha per axis; +inf on the axes that are not in play, so that they stay whole."""
        return {
            axis: log_alpha(self.mu[axis], self.log_var[axis])
            if axis in self.axes
            else torch.full_like(self.mu[axis], torch.inf)
            for axis in AXES
        }

    def masks(self) -> Masks:
        """As learned: keep where log_alpha > 0, not yet projected; on the CPU."""
        scores = {axis: log_alpha(self.mu[axis], self.log_var[axis]).cpu() for axis in AXES}
        return Masks(
            keep={axis: score > 0 for axis, score in scores.items()},
            log_alpha=scores,
            mu={axis: mean.cpu() for axis, mean in self.mu.items()},
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "mu": self.mu,
            "log_var": self.log_var,
            "multipliers": self.multipliers,
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for axis in AXES:
            self.mu[axis].copy_(state["mu"][axis])
            self.log_var[axis].copy_(state["log_var"][axis])
        self.multipliers.copy_(state["multipliers"])
        self.optimizer.load_state_dict(state["optimizer"])

    def step(
        self, mu_gradient: dict[Axis, Tensor], log_var_gradient: dict[Axis, Tensor], ascent: Tensor, decay: float
    ) -> None:
        """One AdamW step, learning rates times `decay` (lambda's is not decayed)."""
        for axis in AXES:
            self.mu[axis].grad = mu_gradient[axis]
            self.log_var[axis].grad = log_var_gradient[axis]
        self.multipliers.grad = ascent
        if self.settings.clip is not None:
            trained = [*self.mu.values(), *self.log_var.values()]
            nn.utils.clip_grad_norm_(trained, self.settings.clip)
        groups = self.optimizer.param_groups
        for index, (group, rate) in enumerate(zip(groups, self._rates, strict=True)):
            group["lr"] = rate if index == 2 else rate * decay
        self.optimizer.step()


def _step(
    gated: GatedModel,
    gates: _Gates,
    batch: Tensor,
    labels: Tensor,
    teacher: Tensor | None,
    step: int,
    target: float,
    noise: NoisePool | None,
) -> dict[str, float | int]:
    """Forward, backward and update; the row of the curve."""
    progress = (step + 1) / gates.settings.steps
    if noise is not None:
        noise.start_step(step)
    take = _budget_step if gates.settings.constraint == "budget" else _lagrangian_step
    return {"step": step + 1, **take(gated, gates, batch, labels, teacher, progress, target, noise)}


def _budget_step(
    gated: GatedModel,
    gates: _Gates,
    batch: Tensor,
    labels: Tensor,
    teacher: Tensor | None,
    progress: float,
    target: float,
    noise: NoisePool | None,
) -> dict[str, float | int]:
    settings, topology = gates.settings, gates.topology
    scheduled = cubic_ramp(progress, target, settings.ramp)
    slope = settings.slope[0] + (settings.slope[1] - settings.slope[0]) * progress
    scores = gates.scores()
    hard = hard_gates_under_budget(topology, scores, scheduled, slope, minimum_hidden=1)
    z = {axis: (hard.keep[axis] * gates.mu[axis]).requires_grad_() for axis in AXES}
    sigma = None
    if noise is not None:
        # Relative to the solved threshold, where sigma equals mu.
        sigma = {
            axis: hard.keep[axis]
            * gates.mu[axis].abs()
            * settings.noise
            * torch.exp(-(scores[axis] - hard.threshold) / 2)
            for axis in AXES
        }
        sigma = {axis: value.requires_grad_() for axis, value in sigma.items()}
    gated.set(z, int(hard.keep["hidden"].sum()), sigma, noise)
    parts = _loss(gated, settings, batch, labels, teacher)
    parts.loss.backward()
    with torch.no_grad():
        gate_gradient = {axis: _grad(z[axis]) * gates.mu[axis] for axis in AXES}
        score_gradient, _ = tangent_to_budget(topology, hard, gate_gradient)
        mu_gradient, log_var_gradient = {}, {}
        for axis in AXES:
            on_score = score_gradient[axis]
            mu_gradient[axis] = _grad(z[axis]) * hard.keep[axis]
            if sigma is not None:
                on_score = on_score - 0.5 * _grad(sigma[axis]) * sigma[axis]
            kl_mu, kl_log_var = kl_gradient(gates.mu[axis], gates.log_var[axis])
            weight = settings.kl_weight[axis]
            log_var_gradient[axis] = -on_score + weight * kl_log_var
            mu_gradient[axis] = mu_gradient[axis] + weight * kl_mu
            if axis not in gates.axes:
                log_var_gradient[axis].zero_()
        decay = 1.0 if progress <= settings.ramp else max((1 - progress) / (1 - settings.ramp), 0.02)
        gates.step(mu_gradient, log_var_gradient, torch.zeros_like(gates.multipliers), decay)
        reached = sparsity(topology, Masks(hard.keep, {}, {}))
    return {
        "loss": float(parts.loss.detach()),
        "ce": float(parts.ce),
        "distillation": float(parts.distillation),
        "sparsity": reached,
        "target": scheduled,
        "hidden_kept": float(hard.keep["hidden"].sum()),
    }


def _lagrangian_step(
    gated: GatedModel,
    gates: _Gates,
    batch: Tensor,
    labels: Tensor,
    teacher: Tensor | None,
    progress: float,
    target: float,
    noise: NoisePool | None,
) -> dict[str, float | int]:
    """The paper's own step: every gate open and noisy, the sparsity pulled by a penalty on its expectation."""
    settings, topology = gates.settings, gates.topology
    scheduled = linear_ramp(progress, target, settings.ramp)
    slope = settings.slope[0] + (settings.slope[1] - settings.slope[0]) * progress
    mu = {axis: gates.mu[axis].detach().clone().requires_grad_() for axis in AXES}
    log_var = {axis: gates.log_var[axis].detach().clone().requires_grad_() for axis in AXES}
    sigma = {axis: settings.noise * torch.exp(log_var[axis] / 2) for axis in gates.axes} if noise is not None else None
    gated.set({axis: mu[axis] for axis in AXES}, topology.hidden, sigma, noise)
    parts = _loss(gated, settings, batch, labels, teacher)
    keep_probability = {
        axis: soft_keep(log_alpha(mu[axis], log_var[axis]), slope) if axis in gates.axes else torch.ones_like(mu[axis])
        for axis in AXES
    }
    multipliers = gates.multipliers.detach().clone().requires_grad_()
    penalty = lagrangian(topology, keep_probability, scheduled, multipliers)
    bottleneck = sum(settings.kl_weight[axis] * kl(mu[axis], log_var[axis]) for axis in gates.axes)
    (parts.loss + bottleneck + penalty.penalty.float()).backward()
    with torch.no_grad():
        gates.step(
            {axis: _grad(mu[axis]) for axis in AXES},
            {axis: _grad(log_var[axis]) for axis in AXES},
            _grad(multipliers),
            1 - progress + 1 / settings.steps,
        )
    return {
        "loss": float(parts.loss.detach()),
        "ce": float(parts.ce),
        "distillation": float(parts.distillation),
        "sparsity": float(penalty.sparsity.detach()),
        "target": scheduled,
        "hidden_kept": float(keep_probability["hidden"].detach().sum()),
    }


def _grad(tensor: Tensor) -> Tensor:
    return tensor.grad if tensor.grad is not None else torch.zeros_like(tensor)


def _hidden(gated: GatedModel, batch: Tensor, **inputs: Tensor) -> Tensor:
    """[batch, seq] to normed hidden states [batch · seq, hidden]."""
    given = inputs or {"input_ids": batch}
    return layout.decoder(gated.model)(**given, use_cache=False).last_hidden_state.flatten(0, 1)


def _loss(
    gated: GatedModel, settings: GateTraining, batch: Tensor, labels: Tensor, teacher: Tensor | None, **inputs: Tensor
) -> DistillationLoss:
    head = layout.head(gated.model).weight
    return distillation_loss(
        _hidden(gated, batch, **inputs),
        head,
        teacher,
        None if teacher is None else head,
        labels,
        ce_weight=settings.ce_weight,
        distillation_weight=settings.distillation_weight,
    )


@torch.no_grad()
def _teacher_hidden(gated: GatedModel, batch: Tensor) -> Tensor:
    gated.clear()
    return _hidden(gated, batch)


def _bare_step(
    gated: GatedModel, settings: GateTraining, batch: Tensor, labels: Tensor, teacher: Tensor | None
) -> None:
    """What a step would cost without gates: to measure, not to learn from."""
    gated.clear()
    embedded = layout.embedding(gated.model)(batch).detach().requires_grad_()
    _loss(gated, settings, batch, labels, teacher, inputs_embeds=embedded).loss.backward()


def _timed(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    synchronise(device)
    started = time.perf_counter()
    result = work()
    synchronise(device)
    return result, time.perf_counter() - started


def _median(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).median()) if values else 0.0


def _batch(input_ids: Tensor, step: int, batch_size: int) -> Tensor:
    rows = [(step * batch_size + row) % len(input_ids) for row in range(batch_size)]
    return input_ids[rows].long()


def _pool_size(topology: Topology, settings: GateTraining, input_ids: Tensor) -> int:
    """Enough for the widest place a gate multiplies at, with room for offsets."""
    tokens = settings.batch_size * input_ids.shape[1]
    widest = max(topology.hidden, topology.intermediate, topology.kv_heads * topology.query_rows)
    return 2 * tokens * widest
