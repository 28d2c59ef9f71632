"""How training is held to the target sparsity: an exact budget at every step, or the paper's Lagrangian."""

from typing import NamedTuple

import torch
from torch import Tensor

from tvaprune.architecture.parameter_counts import decoder_parameters, dense_decoder_parameters, unit_costs
from tvaprune.architecture.topology import AXES, Axis, Topology
from tvaprune.masks.projection import keep_above, solve_threshold


def cubic_ramp(progress: float, target: float, ramp: float) -> float:
    """The scheduled sparsity at a share of the run, 0 to 1: rises fast, then slowly (Zhu and Gupta 2017).

    Args:
        progress: share of the steps done, 0 to 1.
        target: final sparsity.
        ramp: share of the steps over which it rises; 0 = at once.
    """
    rising = min(progress / ramp, 1.0) if ramp > 0 else 1.0
    return target * (1 - (1 - rising) ** 3)


def linear_ramp(progress: float, target: float, ramp: float) -> float:
    """As `cubic_ramp`, but linear, as in CoFi and the paper."""
    return target * min(progress / ramp, 1.0) if ramp > 0 else target


class HardGates(NamedTuple):
    """Gates of one step under the budget.

    Attributes:
        keep: bool per axis; exactly the scheduled parameters.
        surrogate: derivative of each 0/1 gate with respect to its log_alpha, slope · s · (1 - s), float32.
        threshold: log_alpha above which units are kept.
    """

    keep: dict[Axis, Tensor]
    surrogate: dict[Axis, Tensor]
    threshold: float


def hard_gates_under_budget(
    topology: Topology, scores: dict[Axis, Tensor], target_sparsity: float, slope: float, minimum_hidden: int
) -> HardGates:
    """0/1 gates whose kept parameters meet the sparsity, with a straight-through sigmoid around the threshold."""
    threshold = solve_threshold(topology, scores, target_sparsity, minimum_hidden)
    keep = keep_above(scores, threshold, minimum_hidden)
    surrogate = {}
    for axis in AXES:
        soft = torch.sigmoid(slope * (scores[axis] - threshold))
        surrogate[axis] = slope * soft * (1 - soft)
    return HardGates(keep, surrogate, threshold)


def tangent_to_budget(
    topology: Topology, hard: HardGates, gate_gradient: dict[Axis, Tensor]
) -> tuple[dict[Axis, Tensor], float]:
    """The gradient on log_alpha, projected onto the tangent of the budget.

    With g the gradient on the gates and c the parameters each unit owns, both seen through the surrogate, the
    component of g along c is removed: g - lambda·c with lambda = <g, c> / <c, c>. What is left says which units
    are worth more or less than the parameters they cost, at the going price lambda, across all three axes; the
    sparsity itself has no say in it, so it can neither overshoot nor lag.

    Args:
        gate_gradient: d loss / d gate, float32 per axis.

    Returns:
        float32 per axis, and lambda (loss per parameter).
    """
    counts = (hard.keep["hidden"].sum(), hard.keep["intermediate"].sum(-1), hard.keep["kv_heads"].sum(-1))
    costs = unit_costs(topology, *counts)
    along: dict[Axis, Tensor] = {
        "hidden": costs.hidden.float() * hard.surrogate["hidden"],
        "intermediate": costs.intermediate.float()[:, None] * hard.surrogate["intermediate"],
        "kv_heads": costs.kv_heads.float()[:, None] * hard.surrogate["kv_heads"],
    }
    across = {axis: gate_gradient[axis] * hard.surrogate[axis] for axis in AXES}
    product = sum(float((across[axis] * along[axis]).sum()) for axis in AXES)
    norm = sum(float(along[axis].square().sum()) for axis in AXES)
    price = product / norm if norm > 0 else 0.0
    return {axis: across[axis] - price * along[axis] for axis in AXES}, price


class Lagrangian(NamedTuple):
    """The paper's penalty at one step.

    Attributes:
        penalty: lambda_1 · (s - t) + lambda_2 · (s - t)², [] with gradients.
        sparsity: expected sparsity s, [].
    """

    penalty: Tensor
    sparsity: Tensor


def lagrangian(topology: Topology, soft_keep: dict[Axis, Tensor], scheduled: float, multipliers: Tensor) -> Lagrangian:
    """CoFi's Lagrangian (Xia et al., ACL 2022; TVA-Prune section 3.1) on the expected decoder parameters.

    Args:
        soft_keep: keep probabilities per axis, with gradients.
        scheduled: target sparsity of this step.
        multipliers: lambda_1 and lambda_2, [2]; the caller ascends them.
    """
    counts = (soft_keep["hidden"].sum(), soft_keep["intermediate"].sum(-1), soft_keep["kv_heads"].sum(-1))
    expected = 1 - decoder_parameters(topology, *counts) / dense_decoder_parameters(topology)
    gap = expected - scheduled
    return Lagrangian(multipliers[0] * gap + multipliers[1] * gap.square(), expected)
