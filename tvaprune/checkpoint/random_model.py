"""Models of given widths with random weights: their speed is that of trained ones."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.initialization import no_init_weights

from tvaprune.architecture.topology import Axis
from tvaprune.checkpoint.modeling_tvaprune import TvaPruneConfig, TvaPruneForCausalLM

# So long a pattern is as good as noise to a processor, and copying it is quicker than drawing.
_PATTERN = 1 << 20
_STANDARD_DEVIATION = 0.02
# Weights start where torch's own allocator would let them start.
_ALIGNMENT = 64


class LayerWidths(NamedTuple):
    """Widths of a model; one intermediate width and one number of key-value heads a layer, 0 = without that block."""

    hidden: int
    intermediate: list[int]
    kv_heads: list[int]

    @classmethod
    def of(cls, widths: Mapping[Axis, Tensor]) -> "LayerWidths":
        """From `Masks.widths()`."""
        return cls(int(widths["hidden"]), widths["intermediate"].tolist(), widths["kv_heads"].tolist())


def random_models(
    config: PreTrainedConfig, widths: list[LayerWidths], dtype: torch.dtype, device: torch.device
) -> list[TvaPruneForCausalLM]:
    """Build the models that compaction to these widths would give, without their training.

    They lie in the same memory, so that together they take no more of it than the largest: what a weight holds
    changes no speed. It is noise and not zeros, with which processors draw less power.

    Args:
        config: the dense model's, of a supported family; its number of layers does not count here.
    """
    models = [_skeleton(config, each, dtype, device) for each in widths]
    storage = torch.empty(max(_place(model, None) for model in models), dtype=dtype, device=device)
    noise = torch.randn(_PATTERN, generator=torch.Generator().manual_seed(0)).mul_(_STANDARD_DEVIATION).to(storage)
    for part in storage.split(_PATTERN):
        part.copy_(noise[: len(part)])
    for model in models:
        _place(model, storage)
    return models


def _skeleton(
    config: PreTrainedConfig, widths: LayerWidths, dtype: torch.dtype, device: torch.device
) -> TvaPruneForCausalLM:
    """The model with its memory unwritten."""
    # The dtype twice, as the stack inside is built from the base family's config.
    base = config.to_dict() | {"num_hidden_layers": len(widths.kv_heads), "layer_types": None, "dtype": dtype}
    described = TvaPruneConfig(config.model_type, base, *widths)
    with no_init_weights(), device:
        model: TvaPruneForCausalLM = TvaPruneForCausalLM._from_config(described, dtype=dtype)
    model.tie_weights()
    return model.requires_grad_(False).eval()


def _place(model: TvaPruneForCausalLM, storage: torch.Tensor | None) -> int:
    """Put the weights, but for norms and biases, into the storage if there is one; the numbers that they take."""
    end = 0
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.data.fill_(1)
            continue
        if storage is not None:
            weight.data = storage[end : end + weight.numel()].view_as(weight)
        end += -(-weight.numel() // _ALIGNMENT) * _ALIGNMENT
    return end
