"""Scores from weights and activations, without gradients: random, magnitude, Wanda-sp, FLAP.

All score the inputs j of `down_proj` (intermediate units) and of `o_proj`, those of a key-value head pooled over
head_dim and the query heads of its group.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from tvaprune.architecture.topology import Axis, Topology, cut, layer_modules
from tvaprune.baselines.activations import InputStatistics, Projection, input_statistics
from tvaprune.baselines.allocation import Scores, allocate_global, allocate_uniform
from tvaprune.masks.masks import Masks

_AXIS_OF: dict[Projection, Axis] = {"o_proj": "kv_heads", "down_proj": "intermediate"}


def random(topology: Topology, target_sparsity: float, axes: tuple[Axis, ...], seed: int) -> Masks:
    """Uniform noise, the same share in every layer: the floor that any score must beat."""
    generator = torch.Generator().manual_seed(seed)
    scores = {axis: torch.rand(topology.gate_shape(axis), generator=generator) for axis in axes}
    return allocate_uniform(topology, scores, target_sparsity, axes)


def magnitude(model: nn.Module, topology: Topology, target_sparsity: float, axes: tuple[Axis, ...]) -> Masks:
    """Σ_i W_ij² of what reads the unit; a residual dimension takes every weight it owns, by `topology.cut`.

    Han et al. 2015 by units (Li et al. 2017), the same share in every layer.
    """
    return allocate_uniform(topology, magnitude_scores(model, topology, axes), target_sparsity, axes)


@torch.no_grad()
def magnitude_scores(model: nn.Module, topology: Topology, axes: tuple[Axis, ...]) -> Scores:
    """float32 per axis in play, shapes of `Topology.gate_shape`, >= 0."""
    per_input: dict[Projection, Tensor] = {
        projection: torch.stack([w.float().square().sum(0) for w in weights])
        for projection, weights in _weights(model).items()
    }
    scores = _per_unit(topology, per_input, axes)
    if "hidden" in axes:
        total = torch.zeros(topology.hidden, device=per_input["o_proj"].device)
        # A tied head is one parameter with the embedding, and is listed once.
        for name, parameter in model.named_parameters():
            for dim, units in enumerate(cut(name).dims):
                if units == "hidden":
                    total += parameter.float().square().movedim(dim, 0).reshape(topology.hidden, -1).sum(1)
        scores["hidden"] = total
    return scores


def wanda_sp(
    model: nn.Module,
    topology: Topology,
    input_ids: Tensor,
    target_sparsity: float,
    axes: tuple[Axis, ...],
    progress: bool = True,
) -> Masks:
    """Σ_i abs(W_ij) · ‖X_j‖₂, the same share in every layer.

    Wanda (Sun et al., ICLR 2024), structured as Wanda-sp in An et al. (AAAI 2024).
    """
    statistics = input_statistics(model, topology, input_ids, progress)
    scores = wanda_scores(model, topology, statistics, axes)
    return allocate_uniform(topology, scores, target_sparsity, axes)


@torch.no_grad()
def wanda_scores(
    model: nn.Module, topology: Topology, statistics: dict[Projection, InputStatistics], axes: tuple[Axis, ...]
) -> Scores:
    """float32 per axis in play (intermediate, kv_heads), >= 0."""
    per_input: dict[Projection, Tensor] = {
        projection: torch.stack([w.float().abs().sum(0) for w in weights]) * statistics[projection].norm.float()
        for projection, weights in _weights(model).items()
    }
    return _per_unit(topology, per_input, axes)


def flap(
    model: nn.Module,
    topology: Topology,
    input_ids: Tensor,
    target_sparsity: float,
    axes: tuple[Axis, ...],
    allocation: Literal["adaptive", "uniform"] = "adaptive",
    bias: bool = True,
    progress: bool = True,
) -> tuple[Masks, dict[str, Tensor]]:
    """Var(X_j) · ‖W_:,j‖², z-scored per layer, one threshold over all layers and both axes (An et al., AAAI 2024).

    The published AL-AM structure with the WIFV metric: every input's score is standardised over its layer's, heads
    then take the mean over theirs, and the budget is counted in parameters. Dropped inputs are replaced by their mean:
    b = W · (mean(X) ⊙ (1 - m)) on o_proj and down_proj.

    Departures: the variance is that of all tokens together, where the published running update is scaled by the tokens
    of a window, which standardising undoes; heads are pooled over whole groups.

    Args:
        allocation: "uniform" keeps the same share in every layer (the published UL-UM).
        bias: compensate for the dropped inputs' means.

    Raises:
        ValueError: with `bias`, the model's projections have biases of their own, which a compact model would lose.
    """
    if bias and (topology.output_bias or topology.mlp_bias):
        raise ValueError(
            "learn_masks: flap's bias takes the place of o_proj's and down_proj's, and this model has them; "
            "set the flap bias option to false"
        )
    statistics = input_statistics(model, topology, input_ids, progress)
    scores = flap_scores(model, topology, statistics, axes)
    allocate = allocate_global if allocation == "adaptive" else allocate_uniform
    masks = allocate(topology, scores, target_sparsity, axes)
    if not bias:
        return masks, {}
    return masks, _mean_biases(model, topology, statistics, masks)


@torch.no_grad()
def flap_scores(
    model: nn.Module, topology: Topology, statistics: dict[Projection, InputStatistics], axes: tuple[Axis, ...]
) -> Scores:
    """float32 per axis in play (intermediate, kv_heads), mean 0 over a layer."""
    per_input: dict[Projection, Tensor] = {}
    for projection, weights in _weights(model).items():
        columns = torch.stack([w.double().square().sum(0) for w in weights])
        metric = statistics[projection].variance * columns
        per_input[projection] = (metric - metric.mean(-1, keepdim=True)) / metric.std(-1, keepdim=True)
    scores = _per_unit(topology, per_input, axes)
    if "kv_heads" in scores:
        scores["kv_heads"] = scores["kv_heads"] / topology.query_rows
    return {axis: score.float() for axis, score in scores.items()}


@torch.no_grad()
def _mean_biases(
    model: nn.Module, topology: Topology, statistics: dict[Projection, InputStatistics], masks: Masks
) -> dict[str, Tensor]:
    """b = W · (mean(X) ⊙ (1 - m)) for every projection that lost inputs: float32 [hidden] by its name, on the CPU."""
    names = {module: name for name, module in model.named_modules()}
    biases = {}
    for index, layer in enumerate(layer_modules(model)):
        heads = masks.keep["kv_heads"][index].repeat_interleave(topology.query_rows)
        places: tuple[tuple[Projection, nn.Linear, Tensor], ...] = (
            ("o_proj", layer.o_proj, heads),
            ("down_proj", layer.down_proj, masks.keep["intermediate"][index]),
        )
        for projection, module, keep in places:
            if not keep.all():
                lost = statistics[projection].mean[index].masked_fill(keep.to(module.weight.device), 0)
                biases[names[module]] = (module.weight.double() @ lost).float().cpu()
    return biases


def _weights(model: nn.Module) -> dict[Projection, list[Tensor]]:
    """The weights [hidden, inputs] that read the units, layers in order."""
    layers = list(layer_modules(model))
    return {
        "o_proj": [layer.o_proj.weight.detach() for layer in layers],
        "down_proj": [layer.down_proj.weight.detach() for layer in layers],
    }


def _per_unit(topology: Topology, per_input: dict[Projection, Tensor], axes: tuple[Axis, ...]) -> Scores:
    """Sum inputs into units: [layers, inputs] by projection to [layers, units] by axis in play."""
    scores: Scores = {}
    for projection, values in per_input.items():
        if _AXIS_OF[projection] in axes:
            units = topology.width(_AXIS_OF[projection])
            scores[_AXIS_OF[projection]] = values.view(topology.layers, units, -1).sum(-1)
    return scores
