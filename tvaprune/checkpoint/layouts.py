"""What a pruned checkpoint looks like on disk: its config and the shapes of its tensors.

uneven   each layer as wide as its mask says; carries its own modeling file
uniform  every layer alike (adapt_dimensions chooses such masks); the base family's own config
padded   uneven masks, zeros up to the widest layer; the base family's own config
"""

import json
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tvaprune.architecture.topology import (
    EMBEDDING,
    HEAD,
    ROTARY_FREQUENCIES,
    LayerWidths,
    Topology,
    bias_names,
    cut,
)
from tvaprune.checkpoint.fold import can_stay_tied
from tvaprune.checkpoint.tensor_files import TensorInfo
from tvaprune.masks.masks import Masks
from tvaprune.masks.update import WeightUpdate
from tvaprune.options.choices import Layout


@dataclass(frozen=True)
class Plan:
    """What compaction will write."""

    topology: Topology  # of the dense model
    config: dict[str, Any]  # the content of config.json
    tensors: dict[str, TensorInfo]  # by name, in the order of writing
    stay_tied: bool  # embedding and head are one matrix, before and after
    untied: bool  # they were one, and are two now: the head is cut from the embedding


def dense_tensors(config: PreTrainedConfig) -> dict[str, TensorInfo]:
    """The tensors of a stock model of this config, from the meta device: nothing is allocated."""
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    dtype = getattr(config, "dtype", None) or torch.float32
    return {
        name: TensorInfo(tuple(tensor.shape), dtype)
        for name, tensor in state.items()
        if not (name == HEAD and config.tie_word_embeddings)
    }


def plan(
    config: PreTrainedConfig,
    dense: dict[str, TensorInfo],
    masks: Masks,
    update: WeightUpdate,
    layout: Layout = "uneven",
) -> Plan:
    """Decide what a dense model becomes: the config, and the tensors' names, shapes and order. No weight is read.

    Raises:
        ValueError: masks that keep no hidden dimension, or sizes or biases that the layout's config does not accept.
    """
    topology, tied = Topology.of(config), bool(config.tie_word_embeddings)
    sizes = _sizes_on_disk(topology, masks, layout)
    stay_tied = tied and can_stay_tied(masks, update)
    if update.mean_input:
        check_biases(config.model_type, layout)
    describe = _uneven_config if layout == "uneven" else _stock_config
    written = describe(config, sizes, stay_tied, bool(update.mean_input))
    sources = {name: info for name, info in dense.items() if not name.endswith(ROTARY_FREQUENCIES)}
    if tied:
        sources.pop(HEAD, None)
        if not stay_tied:
            sources[HEAD] = sources[EMBEDDING]
    if update.mean_input:
        # FLAP's biases are on o_proj and down_proj; a stock config then expects biases on all of a block's projections.
        dtype = next(iter(dense.values())).dtype
        for layer in range(topology.layers):
            for name in bias_names(layer, outputs_only=layout == "uneven"):
                sources.setdefault(name, TensorInfo((0,), dtype))
    if layout == "uneven":
        sources = {name: info for name, info in sources.items() if not _of_an_empty_block(name, sizes)}
    tensors = {name: TensorInfo(_shape(topology, name, info, sizes), info.dtype) for name, info in sources.items()}
    return Plan(topology, written, tensors, stay_tied, tied and not stay_tied)


def _sizes_on_disk(topology: Topology, masks: Masks, layout: Layout) -> LayerWidths:
    """The masks' widths; where every layer has the same config, each as wide as the widest.

    Padding adds heads where the config does not take the widest layer's number with the hidden width.
    """
    widths = masks.widths()
    if not widths["hidden"]:
        raise ValueError("masks: no hidden dimension is kept, so there is no model left")
    sizes = LayerWidths.of_counts(widths)
    if layout == "uneven":
        return sizes
    for axis, counts in (("kv_heads", sizes.kv_heads), ("intermediate", sizes.intermediate)):
        if layout == "uniform" and len(set(counts)) > 1:
            raise ValueError(
                f"compact.layout = uniform, but the masks keep {min(counts)} to {max(counts)} of {axis}; run "
                "adapt_dimensions with the same layout, or use padded"
            )
    intermediate, kv_heads = (max(1, *counts) for counts in sizes[1:])
    if layout == "padded":
        kv_heads = topology.stock_heads(sizes.hidden, kv_heads)
    return LayerWidths(sizes.hidden, [intermediate] * topology.layers, [kv_heads] * topology.layers)


def _shape(topology: Topology, name: str, info: TensorInfo, sizes: LayerWidths) -> tuple[int, ...]:
    where = cut(name)
    layer = where.layer or 0  # tensors outside of the layers count hidden dimensions only
    kv_heads = sizes.kv_heads[layer]
    lengths = {"hidden": sizes.hidden, "intermediate": sizes.intermediate[layer]}
    lengths |= {"query": kv_heads * topology.query_rows, "kv": kv_heads * topology.head_dim}
    return tuple(
        length if units is None else lengths[units] for length, units in zip(info.shape, where.dims, strict=True)
    )


def _of_an_empty_block(name: str, sizes: LayerWidths) -> bool:
    """Whether a tensor belongs to a block that lost every unit."""
    where = cut(name)
    counts = {"attention": sizes.kv_heads, "mlp": sizes.intermediate}.get(where.block or "")
    return counts is not None and where.layer is not None and not counts[where.layer]


def _as_json(config: PreTrainedConfig) -> dict[str, Any]:
    left_out = ("_name_or_path", "transformers_version")
    return {key: value for key, value in json.loads(config.to_json_string()).items() if key not in left_out}


def _uneven_config(config: PreTrainedConfig, sizes: LayerWidths, tied: bool, projection_bias: bool) -> dict[str, Any]:
    """The config of `modeling_tvaprune.py`."""
    base = _as_json(config) | {"tie_word_embeddings": tied}
    base.pop("architectures", None)
    carried = {key: base.pop(key) for key in ("dtype",) if key in base}
    carried |= {key: base[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in base}
    return {
        **carried,
        "architectures": ["TvaPruneForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_tvaprune.TvaPruneConfig",
            "AutoModel": "modeling_tvaprune.TvaPruneModel",
            "AutoModelForCausalLM": "modeling_tvaprune.TvaPruneForCausalLM",
        },
        "model_type": "tvaprune",
        "base_model_type": config.model_type,
        "hidden_size": sizes.hidden,
        "intermediate_sizes": sizes.intermediate,
        "kv_head_counts": sizes.kv_heads,
        "projection_bias": projection_bias,
        "tie_word_embeddings": tied,
        "base_config": base,
    }


def _stock_config(config: PreTrainedConfig, sizes: LayerWidths, tied: bool, projection_bias: bool) -> dict[str, Any]:
    """The sizes in the base family's own config, head_dim explicit; ValueError where it does not accept them."""
    topology, kv_heads = Topology.of(config), sizes.kv_heads[0]
    heads = kv_heads * topology.group_size
    if sizes.hidden % topology.hidden_divisor(kv_heads):
        raise ValueError(
            f"a {config.model_type} config does not accept a hidden_size of {sizes.hidden} with {heads} heads: it is "
            "not a multiple. Run adapt_dimensions with the same compact.layout, or use the layout uneven"
        )
    return {
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]],
        **_as_json(config),
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate[0],
        "num_key_value_heads": kv_heads,
        "num_attention_heads": heads,
        "head_dim": topology.head_dim,
        "tie_word_embeddings": tied,
        **({"attention_bias": True, "mlp_bias": True} if projection_bias else {}),
        **_older_rope(config),
    }


def check_biases(family: str, layout: Layout) -> None:
    """Raise a ValueError where a layout's config has no place for FLAP's biases on o_proj and down_proj."""
    if layout != "uneven" and family != "llama":
        raise ValueError(
            f"learn_masks.flap.bias = true with compact.layout = {layout}: a {family} config does not support FLAP's "
            "biases; set learn_masks.flap.bias to false, or use the layout uneven"
        )


def _older_rope(config: PreTrainedConfig) -> dict[str, Any]:
    """The rotary parameters under the names that transformers before 5, and tools of that time, read them by.

    They do not know `rope_parameters`, and would compute with their defaults instead.
    """
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    theta, kind = parameters.pop("rope_theta", None), parameters.get("rope_type", "default")
    older: dict[str, Any] = {} if theta is None else {"rope_theta": theta}
    return older if kind == "default" else older | {"rope_scaling": parameters}
