"""Whole layers dropped by how little they change the residual stream: ShortGPT and PruneMe."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from tvaprune.architecture.parameter_counts import dense_decoder_parameters, kept_decoder_parameters
from tvaprune.architecture.topology import AXES, Axis, Topology, decoder, final_norm, layer_modules
from tvaprune.baselines.activation_scores import magnitude_scores
from tvaprune.baselines.allocation import make_scores_match_mask, percentiles
from tvaprune.masks.masks import Masks
from tvaprune.masks.projection import keep_best

AXES_OF_LAYERS: tuple[Axis, ...] = ("intermediate", "kv_heads")


def depth(
    model: nn.Module,
    topology: Topology,
    input_ids: Tensor,
    target_sparsity: float,
    contiguous: bool = False,
    progress: bool = True,
) -> Masks:
    """Drop the layers whose input and output are the most alike, whole.

    contiguous False: the lowest block influence, 1 - E[cos(x_l, x_l+1)] (ShortGPT, Men et al. 2024).
    contiguous True: the n adjacent layers with the least angular distance arccos(cos(x_l, x_l+n)) / π between what
    enters and what leaves them (PruneMe, Gromov et al. 2024).

    Departures: n is the first count of layers at or past the target, and the least similar of them gives units back
    until the budget is met: as few key-value heads as leave the rest to intermediate units, the largest by
    magnitude, so the budget is exact to one intermediate unit. Angular distances are averaged over all tokens, where
    Gromov et al. take each sequence's last.
    """
    count = math.ceil(round(target_sparsity * topology.layers, 9))
    influence, angles = similarities(model, topology, input_ids, count, progress)
    if contiguous and count:
        first = int(angles.argmin())
        dropped = sorted(range(first, first + count), key=lambda index: (float(influence[index]), index))
    else:
        dropped = torch.sort(influence, stable=True).indices[:count].tolist()
    magnitudes = magnitude_scores(model, topology, AXES_OF_LAYERS)
    keep = {axis: torch.ones(topology.gate_shape(axis), dtype=torch.bool) for axis in AXES}
    for axis in AXES_OF_LAYERS:
        keep[axis][dropped] = False
    if dropped:
        _give_back(topology, keep, dropped[-1], {axis: magnitudes[axis][dropped[-1]].cpu() for axis in AXES_OF_LAYERS},
                   target_sparsity)  # fmt: skip
    # Layers in order of influence, a level each, dropped ones below 0; magnitude orders the units within a layer.
    kept = [index for index in torch.sort(influence, stable=True).indices.tolist() if index not in dropped]
    level = torch.empty(topology.layers)
    level[dropped + kept] = torch.arange(topology.layers) - float(len(dropped))
    score = {axis: level[:, None] + percentiles(magnitudes[axis]).cpu() for axis in AXES_OF_LAYERS}
    ones = Masks.dense(topology)
    return make_scores_match_mask(Masks(keep, {**ones.score, **score}), AXES_OF_LAYERS)


@torch.no_grad()
def similarities(
    model: nn.Module, topology: Topology, input_ids: Tensor, block: int, progress: bool = True
) -> tuple[Tensor, Tensor]:
    """How much layers change the residual stream, means over all tokens.

    Args:
        block: layers in a contiguous block; 0 = none.

    Returns:
        block influence, float64 [layers], and the angular distance over π of each block by its first layer,
        float64 [layers - block + 1]; both on the CPU.
    """
    device = next(model.parameters()).device
    stream: list[Tensor] = []

    def keep(_: nn.Module, args: Any) -> None:
        stream.append(args[0].detach().flatten(0, 1).float())

    norms = [layer.input_norm for layer in layer_modules(model)] + [final_norm(model)]
    handles = [norm.register_forward_pre_hook(keep) for norm in norms]
    influence = torch.zeros(topology.layers, dtype=torch.float64)
    angles = torch.zeros(topology.layers - block + 1, dtype=torch.float64)
    try:
        for window in tqdm(input_ids.unbind(), desc="similarities", disable=not progress):
            stream.clear()
            decoder(model)(input_ids=window[None].long().to(device), use_cache=False)
            for index in range(topology.layers):
                cosine = F.cosine_similarity(stream[index], stream[index + 1], dim=-1)
                influence[index] += float(1 - cosine.double().mean())
            for index in range(len(angles)):
                cosine = F.cosine_similarity(stream[index], stream[index + block], dim=-1).double()
                angles[index] += float(cosine.clamp(-1, 1).arccos().mean()) / math.pi
    finally:
        for handle in handles:
            handle.remove()
    return influence / len(input_ids), angles / len(input_ids)


def _give_back(
    topology: Topology, keep: dict[Axis, Tensor], layer: int, scores: dict[Axis, Tensor], target_sparsity: float
) -> None:
    """Return units to one dropped layer, in place, until the next would break the budget."""
    budget = (1 - target_sparsity) * dense_decoder_parameters(topology)

    def parameters(heads: int, units: int) -> int:
        keep["kv_heads"][layer] = keep_best(scores["kv_heads"], heads)
        keep["intermediate"][layer] = keep_best(scores["intermediate"], units)
        return kept_decoder_parameters(topology, keep)

    best = (-1, 0, 0)
    for heads in range(topology.kv_heads + 1):
        low, high = 0, topology.intermediate
        if parameters(heads, 0) > budget:
            break
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if parameters(heads, middle) <= budget else (low, middle - 1)
        if parameters(heads, low) > best[0]:
            best = (parameters(heads, low), heads, low)
        if low < topology.intermediate:
            break
    parameters(best[1], best[2])
