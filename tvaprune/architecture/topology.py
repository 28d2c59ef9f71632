"""From the three pruning axes to a model's modules and weights.

The only module that knows the attribute and tensor names of Llama, Mistral, Qwen2 and Qwen3. Those four
share one layout in transformers; what differs (biases, query and key norms) is read from the tensors.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn

from tvaprune.options.axes import Axis

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
# How the names of rotary frequencies end, which old Llama checkpoints hold and every version since computes.
ROTARY_FREQUENCIES = "rotary_emb.inv_freq"

# Where factors may differ from channel to channel: the attention output before o_proj, the outputs of o_proj and of
# down_proj, the output of k_proj. (Before down_proj a gate is a channel already.)
Site = Literal["attention_in", "attention_out", "mlp_out", "keys"]
SITES: tuple[Site, ...] = ("attention_in", "attention_out", "mlp_out", "keys")
# Where a gate multiplies too. `tva` and its ablations train their means per channel here, and not at keys.
GATED_SITES: tuple[Site, ...] = ("attention_in", "attention_out", "mlp_out")

# What one dimension of a weight counts: residual dimensions, intermediate units, all rows of the query heads,
# or all rows of the key (or value) heads.
Units = Literal["hidden", "intermediate", "query", "kv"]
AXIS_OF_UNITS: dict[Units, Axis] = {
    "hidden": "hidden",
    "intermediate": "intermediate",
    "query": "kv_heads",
    "kv": "kv_heads",
}


class UnsupportedModelError(ValueError):
    """The model has a structure that these axes do not describe."""


def check_family(config: Any) -> None:
    """Raise UnsupportedModelError for a model that cannot be pruned, from its transformers config.

    The message says what the model is, and what is supported.
    """
    family, supported = config.model_type, f"supported families: {', '.join(FAMILIES)}"
    if hasattr(config, "base_model_type"):
        raise UnsupportedModelError("the model is pruned already: prune the dense one, with a higher sparsity")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"model_type {family!r} is an encoder-decoder; only decoders can be pruned; {supported}"
        )
    expert_counts = ("num_local_experts", "num_experts", "n_routed_experts")
    if experts := [name for name in expert_counts if getattr(config, name, None)]:
        raise UnsupportedModelError(f"model_type {family!r} is a mixture of experts ({experts[0]}); {supported}")
    if family not in FAMILIES:
        raise UnsupportedModelError(f"model_type {family!r} is not supported; {supported}")
    if family.startswith("qwen") and getattr(config, "use_sliding_window", False):
        raise UnsupportedModelError(
            f"model_type {family!r} with use_sliding_window true is refused: some layers see a window only"
        )


@dataclass(frozen=True)
class Topology:
    """Sizes of a decoder with grouped-query attention."""

    layers: int
    hidden: int  # width of the residual stream
    intermediate: int  # width of the gated MLP
    kv_heads: int  # key-value heads per layer
    group_size: int  # query heads per key-value head (1 for multi-head attention)
    head_dim: int
    attention_bias: bool = False  # q, k and v have biases (Qwen2; Llama by its config)
    output_bias: bool = False  # o_proj has a bias
    mlp_bias: bool = False  # gate, up and down have biases
    qk_norm: bool = False  # each attention block has one RMSNorm over head_dim for queries and one for keys (Qwen3)
    # The family's config refuses a hidden width that is no multiple of its query heads (LlamaConfig does, although
    # head_dim is explicit; the others do not).
    heads_divide_hidden: bool = False

    @classmethod
    def of(cls, config: Any) -> "Topology":
        """The dense model's sizes, from its transformers config or a pruned model's.

        Raises UnsupportedModelError for a family not in FAMILIES.
        """
        family = getattr(config, "base_model_type", config.model_type)
        if family not in FAMILIES:
            raise UnsupportedModelError(f"model_type {family!r}: supported families are {', '.join(FAMILIES)}")
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        bias = bool(getattr(config, "attention_bias", False))
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            kv_heads=kv_heads,
            group_size=heads // kv_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            attention_bias=family == "qwen2" or bias,
            output_bias=bias,
            mlp_bias=bool(getattr(config, "mlp_bias", False)),
            qk_norm=family == "qwen3",
            heads_divide_hidden=family == "llama",
        )

    def width(self, axis: Axis) -> int:
        """Units of one gate vector on the axis."""
        return {"hidden": self.hidden, "intermediate": self.intermediate, "kv_heads": self.kv_heads}[axis]

    def gate_shape(self, axis: Axis) -> tuple[int, ...]:
        """[hidden] for the one vector of the whole model, else [layers, width]."""
        return (self.hidden,) if axis == "hidden" else (self.layers, self.width(axis))

    def site_shape(self, site: Site) -> tuple[int, int]:
        """[layers, channels]."""
        heads = {"attention_in": self.query_rows, "keys": self.head_dim}
        return (self.layers, self.kv_heads * heads[site] if site in heads else self.hidden)

    def hidden_divisor(self, kv_heads: int) -> int:
        """What a hidden width has to be a multiple of for the family's own config to take it."""
        return kv_heads * self.group_size if self.heads_divide_hidden else 1

    def stock_heads(self, hidden: int, kv_heads: int) -> int:
        """The fewest key-value heads, `kv_heads` or more, with which the family's own config takes a hidden width.

        `kv_heads` where none does.
        """
        counts = range(kv_heads, self.kv_heads + 1)
        return next((count for count in counts if hidden % self.hidden_divisor(count) == 0), kv_heads)

    @property
    def query_rows(self) -> int:
        """Rows of q_proj (and columns of o_proj) that belong to one key-value head, contiguous."""
        return self.group_size * self.head_dim


class LayerWidths(NamedTuple):
    """The hidden width, and MLP units and key-value heads of each layer; 0 for an empty block."""

    hidden: int
    intermediate: list[int]
    kv_heads: list[int]

    @classmethod
    def dense(cls, topology: "Topology") -> "LayerWidths":
        """Nothing removed."""
        layers = topology.layers
        return cls(topology.hidden, [topology.intermediate] * layers, [topology.kv_heads] * layers)

    @classmethod
    def of_config(cls, config: Any) -> "LayerWidths":
        """Those of a stock model or of one of the layout uneven."""
        topology = Topology.of(config)
        units = getattr(config, "intermediate_sizes", None) or [topology.intermediate] * topology.layers
        heads = getattr(config, "kv_head_counts", None) or [topology.kv_heads] * topology.layers
        return cls(topology.hidden, list(units), list(heads))

    @classmethod
    def of_counts(cls, kept: Mapping[Axis, Tensor]) -> "LayerWidths":
        """From `Masks.widths()`."""
        return cls(int(kept["hidden"]), kept["intermediate"].tolist(), kept["kv_heads"].tolist())


class LayerModules(NamedTuple):
    """The modules of one decoder layer that gates attach to."""

    input_norm: nn.Module
    attention: nn.Module
    k_proj: nn.Linear
    o_proj: nn.Linear
    post_norm: nn.Module
    mlp: nn.Module
    down_proj: nn.Linear


def decoder(model: nn.Module) -> nn.Module:
    """The model without its language-model head: token ids to normed hidden states."""
    return model.get_submodule("model")


def hidden_states(model: nn.Module, input_ids: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq hidden"]:
    """What lm_head is given: the decoder's output after the final norm, without a cache."""
    return decoder(model)(input_ids=input_ids, use_cache=False).last_hidden_state


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers in order, whole; in a pruned model some may have no attention or no MLP."""
    return list(model.get_submodule("model.layers").children())


def embedding(model: nn.Module) -> nn.Embedding:
    return model.get_submodule("model.embed_tokens")  # type: ignore[return-value]


def lm_head(model: nn.Module) -> nn.Linear:
    return model.get_submodule("lm_head")  # type: ignore[return-value]


def final_norm(model: nn.Module) -> nn.Module:
    return model.get_submodule("model.norm")


def layer_modules(model: nn.Module) -> Iterator[LayerModules]:
    """The decoder layers in order."""
    for layer in decoder_layers(model):
        yield LayerModules(
            input_norm=layer.get_submodule("input_layernorm"),
            attention=layer.get_submodule("self_attn"),
            k_proj=layer.get_submodule("self_attn.k_proj"),  # type: ignore[arg-type]
            o_proj=layer.get_submodule("self_attn.o_proj"),  # type: ignore[arg-type]
            post_norm=layer.get_submodule("post_attention_layernorm"),
            mlp=layer.get_submodule("mlp"),
            down_proj=layer.get_submodule("mlp.down_proj"),  # type: ignore[arg-type]
        )


def block_norms(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """What runs first in each layer's attention block and first in its MLP block, present or not."""
    names = ("input_layernorm", "post_attention_layernorm")
    return [(layer.get_submodule(names[0]), layer.get_submodule(names[1])) for layer in decoder_layers(model)]


class Cut(NamedTuple):
    """How a tensor shrinks with the axes.

    A gate multiplies once per site (embedding output, o_proj in and out, down_proj in and out), so it is folded once
    per site; paper Eq. 6 read literally scales gate and up too and counts twice.
    """

    dims: tuple[Units | None, ...]  # what each dimension counts; None where it stays whole
    scaled: tuple[bool, ...]  # for each dimension, whether the gate that multiplied in training is folded into it
    layer: int | None  # None for a tensor of the whole model
    # The block that the tensor vanishes with, or None. Output biases stay: a block without units still adds them.
    block: Literal["attention", "mlp"] | None

    @property
    def axes(self) -> tuple[Axis | None, ...]:
        """The axis that each dimension shrinks with."""
        return tuple(AXIS_OF_UNITS[units] if units else None for units in self.dims)


_CUTS: dict[str, tuple[tuple[Units | None, ...], tuple[bool, ...], Literal["attention", "mlp"] | None]] = {
    EMBEDDING: ((None, "hidden"), (False, True), None),
    FINAL_NORM: (("hidden",), (False,), None),
    HEAD: ((None, "hidden"), (False, False), None),
    "input_layernorm.weight": (("hidden",), (False,), "attention"),
    "post_attention_layernorm.weight": (("hidden",), (False,), "mlp"),
    "self_attn.q_proj.weight": (("query", "hidden"), (False, False), "attention"),
    "self_attn.q_proj.bias": (("query",), (False,), "attention"),
    "self_attn.k_proj.weight": (("kv", "hidden"), (False, False), "attention"),
    "self_attn.k_proj.bias": (("kv",), (False,), "attention"),
    "self_attn.v_proj.weight": (("kv", "hidden"), (False, False), "attention"),
    "self_attn.v_proj.bias": (("kv",), (False,), "attention"),
    "self_attn.o_proj.weight": (("hidden", "query"), (True, True), "attention"),
    "self_attn.o_proj.bias": (("hidden",), (True,), None),
    "self_attn.q_norm.weight": ((None,), (False,), "attention"),
    "self_attn.k_norm.weight": ((None,), (False,), "attention"),
    "mlp.gate_proj.weight": (("intermediate", "hidden"), (False, False), "mlp"),
    "mlp.gate_proj.bias": (("intermediate",), (False,), "mlp"),
    "mlp.up_proj.weight": (("intermediate", "hidden"), (False, False), "mlp"),
    "mlp.up_proj.bias": (("intermediate",), (False,), "mlp"),
    "mlp.down_proj.weight": (("hidden", "intermediate"), (True, True), "mlp"),
    "mlp.down_proj.bias": (("hidden",), (True,), None),
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def cut(name: str) -> Cut:
    """How the tensor of this name is cut. Raises UnsupportedModelError for one that no supported family has."""
    match = _LAYER.fullmatch(name)
    layer, local = (int(match[1]), match[2]) if match else (None, name)
    if local not in _CUTS:
        raise UnsupportedModelError(f"tensor {name!r}: not known in any of {', '.join(FAMILIES)}")
    dims, scaled, block = _CUTS[local]
    return Cut(dims, scaled, layer, block)


def site_of(name: str, units: Units) -> Site | None:
    """The site whose channels a dimension of a tensor counts, or None."""
    if ".self_attn.k_proj." in name and units == "kv":
        return "keys"
    if ".self_attn.o_proj." in name:
        return "attention_in" if units == "query" else "attention_out"
    return "mlp_out" if ".mlp.down_proj." in name and units == "hidden" else None


def bias_names(layer: int, outputs_only: bool) -> list[str]:
    """A layer's biases: of o_proj and down_proj only, or of all its projections, whether the model has them or not."""
    biases = [(name, dims) for name, (dims, _, _) in _CUTS.items() if name.endswith(".bias")]
    return [f"model.layers.{layer}.{name}" for name, dims in biases if dims == ("hidden",) or not outputs_only]


def reader_shapes(topology: Topology) -> dict[str, tuple[int, int]]:
    """The matrices that read heads and intermediate units, by parameter, [outputs, inputs]: o_proj and down_proj."""
    inputs = {
        "self_attn.o_proj.weight": topology.kv_heads * topology.query_rows,
        "mlp.down_proj.weight": topology.intermediate,
    }
    return {
        f"model.layers.{layer}.{name}": (topology.hidden, width)
        for layer in range(topology.layers)
        for name, width in inputs.items()
    }
