"""One optimiser step of the gates, under the exact budget or under the paper's Lagrangian."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from tvaprune.architecture.topology import AXES, decoder, lm_head
from tvaprune.distributed import ALONE, World
from tvaprune.gates.constraint import (
    cubic_ramp,
    hard_gates_under_budget,
    lagrangian,
    linear_ramp,
    tangent_to_budget,
)
from tvaprune.gates.insertion import GatedModel, GradientDraws, NoisePool
from tvaprune.gates.state import Gates, GateTraining
from tvaprune.gates.vib import kl, kl_gradient, soft_keep
from tvaprune.losses import KL_ALONE, DistillationLoss, distillation_loss
from tvaprune.masks.masks import Masks, log_alpha, sparsity

Row = dict[str, float | int]


class Batch(NamedTuple):
    """What a step learns from.

    Attributes:
        input_ids: int64 [batch, seq].
        labels: int64 [batch · seq], each position's next token, -100 where there is none.
        teacher: the dense model's normed hidden states [batch · seq, hidden], or None.
    """

    input_ids: Tensor
    labels: Tensor
    teacher: Tensor | None


def budget_step(
    gated: GatedModel,
    gates: Gates,
    batch: Batch,
    progress: float,
    target: float,
    noise: NoisePool | None,
    world: World = ALONE,
) -> Row:
    """One step under the exact budget: 0/1 gates forward, and log_var tracked or trained.

    Trained: a straight-through sigmoid backward, along the budget's tangent.

    Args:
        batch: this process's share of the step's windows.
        progress: share of the steps done with this one, 0 to 1.
        target: final sparsity.
        world: whose gradients are averaged, so that all take the same step.
    """
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
    channel_mu = gates.channel_leaves()
    draws = None
    if settings.log_var == "tracked":
        stretch = settings.curvature_tokens or batch.input_ids.shape[1]
        draws = GradientDraws(topology, stretch, batch.input_ids.device)
    gated.set(z, int(hard.keep["hidden"].sum()), sigma, noise, channel_mu, draws)
    parts = objective(gated, settings, batch)
    parts.loss.backward()
    leaves = [*z.values(), *(sigma or {}).values(), *channel_mu.values()]
    parts, norm, factor = _average_and_calm(world, gates, parts, leaves)
    with torch.no_grad():
        z_gradient = {axis: _grad(z[axis]) for axis in AXES}
        kl_gradients = {axis: kl_gradient(gates.mu[axis], gates.log_var[axis]) for axis in AXES}
        mu_gradient = {
            axis: z_gradient[axis] * hard.keep[axis] + settings.kl_weight[axis] * kl_gradients[axis][0] for axis in AXES
        }
        log_var_gradient = {axis: torch.zeros_like(gates.log_var[axis]) for axis in AXES}
        if settings.log_var == "trained":
            gate_gradient = {axis: z_gradient[axis] * gates.mu[axis] for axis in AXES}
            score_gradient, _ = tangent_to_budget(topology, hard, gate_gradient)
            for axis in gates.axes:
                on_score = score_gradient[axis]
                if sigma is not None:
                    on_score = on_score - 0.5 * _grad(sigma[axis]) * sigma[axis]
                log_var_gradient[axis] = settings.kl_weight[axis] * kl_gradients[axis][1] - on_score
        decay = 1.0 if progress <= settings.ramp else max((1 - progress) / (1 - settings.ramp), 0.02)
        channel_gradient = {site: _grad(mean) for site, mean in channel_mu.items()}
        gates.step(mu_gradient, channel_gradient, log_var_gradient, torch.zeros_like(gates.multipliers), decay)
        if draws is not None:
            # A share's gradients are those of its own mean loss, `size` times what they are of the whole batch's.
            share = (factor / world.size) ** 2
            gates.track({axis: world.sum_(draws.squares[axis]) * share for axis in AXES}, hard.keep)
        reached = sparsity(topology, Masks(hard.keep, {}, {}))
    return _row(parts, reached, scheduled, hard.keep["hidden"].sum(), norm)


def lagrangian_step(
    gated: GatedModel,
    gates: Gates,
    batch: Batch,
    progress: float,
    target: float,
    noise: NoisePool | None,
    world: World = ALONE,
) -> Row:
    """The paper's own step: every gate open and noisy, the sparsity pulled by a penalty on its expectation."""
    settings, topology = gates.settings, gates.topology
    scheduled = linear_ramp(progress, target, settings.ramp)
    slope = settings.slope[0] + (settings.slope[1] - settings.slope[0]) * progress
    mu = {axis: gates.mu[axis].detach().clone().requires_grad_() for axis in AXES}
    log_var = {axis: gates.log_var[axis].detach().clone().requires_grad_() for axis in AXES}
    sigma = {axis: settings.noise * torch.exp(log_var[axis] / 2) for axis in gates.axes} if noise is not None else None
    channel_mu = gates.channel_leaves()
    gated.set({axis: mu[axis] for axis in AXES}, topology.hidden, sigma, noise, channel_mu)
    parts = objective(gated, settings, batch)
    keep_probability = {
        axis: soft_keep(log_alpha(mu[axis], log_var[axis]), slope) if axis in gates.axes else torch.ones_like(mu[axis])
        for axis in AXES
    }
    multipliers = gates.multipliers.detach().clone().requires_grad_()
    penalty = lagrangian(topology, keep_probability, scheduled, multipliers)
    bottleneck = sum(settings.kl_weight[axis] * kl(mu[axis], log_var[axis]) for axis in gates.axes)
    (parts.loss + bottleneck + penalty.penalty.float()).backward()
    leaves = [*mu.values(), *log_var.values(), *channel_mu.values()]
    parts, norm, _ = _average_and_calm(world, gates, parts, leaves)
    with torch.no_grad():
        gates.step(
            {axis: _grad(mu[axis]) for axis in AXES},
            {site: _grad(mean) for site, mean in channel_mu.items()},
            {axis: _grad(log_var[axis]) for axis in AXES},
            _grad(multipliers),
            1 - progress + 1 / settings.steps,
        )
    return _row(parts, float(penalty.sparsity.detach()), scheduled, keep_probability["hidden"].detach().sum(), norm)


def _average_and_calm(
    world: World, gates: Gates, parts: DistillationLoss, leaves: list[Tensor]
) -> tuple[DistillationLoss, float, float]:
    """The mean over the processes of the losses, and of the leaves' gradients, in place, calmed; see `Gates.calm`.

    Every window has as many labels, so the mean of the shares' means is the whole batch's.

    Returns:
        The losses, the gradients' norm before it was calmed, and by what it was multiplied.
    """
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    losses = [torch.stack([parts.loss.detach(), parts.ce, parts.distillation])]
    world.mean_(losses + gradients)
    return DistillationLoss(*losses[0]), *gates.calm(gradients)


def _row(parts: DistillationLoss, sparsity: float, target: float, hidden_kept: Tensor, gradient_norm: float) -> Row:
    return {
        "loss": float(parts.loss),
        "ce": float(parts.ce),
        "distillation": float(parts.distillation),
        "sparsity": sparsity,
        "target": target,
        "hidden_kept": float(hidden_kept),
        "gradient_norm": gradient_norm,
    }


def _grad(tensor: Tensor) -> Tensor:
    return tensor.grad if tensor.grad is not None else torch.zeros_like(tensor)


def hidden_states(gated: GatedModel, **inputs: Tensor) -> Tensor:
    """Normed hidden states under the gates as set, [batch · seq, hidden]."""
    return decoder(gated.model)(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)


def objective(gated: GatedModel, settings: GateTraining, batch: Batch, **inputs: Tensor) -> DistillationLoss:
    """The weighted sum of cross-entropy and distillation, on the batch's ids or on other `inputs` of the decoder."""
    head = lm_head(gated.model).weight
    return distillation_loss(
        hidden_states(gated, **(inputs or {"input_ids": batch.input_ids})),
        head,
        batch.teacher,
        None if batch.teacher is None else head,
        batch.labels,
        replace(KL_ALONE, ce_weight=settings.ce_weight, distillation_weight=settings.distillation_weight),
    )
