"""Write a model directory as a GGUF file for llama.cpp (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import gguf
import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from tvaprune.checkpoint.config import load_config
from tvaprune.checkpoint.tensor_files import Checkpoint
from tvaprune.export.gguf_plan import INTERLEAVED, GgufPlan, check_uneven, plan_gguf
from tvaprune.export.gguf_tokenizer import add_tokenizer
from tvaprune.options.choices import Layout
from tvaprune.progress import SHOWN_AFTER_S, Progress

GgufDtype = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
_TYPES: dict[str, tuple[gguf.GGMLQuantizationType, gguf.LlamaFileType]] = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q5_1": (gguf.GGMLQuantizationType.Q5_1, gguf.LlamaFileType.MOSTLY_Q5_1),
    "q5_0": (gguf.GGMLQuantizationType.Q5_0, gguf.LlamaFileType.MOSTLY_Q5_0),
    "q4_1": (gguf.GGMLQuantizationType.Q4_1, gguf.LlamaFileType.MOSTLY_Q4_1),
    "q4_0": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}


def write_gguf(directory: Path, file: Path, dtype: GgufDtype) -> None:
    """Write a model directory, stock or of the layout uneven, and its tokenizer as one GGUF file.

    Memory is that of a block of rows, or of one q or k matrix where rows are reordered. The file appears when it is
    complete, and replaces an older one. Two runs give the same bytes. `dtype` is the matrices'; norms and biases are
    float32, and with the q types, matrices whose rows are not a multiple of 32 are float16.

    Raises:
        FileNotFoundError: the directory holds no model.
        ValueError: what llama.cpp does not support, by name, before anything is written; a number beyond float16.
    """
    config = load_config(directory)
    checkpoint = Checkpoint.of(directory)
    plan = plan_gguf(directory, config, checkpoint)
    partial = file.with_name(file.name + ".partial")
    writer = gguf.GGUFWriter(partial, gguf.MODEL_ARCH_NAMES[plan.arch])
    try:
        _add_metadata(writer, plan, dtype)
        add_tokenizer(writer, directory, config.vocab_size)
        _write_tensors(writer, plan, checkpoint, dtype)
        writer.close()
        partial.replace(file)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)


def check_export(dense: Path, layout: Layout) -> None:
    """Raise the ValueError with which `write_gguf` would refuse the pruned model, where the dense one shows it."""
    config = load_config(dense)
    plan = plan_gguf(dense, config, Checkpoint.of(dense))
    if layout == "uneven":
        check_uneven(dense, plan.topology, config.model_type)
    add_tokenizer(gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[plan.arch]), dense, config.vocab_size)


def _add_metadata(writer: gguf.GGUFWriter, plan: GgufPlan, dtype: GgufDtype) -> None:
    config, head_dim = plan.config, plan.topology.head_dim
    heads = [count * plan.topology.group_size for count in plan.kv_heads]
    per_layer = plan.arch == gguf.MODEL_ARCH.DECI
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(_TYPES[dtype][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(plan.topology.layers)
    writer.add_feed_forward_length(plan.intermediate if per_layer else plan.intermediate[0])
    writer.add_head_count(heads if per_layer else heads[0])
    writer.add_head_count_kv(plan.kv_heads if per_layer else plan.kv_heads[0])
    # In a pruned model head_dim is not hidden width / heads, which is the readers' default.
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    if config.rope_parameters.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(config.rope_parameters["factor"]))


@dataclass(frozen=True)
class _Rows:
    """A tensor's encoded rows, a block at a time, with the two attributes of an array that GGUFWriter uses."""

    nbytes: int
    blocks: Iterable[np.ndarray]

    def tofile(self, file: BinaryIO) -> None:
        for block in self.blocks:
            block.tofile(file)


def _write_tensors(writer: gguf.GGUFWriter, plan: GgufPlan, checkpoint: Checkpoint, dtype: GgufDtype) -> None:
    factors = plan.frequency_factors
    kinds = {name: _stored_type(info.shape, dtype) for name, info in plan.tensors.items()}
    blocks_of = {name: gguf.GGML_QUANT_SIZES[kind] for name, kind in kinds.items()}
    sizes = {name: plan.tensors[name].numel // numbers * nbytes for name, (numbers, nbytes) in blocks_of.items()}
    if factors is not None:
        name = gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS] + ".weight"
        writer.add_tensor_info(name, factors.shape, np.dtype(np.float32), factors.nbytes)
    for name, info in plan.tensors.items():
        # The writer ignores the dtype where raw_dtype is given.
        writer.add_tensor_info(plan.names[name], info.shape, np.dtype(np.float32), sizes[name], kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    total = sum(sizes.values())
    with Progress(desc="write gguf", total=total, unit="B", unit_scale=True, delay=SHOWN_AFTER_S) as progress:
        for name, kind in kinds.items():
            blocks = (_encode(name, block, kind) for block in _blocks(plan, checkpoint, name))
            writer.write_tensor_data(_Rows(sizes[name], blocks))
            progress.update(sizes[name])


def _stored_type(shape: tuple[int, ...], dtype: GgufDtype) -> gguf.GGMLQuantizationType:
    kind = _TYPES[dtype][0] if len(shape) > 1 else gguf.GGMLQuantizationType.F32
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return gguf.GGMLQuantizationType.F16 if shape[-1] % block else kind


def _blocks(plan: GgufPlan, checkpoint: Checkpoint, name: str) -> Iterator[Tensor]:
    """A tensor's rows in the file's order, in blocks; zeros for a tensor that the checkpoint lacks."""
    if name not in checkpoint.info:
        yield torch.zeros(plan.tensors[name].shape)
    elif plan.arch in INTERLEAVED and plan.names[name].split(".")[-2] in ("attn_q", "attn_k"):
        yield interleave(checkpoint.read(name), plan.topology.head_dim)
    else:
        yield from (block for _, block in checkpoint.blocks(name))


def interleave(rows: Shaped[Tensor, "*shape"], head_dim: int) -> Shaped[Tensor, "*shape"]:
    """q's or k's rows in llama.cpp's order: row i of a head's first half is followed by row i of its second half."""
    return rows.view(-1, 2, head_dim // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _encode(name: str, block: Tensor, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    if kind == gguf.GGMLQuantizationType.F16 and not bool((block.abs() <= torch.finfo(torch.float16).max).all()):
        raise ValueError(f"{name} holds numbers that float16 cannot; export as bf16 or f32")
    return gguf.quants.quantize(block.float().numpy(), kind)
