"""Whole layers dropped by how little they change the residual stream: ShortGPT and PruneMe."""

import math
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from tvaprune.architecture.parameter_counts import kept_decoder_parameters, parameter_budget
from tvaprune.architecture.topology import Topology, final_norm, layer_modules
from tvaprune.baselines.allocation import Keep, Scores, percentiles
from tvaprune.baselines.magnitude import magnitude_scores
from tvaprune.baselines.problem import Problem
from tvaprune.masks.masks import Masks
from tvaprune.masks.projection import keep_best, make_scores_match_mask
from tvaprune.options.axes import UNIT_AXES
from tvaprune.options.baselines import DepthOptions


def depth(problem: Problem, options: DepthOptions) -> Masks:
    """Drop the layers whose input and output are the most alike, whole.

    contiguous False: the lowest block influence, 1 - E[cos(x_l, x_l+1)] (ShortGPT, Men et al. 2024).
    contiguous True: the n adjacent layers with the least angular distance arccos(cos(x_l, x_l+n)) / π between what
    enters and what leaves them (PruneMe, Gromov et al. 2024).

    Departures: n is the first count of layers at or past the target. The least similar of them gets units back up to
    the budget: as few key-value heads as leave the rest to intermediate units, the largest by magnitude, so the
    budget is exact to one intermediate unit. Angular distances are averaged over all tokens, where Gromov et al. take
    each sequence's last.
    """
    topology = problem.topology
    count = math.ceil(round(problem.target_sparsity * topology.layers, 9))
    influence, angles = similarities(problem, count)
    by_influence = torch.sort(influence, stable=True).indices.tolist()
    dropped = by_influence[:count]
    if options.contiguous and count:
        first = int(angles.argmin())
        dropped = [index for index in by_influence if first <= index < first + count]
    scores = magnitude_scores(problem.model, topology, UNIT_AXES)
    keep = Masks.dense(topology).keep
    for axis in UNIT_AXES:
        keep[axis][dropped] = False
    if dropped:
        _give_back(topology, keep, dropped[-1], scores, problem.target_sparsity)
    # Layers in order of influence, a level each, dropped ones below 0; magnitude orders the units within a layer.
    level = torch.empty(topology.layers)
    kept = [index for index in by_influence if index not in dropped]
    level[dropped + kept] = torch.arange(topology.layers) - float(count)
    leveled = {axis: level[:, None] + percentiles(score).cpu() for axis, score in scores.items()}
    return make_scores_match_mask(keep, leveled)


@torch.no_grad()
def similarities(problem: Problem, block: int) -> tuple[Float[Tensor, " layers"], Float[Tensor, " blocks"]]:
    """How much layers change the residual stream, means over all tokens; float64 on the CPU.

    Returns block influence, and the angular distance over π of each contiguous block of `block` layers (0 = none) by
    its first layer, [layers - block + 1].
    """
    stream: list[Tensor] = []

    def collect(_: nn.Module, args: Any) -> None:
        stream.append(args[0].flatten(0, 1).float())

    influence = torch.zeros(problem.topology.layers, dtype=torch.float64)
    angles = torch.zeros(problem.topology.layers - block + 1, dtype=torch.float64)
    with ExitStack() as hooks:
        for norm in [*(layer.input_norm for layer in layer_modules(problem.model)), final_norm(problem.model)]:
            hooks.enter_context(norm.register_forward_pre_hook(collect))
        for window in problem.each_window("similarities"):
            stream.clear()
            problem.forward(window)
            for index in range(len(influence)):
                cosine = F.cosine_similarity(stream[index], stream[index + 1], dim=-1)
                influence[index] += float(1 - cosine.double().mean())
            for index in range(len(angles)):
                cosine = F.cosine_similarity(stream[index], stream[index + block], dim=-1).double()
                angles[index] += float(cosine.clamp(-1, 1).arccos().mean()) / math.pi
    return influence / len(problem.windows), angles / len(problem.windows)


def _give_back(topology: Topology, keep: Keep, layer: int, scores: Scores, target_sparsity: float) -> None:
    """Return units to one dropped layer, in place, until the next would exceed the budget."""
    budget = parameter_budget(topology, target_sparsity)

    def parameters(heads: int, units: int) -> int:
        keep["kv_heads"][layer] = keep_best(scores["kv_heads"][layer].cpu(), heads)
        keep["intermediate"][layer] = keep_best(scores["intermediate"][layer].cpu(), units)
        return kept_decoder_parameters(topology, keep)

    best = (-1, 0, 0)
    for heads in range(topology.kv_heads + 1):
        low, high = 0, topology.intermediate
        if parameters(heads, 0) > budget:
            break
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if parameters(heads, middle) <= budget else (low, middle - 1)
        best = max(best, (parameters(heads, low), heads, low), key=lambda found: found[0])
        if low < topology.intermediate:
            break
    parameters(best[1], best[2])
