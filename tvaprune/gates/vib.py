"""The variational information bottleneck gate (TVA-Prune Eq. 1; VIBNet, Dai et al., ICML 2018).

A unit's activation is multiplied by z ~ N(mu, sigma²). How much the bottleneck lets through is read off
log_alpha = log(mu² / sigma²): higher = keep. The published code stores its negative; here the sign is the
paper's.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from tvaprune.masks.masks import EPSILON


def kl(mu: Float[Tensor, "*units"], log_var: Float[Tensor, "*units"]) -> Float[Tensor, ""]:
    """½ · Σ log(1 + mu² / (sigma² + 1e-8)), summed over units, not averaged over tokens (VIBNet Eq. 6), in nats."""
    return 0.5 * torch.log1p(mu.square() / (log_var.exp() + EPSILON)).sum()


def kl_gradient(mu: Tensor, log_var: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `kl` with respect to mu and log_var, in closed form."""
    variance = log_var.exp()
    noisy = variance + EPSILON
    total = noisy + mu.square()
    return mu / total, -0.5 * mu.square() * variance / (noisy * total)


def soft_keep(log_alpha: Float[Tensor, "*units"], slope: float) -> Float[Tensor, "*units"]:
    """Keep probability sigmoid(slope · log_alpha), for the expected sparsity (section 3.1)."""
    return torch.sigmoid(slope * log_alpha)


def stationary_log_var(mu: Tensor, curvature: Tensor, price: Tensor | float) -> Tensor:
    """The log_var at which noise costs as much loss as it saves KL.

    A noise of variance sigma² costs ½·H·sigma² in expectation, with H the loss's curvature in the gate, and
    the KL pays about -½·price·log sigma² for it. The sum is least at sigma² = price / H. So a bottleneck at
    rest has log_alpha = log(mu²·H / price): the logarithm of the loss that dropping the unit costs to second
    order, per unit of price. With the price a unit's parameter count, importance is per parameter, and one
    threshold serves all axes.

    Args:
        mu: float32 [...].
        curvature: H >= 0, same shape.
        price: > 0, broadcasts to the shape.
    """
    return torch.log(torch.as_tensor(price, dtype=mu.dtype)) - torch.log(curvature + 1e-12) + 0 * mu
