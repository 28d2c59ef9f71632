"""What a pruned checkpoint looks like on disk: its config and the shapes of its tensors.

uneven   each layer as wide as its mask says; carries its own modeling file
uniform  every layer alike (adapt_dimensions sees to it); the base family's own config
padded   uneven masks, zeros up to the widest layer; the base family's own config
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tvaprune.architecture.topology import Topology, Units, cut
from tvaprune.checkpoint.fold import can_stay_tied
from tvaprune.checkpoint.tensor_files import TensorInfo
from tvaprune.masks.adapt import Layout
from tvaprune.masks.masks import Masks
from tvaprune.masks.update import WeightUpdate

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Old Llama checkpoints hold the rotary frequencies, which every version since computes.
_IGNORED = "rotary_emb.inv_freq"


@dataclass(frozen=True)
class Plan:
    """What compaction will write.

    Attributes:
        config: the content of config.json.
        tensors: shapes and dtypes by name, in the order of writing.
        stay_tied: embedding and head are one matrix, before and after.
        untied: they were one, and are two now.
        kv_heads: key-value heads per layer on disk, padding included; 0 = no attention block.
        intermediate: units per layer on disk, padding included; 0 = no MLP.
    """

    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    stay_tied: bool
    untied: bool
    kv_heads: list[int]
    intermediate: list[int]

    def source_of(self, name: str) -> str:
        """The dense tensor that a tensor is cut from: a head that was the embedding comes from there."""
        return EMBEDDING if name == HEAD and self.untied else name

    def rows(self, topology: Topology, units: Units, layer: int | None, hidden: int) -> int:
        """Length on disk of a dimension that counts `units`."""
        if units == "hidden":
            return hidden
        assert layer is not None
        if units == "intermediate":
            return self.intermediate[layer]
        return self.kv_heads[layer] * (topology.query_rows if units == "query" else topology.head_dim)


def dense_tensors(config: PreTrainedConfig) -> dict[str, TensorInfo]:
    """The tensors of a stock model of this config, from the meta device: nothing is allocated."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = {HEAD} if config.tie_word_embeddings else set()
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    dtype = getattr(config, "dtype", None) or torch.float32
    return {name: TensorInfo(tuple(tensor.shape), dtype) for name, tensor in state.items()}


def plan(
    config: PreTrainedConfig,
    dense: dict[str, TensorInfo],
    masks: Masks,
    update: WeightUpdate,
    layout: Layout = "uneven",
) -> Plan:
    """Decide the config, the names, the shapes and the order of the tensors, before anything is read.

    Args:
        config: the dense model's.
        dense: its tensors, from the headers of its files or from `dense_tensors`.

    Raises:
        ValueError: masks that leave nothing, or that the layout's config does not take.
    """
    topology = Topology.of(config)
    widths = masks.widths()
    hidden = int(widths["hidden"])
    if not hidden:
        raise ValueError("masks: no hidden dimension is kept, so there is no model left")
    kv_heads, intermediate = widths["kv_heads"].tolist(), widths["intermediate"].tolist()
    if layout != "uneven":
        kv_heads, intermediate = _alike("kv_heads", kv_heads, layout), _alike("intermediate", intermediate, layout)
    tied = bool(config.tie_word_embeddings)
    stay_tied = tied and can_stay_tied(masks, update)
    result = Plan({}, {}, stay_tied, tied and not stay_tied, kv_heads, intermediate)
    if layout == "uneven":
        result.config.update(_uneven_config(config, result, hidden, bool(update.bias)))
    else:
        result.config.update(_stock_config(config, topology, result, hidden, bool(update.bias)))
    for name, info in dense.items():
        if (name == HEAD and tied) or name.endswith(_IGNORED):
            continue
        shape = _planned_shape(topology, name, info, result, hidden, whole_blocks=layout == "uneven")
        if shape is not None:
            result.tensors[name] = TensorInfo(shape, info.dtype)
            if name == EMBEDDING and result.untied:
                result.tensors[HEAD] = TensorInfo(shape, info.dtype)
    if update.bias:
        dtype = next(iter(dense.values())).dtype
        result.tensors.update(_biases(topology, result, hidden, dtype, stock=layout != "uneven"))
    return result


def is_uniform(counts: list[int]) -> bool:
    return len(set(counts)) == 1


def _alike(axis: str, counts: list[int], layout: Layout) -> list[int]:
    """The same count for every layer: the layers' own where they agree, else the widest."""
    if layout == "uniform" and not is_uniform(counts):
        raise ValueError(
            f"compact.layout = uniform, but the masks keep {min(counts)} to {max(counts)} of {axis}; run "
            "adapt_dimensions with the same layout, or use padded"
        )
    return [max(1, *counts)] * len(counts)


def _planned_shape(
    topology: Topology, name: str, info: TensorInfo, planned: Plan, hidden: int, whole_blocks: bool
) -> tuple[int, ...] | None:
    """The shape on disk, or None where the tensor vanishes with its block."""
    where = cut(name)
    if whole_blocks and where.block is not None and where.layer is not None:
        counts = planned.kv_heads if where.block == "attention" else planned.intermediate
        if not counts[where.layer]:
            return None
    return tuple(
        length if units is None else planned.rows(topology, units, where.layer, hidden)
        for length, units in zip(info.shape, where.dims, strict=True)
    )


def _biases(topology: Topology, planned: Plan, hidden: int, dtype: torch.dtype, stock: bool) -> dict[str, TensorInfo]:
    """FLAP's biases on o_proj and down_proj; a stock config then wants biases on all the block's projections."""
    tensors: dict[str, TensorInfo] = {}
    for layer in range(topology.layers):
        named: dict[str, Units] = {"self_attn.o_proj": "hidden", "mlp.down_proj": "hidden"}
        if stock:
            named |= {"self_attn.q_proj": "query", "self_attn.k_proj": "kv", "self_attn.v_proj": "kv"}
            named |= {"mlp.gate_proj": "intermediate", "mlp.up_proj": "intermediate"}
        for projection, units in named.items():
            shape = (planned.rows(topology, units, layer, hidden),)
            tensors[f"model.layers.{layer}.{projection}.bias"] = TensorInfo(shape, dtype)
    return {name: info for name, info in tensors.items() if name not in planned.tensors}


def _as_json(config: PreTrainedConfig) -> dict[str, Any]:
    written = json.loads(config.to_json_string())
    return {key: value for key, value in written.items() if key not in ("_name_or_path", "transformers_version")}


def _uneven_config(config: PreTrainedConfig, planned: Plan, hidden: int, projection_bias: bool) -> dict[str, Any]:
    base = _as_json(config)
    carried = {key: base.pop(key) for key in ("dtype",) if key in base}
    carried |= {key: base[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in base}
    base.pop("architectures", None)
    return {
        **carried,
        "architectures": ["TvaPruneForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_tvaprune.TvaPruneConfig",
            "AutoModelForCausalLM": "modeling_tvaprune.TvaPruneForCausalLM",
        },
        "model_type": "tvaprune",
        "base_model_type": config.model_type,
        "hidden_size": hidden,
        "intermediate_sizes": planned.intermediate,
        "kv_head_counts": planned.kv_heads,
        "projection_bias": projection_bias,
        "tie_word_embeddings": planned.stay_tied,
        "base_config": base | {"tie_word_embeddings": planned.stay_tied},
    }


def _stock_config(
    config: PreTrainedConfig, topology: Topology, planned: Plan, hidden: int, projection_bias: bool
) -> dict[str, Any]:
    """The sizes in the base family's own config, head_dim explicit.

    Raises:
        ValueError: sizes or biases that the family's config has no place for.
    """
    kv_heads = planned.kv_heads[0]
    heads = kv_heads * topology.group_size
    if hidden % topology.hidden_divisor(kv_heads):
        raise ValueError(
            f"a {config.model_type} config takes no hidden_size of {hidden} with {heads} heads: it is not a multiple. "
            "adapt_dimensions chooses a width that is, where it knows compact.layout; or use the layout uneven"
        )
    biases = {"attention_bias": True, "mlp_bias": True} if projection_bias else {}
    if projection_bias and config.model_type != "llama":
        raise ValueError(
            f"a {config.model_type} config has no place for FLAP's biases: set learn_masks.baseline.flap_bias to "
            "false, or use the layout uneven"
        )
    return {
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]],
        **_as_json(config),
        "hidden_size": hidden,
        "intermediate_size": planned.intermediate[0],
        "num_key_value_heads": kv_heads,
        "num_attention_heads": heads,
        "head_dim": topology.head_dim,
        "tie_word_embeddings": planned.stay_tied,
        **biases,
    }


def write_config(planned: Plan, out: Path) -> None:
    """Write config.json, and see that the config class takes it."""
    (out / "config.json").write_text(json.dumps(planned.config, indent=2, allow_nan=False) + "\n")
    kind = planned.config["model_type"]
    if kind in CONFIG_MAPPING:
        AutoConfig.from_pretrained(out)
