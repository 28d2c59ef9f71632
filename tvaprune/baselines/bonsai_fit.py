"""Bonsai's regression: from sub-models and their perplexities to a coefficient per unit."""

from itertools import product
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

# The published choices (main.py:385-395): the first learning rate is 1 / (units · divisor).
LR_DIVISORS = (100.0, 10.0, 1.0, 0.1)
PENALTIES = (1e2, 1e-4, 0.0)
BATCH_SIZES = (32, 64, 128)
FOLDS = 5
EPOCHS = 50
PATIENCE = 10


class Settings(NamedTuple):
    lr_divisor: float
    penalty: float  # of the L1 norm of the coefficients
    batch_size: int


class Rows(NamedTuple):
    """Some sub-models: which units they keep, and their utilities."""

    kept: Float[Tensor, "submodels units"]  # 0 or 1
    utility: Float[Tensor, " submodels"]


def fit_coefficients(
    kept: Bool[Tensor, "submodels units"], utility: Float[Tensor, " submodels"], generator: torch.Generator
) -> Float[Tensor, " units"]:
    """Linear regression with an L1 penalty, as published; float32, a higher coefficient = keep.

    ldery/Bonsai 2f911d7, lib/scoring_model.py:64-112: least squares plus the penalty by Adam from 0, stopped where
    Kendall's tau between predicted and measured utility is the best; learning rate, penalty and batch size are the
    combination with the best mean tau over 5 folds of adjacent sub-models. Units are many more than sub-models, so
    stopping early matters: a converged fit with so small a penalty would leave most coefficients at 0, without order.

    Departure: orders of the rows are drawn from one generator; the published code seeds numpy anew for each fold.

    Args:
        kept: True = the sub-model has the unit; a mask and its complement are adjacent.
        utility: minus the perplexity of each sub-model.
        generator: orders the rows of each epoch.

    Raises:
        ValueError: fewer sub-models than folds.
    """
    if len(kept) < FOLDS:
        raise ValueError(f"bonsai: {len(kept)} sub-models for {FOLDS} folds")
    rows = Rows(kept.float(), utility.float())
    sizes = sorted({min(size, len(kept)) for size in BATCH_SIZES})
    fold = len(kept) // FOLDS
    best, best_tau = Settings(LR_DIVISORS[0], PENALTIES[0], sizes[0]), float("-inf")
    for settings in (Settings(*values) for values in product(LR_DIVISORS, PENALTIES, sizes)):
        taus = []
        for index in range(FOLDS):
            held_out = torch.zeros(len(kept), dtype=torch.bool)
            held_out[index * fold : (index + 1) * fold] = True
            train, test = (Rows(rows.kept[part], rows.utility[part]) for part in (~held_out, held_out))
            taus.append(_fit(train, test, settings, generator)[1])
        if sum(taus) / FOLDS > best_tau:
            best, best_tau = settings, sum(taus) / FOLDS
    return _fit(rows, rows, best, generator)[0]


def kendall_tau(first: Float[Tensor, " rows"], second: Float[Tensor, " rows"]) -> float:
    """Kendall's tau-b, as in scipy, which takes many times as long on so few rows; NaN where all of one are equal."""
    one, other = ((values[:, None] - values).sign() for values in (first, second))
    return float((one * other).sum() / (one.abs().sum() * other.abs().sum()).sqrt())


def _fit(train: Rows, test: Rows, settings: Settings, generator: torch.Generator) -> tuple[Tensor, float]:
    """Coefficients float32 [units] of the epoch with the best tau on `test`, the latest of equals, and that tau."""
    x, mean = train.kept, train.utility.mean()
    y, test_y = train.utility - mean, test.utility - mean
    weight, bias = torch.zeros(x.shape[1]), torch.zeros(1)
    seen = max(int(x.any(0).sum()), 1)
    optimizer = torch.optim.Adam([weight, bias], lr=1 / (seen * settings.lr_divisor))
    scheduler = ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=3, min_lr=1e-5)
    best_tau, best_weight, since = -1e5, weight, 0
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(y), generator=generator).split(settings.batch_size):
            residual = x[rows] @ weight + bias - y[rows]
            weight.grad = 2 / len(rows) * (residual @ x[rows]) + settings.penalty * weight.sign()
            bias.grad = 2 * residual.mean(0, keepdim=True)
            optimizer.step()
        # NaN, which is not better than anything, where all predictions are equal.
        tau = kendall_tau(test.kept @ weight + bias, test_y)
        if tau >= best_tau:
            best_tau, best_weight, since = tau, weight.clone(), 0
        scheduler.step(tau)
        since += 1
        if since > PATIENCE:
            break
    return best_weight, best_tau
