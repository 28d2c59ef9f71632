"""What a model becomes in a GGUF file, decided and checked before anything is written.

A model whose layers are alike is written in its family's own architecture. Mistral's is Llama's, and a pruned Qwen2 is
a Llama with biases, as llama.cpp's qwen2 requires that heads times head_dim is the hidden width. Layers of different
widths are written in the architecture "deci" (src/models/deci.cpp in llama.cpp), which is Llama with head counts and
MLP widths per layer. These two do not support Qwen3's norms of queries and keys.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import gguf
import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tvaprune.architecture.topology import HEAD, ROTARY_FREQUENCIES, LayerWidths, Topology
from tvaprune.checkpoint.layouts import dense_tensors
from tvaprune.checkpoint.tensor_files import Checkpoint, TensorInfo

_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
# These rotate neighbouring dimensions where transformers rotates the two halves, so q's and k's rows are reordered.
INTERLEAVED = (gguf.MODEL_ARCH.LLAMA, gguf.MODEL_ARCH.DECI)
_EMPTY_MLP_UNITS = 32  # an MLP that lost every unit is written as this many zero units: a block of q8_0


@dataclass(frozen=True)
class GgufPlan:
    """What will be written."""

    arch: gguf.MODEL_ARCH
    config: PreTrainedConfig  # of a model that has these tensors
    topology: Topology
    kv_heads: list[int]  # per layer; 0 = no attention block
    intermediate: list[int]  # MLP units per layer, never 0
    tensors: dict[str, TensorInfo]  # by the model's tensor names; those that the checkpoint lacks are zeros
    names: dict[str, str]  # the file's tensor names by the model's
    frequency_factors: Tensor | None  # float32 [head_dim / 2], divisors of the rotary frequencies; None where they stay


def plan_gguf(directory: Path, config: PreTrainedConfig, checkpoint: Checkpoint) -> GgufPlan:
    """Decide the architecture, the sizes and the tensors; for a stock model or one of the layout uneven.

    Raises:
        ValueError: something that llama.cpp does not support, or tensors that are not the config's; by name.
    """
    topology = Topology.of(config)
    layers = topology.layers
    _, intermediate, kv_heads = LayerWidths.of_config(config)
    family = getattr(config, "base_model_type", config.model_type)
    arch = _ARCHITECTURES[family]
    if any(len(set(counts)) > 1 or not counts[0] for counts in (kv_heads, intermediate)):
        arch = gguf.MODEL_ARCH.DECI
    elif family == "qwen2" and (
        kv_heads[0] * topology.query_rows != config.hidden_size or getattr(config, "projection_bias", False)
    ):
        arch = gguf.MODEL_ARCH.LLAMA
    if arch == gguf.MODEL_ARCH.DECI:
        check_uneven(directory, topology, family)
    _check_config(directory, config)
    expected = dense_tensors(config)
    _check_tensors(directory, expected, checkpoint, bool(config.tie_word_embeddings))
    if arch == gguf.MODEL_ARCH.DECI:
        config = copy.copy(config)
        # deci.cpp reads head_dim only if layer 0 has heads, and adds o_proj's bias only where there is attention. There
        # a head of zeros stands for none.
        biased = topology.output_bias or getattr(config, "projection_bias", False)
        kv_heads = [count or int(layer == 0 or biased) for layer, count in enumerate(kv_heads)]
        # It leaves a layer without MLP before it has added the attention's output, so every layer gets an MLP.
        intermediate = [units or _EMPTY_MLP_UNITS for units in intermediate]
        vars(config).update(kv_head_counts=kv_heads, intermediate_sizes=intermediate)
        expected = dense_tensors(config)
    mapping = gguf.get_tensor_name_map(arch, layers)
    return GgufPlan(
        arch=arch,
        config=config,
        topology=topology,
        kv_heads=kv_heads,
        intermediate=intermediate,
        tensors=expected,
        names={name: _file_name(directory, arch, mapping, name) for name in expected},
        frequency_factors=_frequency_factors(directory, config, arch),
    )


def check_uneven(directory: Path, topology: Topology, family: str) -> None:
    """Raise a ValueError for a family whose uneven layers llama.cpp does not run."""
    if topology.qk_norm:
        raise ValueError(
            f"{directory}: uneven layers of {family} cannot be exported to GGUF: llama.cpp's architecture with widths "
            "per layer has no norms of queries and keys; use compact.layout = padded, or uniform"
        )


def _check_config(directory: Path, config: PreTrainedConfig) -> None:
    """Refuse settings that the file's keys cannot express."""
    if config.hidden_act != "silu":
        raise ValueError(f"{directory}: hidden_act {config.hidden_act!r} cannot be exported to GGUF; silu can")
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        raise ValueError(
            f"{directory}: sliding_window {window} cannot be exported to GGUF; set it to null in config.json, and "
            f"max_position_embeddings to at most {window}, within which the two are the same"
        )


def _check_tensors(directory: Path, expected: dict[str, TensorInfo], checkpoint: Checkpoint, tied: bool) -> None:
    """Refuse a checkpoint whose tensors are not those of its config."""
    for name, info in expected.items():
        if name not in checkpoint.info:
            raise ValueError(f"{directory}: tensor {name} is missing, which config.json asks for")
        if checkpoint.info[name].shape != info.shape:
            raise ValueError(
                f"{directory}: tensor {name} has the shape {checkpoint.info[name].shape}, by config.json {info.shape}"
            )
    for name in checkpoint.info:
        if name not in expected and not (name == HEAD and tied) and not name.endswith(ROTARY_FREQUENCIES):
            raise ValueError(f"{directory}: tensor {name} is none that config.json describes")


def _file_name(directory: Path, arch: gguf.MODEL_ARCH, mapping: gguf.TensorNameMap, name: str) -> str:
    """llama.cpp's name of a tensor; refuses one that its architecture does not have, which it would silently ignore."""
    written = mapping.get_name(name, (".weight", ".bias"))
    if written is None or (arch == gguf.MODEL_ARCH.QWEN3 and written.endswith(".bias")):
        raise ValueError(
            f"{directory}: tensor {name} cannot be exported to GGUF: llama.cpp's architecture "
            f"{gguf.MODEL_ARCH_NAMES[arch]} has no such tensor"
        )
    return str(written)


def _frequency_factors(directory: Path, config: PreTrainedConfig, arch: gguf.MODEL_ARCH) -> Tensor | None:
    """Llama 3's scaling of the rotary frequencies, [head_dim / 2]; None for linear scaling and for none."""
    rope = config.rope_parameters
    kind, partial = rope.get("rope_type", "default"), rope.get("partial_rotary_factor", 1.0)
    if partial != 1.0:
        raise ValueError(f"{directory}: partial_rotary_factor {partial} cannot be exported to GGUF; 1 can")
    if kind in ("default", "linear"):
        return None
    if kind != "llama3" or arch not in INTERLEAVED:
        raise ValueError(
            f"{directory}: rope_type {kind!r} cannot be exported to GGUF's architecture {gguf.MODEL_ARCH_NAMES[arch]}; "
            "default and linear can, and llama3 for Llama and Mistral"
        )
    scaled, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    dims = torch.arange(0, 2 * len(scaled), 2, dtype=torch.float32) / (2 * len(scaled))
    return 1.0 / (rope["rope_theta"] ** dims) / scaled
