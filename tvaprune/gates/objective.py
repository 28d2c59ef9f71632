"""What gates are trained on: the loss, and the row that each step reports."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tvaprune.architecture.topology import hidden_states, lm_head
from tvaprune.distributed import World
from tvaprune.losses import cross_entropy, next_token_labels

Row = dict[str, float | int]
ROW = ("step", "loss", "sparsity", "target", "hidden_kept", "gradient_norm")


def objective(model: nn.Module, input_ids: Int[Tensor, "batch seq"]) -> Float[Tensor, ""]:
    """Mean cross-entropy of each next token, in nats, under the gates as set."""
    hidden = hidden_states(model, input_ids).flatten(0, 1)
    return cross_entropy(hidden, lm_head(model).weight, next_token_labels(input_ids))


def average(world: World, loss: Tensor, gradients: list[Tensor]) -> Tensor:
    """The loss's mean over the processes; gradients are averaged in place.

    Every window has as many labels, so the mean of the processes' means is the whole batch's.
    """
    mean = loss.detach().clone()
    world.mean_([mean, *gradients])
    return mean


def row(loss: Tensor, norm: float, sparsity: float, target: float, hidden_kept: Tensor) -> Row:
    """What a step reports; `norm` is that of the gradients before clipping."""
    return {
        "loss": float(loss),
        "sparsity": sparsity,
        "target": target,
        "hidden_kept": float(hidden_kept),
        "gradient_norm": norm,
    }


def gradient(leaf: Tensor) -> Tensor:
    """A leaf's gradient; zeros where the loss did not depend on it."""
    return leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
