"""OSSCAR: the structured optimal brain surgeon, layer by layer, with the weights that stay refitted."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tvaprune.baselines.activations import layer_by_layer, readers
from tvaprune.baselines.allocation import percentiles, widths_of_uniform_share
from tvaprune.baselines.problem import Problem
from tvaprune.masks.masks import Masks
from tvaprune.masks.projection import make_scores_match_mask
from tvaprune.masks.update import WeightUpdate, replaced
from tvaprune.options.axes import Axis
from tvaprune.options.baselines import OsscarOptions


class Refitted(NamedTuple):
    """A matrix that lost some of its inputs."""

    keep: Bool[Tensor, " units"]  # True = keep
    error: Float[Tensor, " units"]  # of a kept unit, if it left next; of dropped ones below 0, rising with the round
    weight: Float[Tensor, "outputs inputs"]  # float64; 0 in the columns of dropped units


@torch.no_grad()
def osscar(problem: Problem, options: OsscarOptions) -> tuple[Masks, WeightUpdate]:
    """min ‖X·Wᵀ - X·W'ᵀ‖² over W' that read fewer units, for o_proj and down_proj; the same share in every layer.

    As published (Meng et al., ICML 2024; mazumder-lab/OSSCAR 0bd7887, opt_prune.py:30-195 with the options of the
    README's command): units leave a matrix in rounds, those with the least error first (`refit`). A layer's two
    matrices are solved from one pass of the whole layer, whose inputs come through the pruned layers before it (175).
    The published calibration is 128 windows of 2,048 tokens of C4. The local search, which the published command
    leaves off, is not here.

    Departures: heads leave as whole groups; the published code is for models without groups (OPT). A dead input, one
    that is always 0, leaves first, and counts toward a round.

    Memory: the hidden states of all windows, and a layer's two matrices of squared inputs in float64.
    """
    topology, model = problem.topology, problem.model
    widths = widths_of_uniform_share(topology, problem.axes, problem.target_sparsity)
    at_once = {"intermediate": options.units_at_once, "kv_heads": options.heads_at_once}
    keep = Masks.dense(topology).keep
    score = {axis: torch.ones(topology.gate_shape(axis)) for axis in problem.axes}
    names = {module: f"{name}.weight" for name, module in model.named_modules()}
    update = WeightUpdate.none(topology)
    with ExitStack() as pruned:
        for index, modules, pass_windows in layer_by_layer(problem):
            matrices = {axis: module for axis, module in readers(modules).items() if axis in problem.axes}
            with _squared_inputs(matrices) as squares:
                pass_windows()
            refitted = {}
            for axis, module in matrices.items():
                units, kept = topology.width(axis), int(widths[axis][index])
                found = refit(module.weight, squares[axis], units, kept, at_once[axis], options.damping)
                keep[axis][index] = found.keep
                score[axis][index] = percentiles(found.error) - (1 - kept / units)
                refitted[names[module]] = found.weight.to(module.weight.dtype)
            pruned.enter_context(replaced(model, WeightUpdate.none(topology, weight=refitted)))
            update.weight.update({name: weight.cpu() for name, weight in refitted.items()})
    return make_scores_match_mask(keep, score), update


def refit(
    weight: Float[Tensor, "outputs inputs"],
    squares: Float[Tensor, "inputs inputs"],
    units: int,
    kept: int,
    at_once: int,
    damping: float,
) -> Refitted:
    """Drop units of equally many consecutive inputs until `kept` are left, and solve for the weights that stay.

    H = XᵀX + damping · mean(diag XᵀX) · I. In each round the units of least error tr(W_S (H⁻¹_SS)⁻¹ W_Sᵀ) / 2 leave,
    where S is a unit's inputs: W -= W_S (H⁻¹_SS)⁻¹ H⁻¹_S:, H⁻¹ -= H⁻¹_:S (H⁻¹_SS)⁻¹ H⁻¹_S:. At the end
    W_K = (W H)_:K (H_KK)⁻¹ of the dense W, where K is what stays (prune_algo.py:40-121). In float64, as published.

    Args:
        squares: XᵀX, summed over tokens.
        at_once: units in a round; rounds are as equal as they can be, and the first have more (65-73).
        damping: added to the diagonal, as a share of its mean.
    """
    dense = weight.double().masked_fill(squares.diagonal() == 0, 0)
    H = squares.double() + damping * squares.diagonal().mean() * torch.eye(len(squares), device=squares.device)
    W, inverse = dense.clone(), torch.linalg.inv(H)
    of_unit = torch.arange(len(H), device=H.device).view(units, -1)
    left = torch.ones(units, dtype=torch.bool, device=H.device)
    error = torch.zeros(units, dtype=torch.float64, device=H.device)
    for count in _rounds(units - kept, at_once):
        errors = torch.full_like(error, torch.inf)
        errors[left] = _errors(W, inverse, of_unit[left])
        leaving = errors.argsort(stable=True)[:count]
        error[leaving] = torch.arange(count).to(error) - left.sum()  # below those that leave later
        left[leaving] = False
        S = of_unit[leaving].flatten()
        onto_others = torch.linalg.solve(inverse[S[:, None], S], inverse[S])
        W -= W[:, S] @ onto_others
        inverse -= inverse[:, S] @ onto_others
        W[:, S] = 0
        inverse[S] = 0
        inverse[:, S] = 0
    if kept:
        error[left] = _errors(W, inverse, of_unit[left])
    K = of_unit[left].flatten()
    solved = torch.zeros_like(dense)
    solved[:, K] = torch.linalg.solve(H[K[:, None], K], (dense @ H)[:, K].T).T
    return Refitted(left.cpu(), error.float().cpu(), solved)


def _rounds(units: int, at_once: int) -> list[int]:
    """How many units leave in each round."""
    rounds = max(1, units // at_once)
    return [units // rounds + (index < units % rounds) for index in range(rounds)] if units else []


def _errors(
    weight: Float[Tensor, "outputs inputs"], inverse: Float[Tensor, "inputs inputs"], of_unit: Int[Tensor, "units each"]
) -> Float[Tensor, " units"]:
    """tr(W_S (H⁻¹_SS)⁻¹ W_Sᵀ) / 2 of each unit."""
    own = inverse[of_unit[:, :, None], of_unit[:, None]]
    columns = weight.T[of_unit]
    return (columns * torch.linalg.solve(own, columns)).sum((1, 2)) / 2


@contextmanager
def _squared_inputs(modules: dict[Axis, nn.Linear]) -> Iterator[dict[Axis, Float[Tensor, "inputs inputs"]]]:
    """XᵀX of what enters each module while the context lasts: products in float32, sums over windows in float64."""
    squares: dict[Axis, Tensor] = {}

    def add(axis: Axis) -> Any:
        def hook(_: nn.Module, args: Any) -> None:
            x = args[0].flatten(0, -2).float()
            squares[axis] += x.T @ x

        return hook

    with ExitStack() as hooks:
        for axis, module in modules.items():
            size, device = module.in_features, module.weight.device
            squares[axis] = torch.zeros(size, size, dtype=torch.float64, device=device)
            hooks.enter_context(module.register_forward_pre_hook(add(axis)))
        yield squares
