"""Figures of the compact model."""

import time
from collections.abc import Callable

import torch

from tvaprune.architecture.parameter_counts import sparsity
from tvaprune.architecture.topology import Topology
from tvaprune.checkpoint.cut import CheckpointSize
from tvaprune.cost import peak_memory_bytes
from tvaprune.masks.masks import Masks


def measured(work: Callable[[], CheckpointSize]) -> tuple[CheckpointSize, dict[str, float]]:
    """Run `work`; returns its result, and its seconds and the peak_memory_bytes of the process so far."""
    started = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - started
    return result, {"seconds": seconds, "peak_memory_bytes": peak_memory_bytes(torch.device("cpu"))}


def sizes(topology: Topology, masks: Masks, size: CheckpointSize) -> dict[str, float]:
    """Sparsities as shares (0 to 1); parameters and bytes as counted in the files."""
    return {
        "sparsity_decoder": sparsity(topology, masks.widths()),
        "sparsity_model": 1 - size.parameters_kept / size.parameters_dense,
        "params_dense": size.parameters_dense,
        "params_kept": size.parameters_kept,
        "bytes_dense": size.bytes_dense,
        "bytes_compact": size.bytes_kept,
    }
