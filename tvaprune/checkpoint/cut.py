"""Cut a dense checkpoint down to the kept units, a block of rows at a time."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from tvaprune.architecture.topology import Topology, Units, cut
from tvaprune.checkpoint.fold import axis_of_dimension, fold, per_row, scales
from tvaprune.checkpoint.layouts import HEAD, Plan, plan, write_config
from tvaprune.checkpoint.loading import load_config
from tvaprune.checkpoint.tensor_files import Checkpoint, CheckpointWriter
from tvaprune.masks.adapt import Layout
from tvaprune.masks.masks import Masks
from tvaprune.masks.update import WeightUpdate

MODELING_FILE = Path(__file__).with_name("modeling_tvaprune.py")
# Files of a model directory that are not copied: weights and their index, and what is written anew. Those of an earlier
# run in the directory that is written go.
_NOT_COPIED = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pth", "*.gguf"),
    *("config.json", "README.md", "parity.json", "parity.tensors", "tvaprune.json", MODELING_FILE.name),
)


@dataclass(frozen=True)
class CheckpointSize:
    """Parameters and bytes of the tensors written and of the dense ones read; tied tensors count once."""

    parameters_dense: int
    parameters_kept: int
    bytes_dense: int
    bytes_kept: int


def compact(dense: Path, masks: Masks, update: WeightUpdate, out: Path, layout: Layout = "uneven") -> CheckpointSize:
    """Write the pruned model as a Hugging Face directory.

    Kept indices stay sorted, so the order of units, and with it every query head's group, is the dense model's.
    Where a block lost every unit, it vanishes with its norm (uneven) or is written as zeros (padded). Weights keep
    their stored dtype. Memory is that of a block of rows, whatever the model's size.

    Args:
        dense: the dense model's directory, safetensors.
        masks: keep-masks, True = keep.
        update: folded into the weights as they are cut.
        out: the directory to write.
        layout: see `tvaprune.checkpoint.layouts`.

    Raises:
        FileNotFoundError: the dense directory has no safetensors.
        ValueError: masks that leave nothing to compute with, or that the layout does not take.
    """
    config, source = load_config(dense), Checkpoint.of(dense)
    topology = Topology.of(config)
    planned = plan(config, source.info, masks, update, layout)
    out.mkdir(parents=True, exist_ok=True)
    for stale in (path for pattern in _NOT_COPIED for path in out.glob(pattern)):
        stale.unlink()
    size = sum(info.nbytes for info in planned.tensors.values())
    with (
        CheckpointWriter(out, planned.tensors) as writer,
        tqdm(desc="compact", total=size, unit="B", unit_scale=True, delay=2) as progress,
    ):
        for name in planned.tensors:
            writer.begin(name)
            for block in _blocks(topology, name, source, masks, update, planned):
                writer.write(block)
                progress.update(block.nbytes)
    write_config(planned, out)
    copy_companions(dense, out, modeling=layout == "uneven")
    tied = {HEAD} if config.tie_word_embeddings else set()
    read = [info for name, info in source.info.items() if name not in tied]
    return CheckpointSize(
        parameters_dense=sum(info.numel for info in read),
        parameters_kept=sum(info.numel for info in planned.tensors.values()),
        bytes_dense=sum(info.nbytes for info in read),
        bytes_kept=size,
    )


def _blocks(
    topology: Topology, name: str, source: Checkpoint, masks: Masks, update: WeightUpdate, planned: Plan
) -> Iterator[Tensor]:
    """A planned tensor's rows, in blocks: read, cut, scaled, padded with zeros."""
    info = planned.tensors[name]
    missing = info.shape[0]
    stored = planned.source_of(name)
    if stored in source.info:
        along = scales(topology, name, update, tied=planned.stay_tied)
        for block in cut_blocks(topology, name, source.blocks(stored), masks, along):
            missing -= block.shape[0]
            yield _widen(block, info.shape[1:])
    elif name.removesuffix(".bias") in update.bias:
        bias = update.bias[name.removesuffix(".bias")] * update.scale["hidden"]
        missing = 0
        yield bias[masks.keep["hidden"]].to(info.dtype)
    if missing:
        yield torch.zeros((missing, *info.shape[1:]), dtype=info.dtype)


def cut_blocks(
    topology: Topology,
    name: str,
    blocks: Iterator[tuple[int, Tensor]],
    masks: Masks,
    along: tuple[Tensor | None, ...],
) -> Iterator[Tensor]:
    """The kept rows and columns of a tensor's blocks, scaled.

    Args:
        blocks: first row's index and rows.
        along: what multiplies each dimension of the uncut tensor, as from `scales`; empty for nothing.
    """
    where = cut(name)
    kept = [_kept(topology, units, where.layer, masks) for units in where.dims]
    for start, block in blocks:
        factors = list(along) or [None] * block.dim()
        factors[0] = None if factors[0] is None else factors[0][start : start + block.shape[0]]
        for dim, rows in enumerate(kept):
            if rows is None:
                continue
            if dim == 0:
                rows = rows[(rows >= start) & (rows < start + block.shape[0])] - start
            block = block.index_select(dim, rows)
            factor = factors[dim]
            factors[dim] = None if factor is None else factor[rows]
        yield fold(block, tuple(factors))


def _kept(topology: Topology, units: Units | None, layer: int | None, masks: Masks) -> Tensor | None:
    """Indices along a dimension that counts `units`, sorted; None where all of them stay."""
    axis = axis_of_dimension(units)
    if axis is None or units is None:
        return None
    keep = masks.keep[axis] if axis == "hidden" else masks.keep[axis][layer or 0]
    return None if bool(keep.all()) else per_row(topology, units, keep).nonzero().flatten()


def _widen(block: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Zeros behind the columns, up to the planned width."""
    if not shape or block.shape[1] == shape[0]:
        return block
    return torch.nn.functional.pad(block, (0, shape[0] - block.shape[1]))


def copy_companions(source: Path, out: Path, modeling: bool) -> None:
    """All of a model directory but weights and config (tokenizer, generation settings); the modeling file if asked."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns(*_NOT_COPIED), dirs_exist_ok=True)
    if modeling:
        shutil.copyfile(MODELING_FILE, out / MODELING_FILE.name)
