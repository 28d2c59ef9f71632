"""What gates are trained on: batches, the loss, and the row that each step reports."""

from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tvaprune.architecture.topology import hidden_states, lm_head
from tvaprune.distributed import World
from tvaprune.losses import CE_ALONE, DistillationLoss, distillation_loss
from tvaprune.options.gates import GateOptions

Row = dict[str, float | int]
ROW = ("step", "loss", "ce", "distillation", "sparsity", "target", "hidden_kept", "gradient_norm")


class Batch(NamedTuple):
    """What a step learns from."""

    input_ids: Int[Tensor, "batch seq"]  # one process's share of the step's windows
    labels: Int[Tensor, " tokens"]  # each position's next token, -100 where there is none
    teacher: Float[Tensor, "tokens hidden"] | None  # the dense model's normed hidden states; None: no distillation


def objective(model: nn.Module, batch: Batch, options: GateOptions) -> DistillationLoss:
    """The weighted sum of cross-entropy and distillation, under the gates as set."""
    head = lm_head(model).weight
    hidden = hidden_states(model, batch.input_ids).flatten(0, 1)
    teacher_head = None if batch.teacher is None else head
    weights = replace(CE_ALONE, ce_weight=options.ce_weight, distillation_weight=options.distillation_weight)
    return distillation_loss(hidden, head, batch.teacher, teacher_head, batch.labels, weights)


def average(world: World, loss: DistillationLoss, gradients: list[Tensor]) -> DistillationLoss:
    """The losses' means over the processes; gradients are averaged in place.

    Every window has as many labels, so the mean of the processes' means is the whole batch's.
    """
    losses = torch.stack([loss.loss.detach(), loss.ce, loss.distillation])
    world.mean_([losses, *gradients])
    return DistillationLoss(*losses)


def row(loss: DistillationLoss, norm: float, sparsity: float, target: float, hidden_kept: Tensor) -> Row:
    """What a step reports; `norm` is that of the gradients before clipping."""
    return {
        "loss": float(loss.loss),
        "ce": float(loss.ce),
        "distillation": float(loss.distillation),
        "sparsity": sparsity,
        "target": target,
        "hidden_kept": float(hidden_kept),
        "gradient_norm": norm,
    }


def gradient(leaf: Tensor) -> Tensor:
    """A leaf's gradient; zeros where the loss did not depend on it."""
    return leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
