"""Models of given widths with random weights: their speed is that of trained ones."""

import torch
from transformers import PreTrainedConfig
from transformers.initialization import no_init_weights

from tvaprune.architecture.topology import LayerWidths
from tvaprune.checkpoint.modeling_tvaprune import TvaPruneConfig, TvaPruneForCausalLM

_PATTERN = 1 << 20  # a pattern of this length, repeated, is as good as noise to a processor, and faster to make
_STANDARD_DEVIATION = 0.02
_ALIGNMENT = 64  # numbers; weights start at multiples of it, as in torch's own allocator


def random_models(
    config: PreTrainedConfig, widths: list[LayerWidths], dtype: torch.dtype, device: torch.device
) -> list[TvaPruneForCausalLM]:
    """Build models of the shapes that compaction to these widths would give.

    They share one storage, so together they take no more memory than the largest: the values of the weights do not
    change the speed. They are noise and not zeros, with which processors draw less power. The config is the dense
    model's; its number of layers is not used.
    """
    models = [_skeleton(config, each, dtype, device) for each in widths]
    storage = torch.empty(max(_use_storage(model, None) for model in models), dtype=dtype, device=device)
    noise = torch.randn(_PATTERN, generator=torch.Generator().manual_seed(0)).mul_(_STANDARD_DEVIATION).to(storage)
    for part in storage.split(_PATTERN):
        part.copy_(noise[: len(part)])
    for model in models:
        _use_storage(model, storage)
    return models


def _skeleton(
    config: PreTrainedConfig, widths: LayerWidths, dtype: torch.dtype, device: torch.device
) -> TvaPruneForCausalLM:
    """The model with its memory unwritten."""
    base = config.to_dict() | {"num_hidden_layers": len(widths.kv_heads), "layer_types": None}
    described = TvaPruneConfig(config.model_type, base, *widths)
    with no_init_weights(), device:
        model: TvaPruneForCausalLM = TvaPruneForCausalLM._from_config(described, dtype=dtype)
    model.tie_weights()
    return model.requires_grad_(False).eval()


def _use_storage(model: TvaPruneForCausalLM, storage: torch.Tensor | None) -> int:
    """Take the matrices from the storage, if given, and set norms and biases to 1; returns the numbers needed."""
    end = 0
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.data.fill_(1)
            continue
        if storage is not None:
            weight.data = storage[end : end + weight.numel()].view_as(weight)
        end += -(-weight.numel() // _ALIGNMENT) * _ALIGNMENT
    return end
