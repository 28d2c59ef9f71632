"""Cut a dense checkpoint down to the kept units, a block of rows at a time."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tvaprune.architecture.topology import EMBEDDING, HEAD, cut
from tvaprune.artifacts import SOURCE_FILE, write_json
from tvaprune.checkpoint.config import load_config
from tvaprune.checkpoint.fold import along_dimension, fold, scales
from tvaprune.checkpoint.layouts import Plan, plan
from tvaprune.checkpoint.tensor_files import Checkpoint, write_checkpoint
from tvaprune.masks.masks import Masks
from tvaprune.masks.update import WeightUpdate
from tvaprune.options.choices import Layout

MODELING_FILE = Path(__file__).with_name("modeling_tvaprune.py")
# Removed from the output directory: weights, and what is written anew.
_STALE = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pth", "*.gguf"),
    *("config.json", "README.md", "parity.json", "parity.tensors", "tvaprune.json", MODELING_FILE.name),
)
# Copied from the dense directory, which can also hold its weights for other tools, a .git and caches.
_COPIED = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges*", "*.model", "*.tiktoken"),
    *("*.jinja", "additional_chat_templates", "generation_config.json", "LICEN[CS]E*", "NOTICE*", "USE_POLICY*"),
    SOURCE_FILE,
)


@dataclass(frozen=True)
class CheckpointSize:
    """Parameters and bytes of the tensors written and of the dense ones read; tied tensors count once."""

    parameters_dense: int
    parameters_kept: int
    bytes_dense: int
    bytes_kept: int


def compact(dense: Path, masks: Masks, update: WeightUpdate, out: Path, layout: Layout = "uneven") -> CheckpointSize:
    """Write the pruned model as a Hugging Face directory, from a dense one with safetensors.

    Kept indices stay sorted, so the order of units, and with it every query head's group, is the dense model's.
    A block that lost every unit is left out with its norm (uneven) or written as zeros (padded). The update is folded
    into the weights, which keep their stored dtype. Memory is that of a block of rows, whatever the model's size.

    Raises:
        ValueError: the dense directory has no safetensors, or damaged ones.
        ValueError: masks that keep no hidden dimension, or that do not fit the layout.
    """
    config, source = load_config(dense), Checkpoint.of(dense)
    planned = plan(config, source.info, masks, update, layout)
    out.mkdir(parents=True, exist_ok=True)
    for stale in (path for pattern in _STALE for path in out.glob(pattern)):
        stale.unlink()
    write_checkpoint(out, planned.tensors, partial(_blocks, planned, source, masks, update), progress="compact")
    for path in (path for pattern in _COPIED for path in dense.glob(pattern)):
        if path.is_dir():
            shutil.copytree(path, out / path.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, out / path.name)
    if layout == "uneven":
        shutil.copyfile(MODELING_FILE, out / MODELING_FILE.name)
    write_json(out / "config.json", planned.config)
    load_config(out)  # raises where the config class does not accept the sizes
    read = [info for name, info in source.info.items() if not (name == HEAD and config.tie_word_embeddings)]
    written = planned.tensors.values()
    return CheckpointSize(
        parameters_dense=sum(info.numel for info in read),
        parameters_kept=sum(info.numel for info in written),
        bytes_dense=sum(info.nbytes for info in read),
        bytes_kept=sum(info.nbytes for info in written),
    )


def _blocks(planned: Plan, source: Checkpoint, masks: Masks, update: WeightUpdate, name: str) -> Iterator[Tensor]:
    """The rows of a planned tensor in blocks: cut from the dense tensor, then zeros up to the planned shape."""
    info, projection = planned.tensors[name], name.removesuffix(".bias")
    missing = info.shape[0]
    dense_name = EMBEDDING if name == HEAD and planned.untied else name
    if dense_name in source.info:
        new = update.weight.get(name)
        blocks = source.blocks(dense_name) if new is None else iter([(0, new.to(info.dtype))])
        for block in _cut_blocks(planned, name, blocks, masks, update):
            missing -= len(block)
            if block.dim() == 2 and block.shape[1] < info.shape[1]:
                block = torch.nn.functional.pad(block, (0, info.shape[1] - block.shape[1]))
            yield block
    elif projection in update.mean_input:
        missing = 0
        rows = (update.bias(projection, block, masks) for _, block in source.blocks(f"{projection}.weight"))
        yield (torch.cat(list(rows)) * update.scale["hidden"])[masks.keep["hidden"]].to(info.dtype)
    if missing:
        yield torch.zeros((missing, *info.shape[1:]), dtype=info.dtype)


def _cut_blocks(
    planned: Plan, name: str, blocks: Iterator[tuple[int, Tensor]], masks: Masks, update: WeightUpdate
) -> Iterator[Tensor]:
    """The kept rows and columns of a dense tensor's blocks (index of the first row, rows), scaled."""
    where = cut(name)
    kept: list[Tensor | None] = [None] * len(where.dims)
    for dim, units in enumerate(where.dims):
        if units is not None:
            keep = along_dimension(planned.topology, masks.keep, units, where.layer)
            kept[dim] = None if bool(keep.all()) else keep.nonzero().flatten()
    factors = scales(planned.topology, name, update, tied=planned.stay_tied)
    for start, block in blocks:
        along: list[Tensor | None] = []
        for dim, (indices, factor) in enumerate(zip(kept, factors, strict=True)):
            first = start if dim == 0 else 0
            last = first + block.shape[dim]
            factor = None if factor is None else factor[first:last]
            if indices is not None:
                here = indices[(indices >= first) & (indices < last)] - first
                block = block.index_select(dim, here)
                factor = None if factor is None else factor[here]
            along.append(factor)
        yield fold(block, tuple(along))
