"""Parameter counts of a pruned decoder: exact for whole units, differentiable for soft counts."""

from functools import cache

import torch
from torch import Tensor

from tvaprune.architecture.topology import Topology
from tvaprune.options.axes import AXES, Axis


def decoder_parameters(topology: Topology, hidden: Tensor, intermediate: Tensor, kv_heads: Tensor) -> Tensor:
    """Parameters of the decoder layers (TVA-Prune section 3.1): without embeddings, head, final norm.

    Sum over layers of 2·head_dim·k·h·(1+G) + 3·m·h + 2·h, and the biases and query/key norms where the family has
    them. Departure from the paper: a layer whose block lost every unit also loses that block's norm, as in the
    compact model, so whole counts are those of the checkpoint to the last parameter.

    The counts of kept units, soft or whole, are [] for hidden, else [layers]. Returns float64 [].
    """
    h, m, k = hidden.double(), intermediate.double(), kv_heads.double()
    has_attention, has_mlp = (k > 0).double(), (m > 0).double()
    d, groups = topology.head_dim, topology.group_size
    attention = 2 * d * k * h * (1 + groups) + has_attention * h
    if topology.attention_bias:
        attention = attention + d * k * (groups + 2)
    if topology.output_bias:
        attention = attention + h
    if topology.qk_norm:
        attention = attention + has_attention * 2 * d
    mlp = 3 * m * h + has_mlp * h
    if topology.mlp_bias:
        mlp = mlp + 2 * m + h
    return (attention + mlp).sum()


def unit_costs(topology: Topology, hidden: Tensor, intermediate: Tensor, kv_heads: Tensor) -> dict[Axis, Tensor]:
    """The parameters that a unit owns at these counts: the derivative of `decoder_parameters` with respect to them.

    Returns float64, to multiply gates of `Topology.gate_shape` with: [] for hidden, else [layers, 1].
    """
    with torch.enable_grad():
        counts = [count.detach().double().requires_grad_() for count in (hidden, intermediate, kv_heads)]
        costs = torch.autograd.grad(decoder_parameters(topology, *counts), counts)
    return {axis: cost[..., None] if cost.dim() else cost for axis, cost in zip(AXES, costs, strict=True)}


@cache
def dense_decoder_parameters(topology: Topology) -> int:
    """Parameters of the decoder layers before pruning."""
    full = {axis: torch.ones(topology.gate_shape(axis), dtype=torch.bool) for axis in AXES}
    return kept_decoder_parameters(topology, full)


def parameter_budget(topology: Topology, target_sparsity: float) -> float:
    """The most parameters that the decoder layers may keep."""
    return (1 - target_sparsity) * dense_decoder_parameters(topology)


@cache
def dense_unit_costs(topology: Topology) -> dict[Axis, Tensor]:
    """The parameters that each unit owns in the model before pruning, as `unit_costs`."""
    every = [torch.tensor(topology.layers * [topology.width(axis)]) for axis in AXES[1:]]
    return unit_costs(topology, torch.tensor(topology.hidden), *every)


def sparsity(topology: Topology, widths: dict[Axis, Tensor]) -> float:
    """Share of the decoder layers' parameters that kept widths (`Masks.widths`) remove, 0 to 1."""
    return 1 - float(decoder_parameters(topology, *(widths[axis] for axis in AXES))) / dense_decoder_parameters(
        topology
    )


def kept_decoder_parameters(topology: Topology, keep: dict[Axis, Tensor]) -> int:
    """Parameters of the decoder layers under keep-masks (bool; True = keep; shapes of `Topology.gate_shape`)."""
    counts = (keep["hidden"].sum(), keep["intermediate"].sum(-1), keep["kv_heads"].sum(-1))
    return round(float(decoder_parameters(topology, *counts)))


def shared_parameters(topology: Topology, hidden: int, vocab_size: int, tied: bool) -> int:
    """Parameters outside the decoder layers: embedding, head (none of its own when tied), final norm."""
    return hidden * (vocab_size * (1 if tied else 2) + 1)
