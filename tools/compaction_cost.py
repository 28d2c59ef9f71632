"""Memory and speed of compacting a large model, on a synthetic checkpoint of its shapes.

    python -m tools.compaction_cost --directory /large/disk

writes an 8B checkpoint of noise (16 GB, removed at the end), compacts it with random masks in a process of its own, and
then copies as many bytes as that process read and wrote.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from typer import Option

from stages._command import command
from tvaprune.architecture.topology import Topology
from tvaprune.checkpoint.config import load_config
from tvaprune.checkpoint.cut import compact
from tvaprune.checkpoint.layouts import dense_tensors
from tvaprune.checkpoint.report import measured
from tvaprune.checkpoint.tensor_files import write_checkpoint
from tvaprune.cost import peak_memory_bytes
from tvaprune.estimate import PUBLISHED, random_masks
from tvaprune.masks.adapt import adapt
from tvaprune.masks.update import WeightUpdate

_COPY_BLOCK = 64_000_000


def write_noise(config: PreTrainedConfig, directory: Path) -> None:
    """A checkpoint of noise with the tensors of this config, written a block at a time."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = dense_tensors(config)
    noise = torch.randn(_COPY_BLOCK // 2, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(config.dtype)

    def blocks(name: str) -> Iterator[Tensor]:
        shape = tensors[name].shape
        width = tensors[name].numel // shape[0]
        rows = max(1, len(noise) // width)
        for start in range(0, shape[0], rows):
            count = min(rows, shape[0] - start)
            yield noise[: count * width].view(count, *shape[1:])

    write_checkpoint(directory, tensors, blocks, progress="dense checkpoint")
    config.save_pretrained(directory)


def copy_seconds(source: Path, out: Path, written_bytes: float) -> float:
    """Seconds to read every byte of the checkpoint and to write the given number."""
    out.mkdir()
    started = time.perf_counter()
    shards = sorted(source.glob("*.safetensors"))
    share = written_bytes / sum(shard.stat().st_size for shard in shards)
    for shard in shards:
        with shard.open("rb", buffering=0) as read, (out / shard.name).open("wb", buffering=0) as write:
            while block := read.read(_COPY_BLOCK):
                write.write(memoryview(block)[: round(len(block) * share)])
    return time.perf_counter() - started


def drop_from_page_cache(directory: Path) -> None:
    """Write a directory's files to disk and drop them from the page cache, so that the next read is from disk."""
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compaction(dense: Path, out: Path, sparsity: float) -> dict[str, float]:
    """Seconds, memory and bytes of one compaction; run it in a process of its own, for its peak memory."""
    topology = Topology.of(load_config(dense))
    masks = adapt(topology, random_masks(topology, sparsity), sparsity, "budget", 128, 128)
    generator = torch.Generator().manual_seed(2)
    scale = {axis: 1 + 0.1 * torch.randn(keep.shape, generator=generator) for axis, keep in masks.keep.items()}
    before = peak_memory_bytes(torch.device("cpu"))
    size, cost = measured(lambda: compact(dense, masks, WeightUpdate(scale), out))
    return cost | {"memory_before_bytes": before, "bytes_read": size.bytes_dense, "bytes_written": size.bytes_kept}


@command
def main(
    directory: Annotated[Path, Option(help="Where to work; needs 45 GB for the 8B model, removed at the end.")],
    config: Annotated[Path, Option(help="Directory with a config.json.")] = PUBLISHED / "Meta-Llama-3-8B",
    sparsity: Annotated[float, Option(help="Share of the decoder layers' parameters to remove.")] = 0.5,
) -> None:
    """Prints one JSON object: seconds, memory and bytes of the compaction, and seconds of the copy."""
    work = directory / "compaction_cost"
    dense, out = work / "dense", work / "compact"
    try:
        write_noise(load_config(config), dense)
        drop_from_page_cache(dense)
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            figures = process.submit(compaction, dense, out, sparsity).result()
        drop_from_page_cache(dense)
        drop_from_page_cache(out)
        shutil.rmtree(out)
        figures["copy_seconds"] = copy_seconds(dense, work / "copied", figures["bytes_written"])
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(json.dumps(figures | {"speed_against_copy": figures["copy_seconds"] / figures["seconds"]}, indent=2))
