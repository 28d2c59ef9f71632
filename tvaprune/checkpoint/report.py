"""Figures of the compact model."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from tvaprune.architecture.parameter_counts import sparsity
from tvaprune.architecture.topology import Topology
from tvaprune.checkpoint.cut import CheckpointSize
from tvaprune.cost import peak_memory_bytes
from tvaprune.masks.masks import Masks


class Cost(NamedTuple):
    seconds: float
    peak_memory_bytes: int


def measured(work: Callable[[], CheckpointSize]) -> tuple[CheckpointSize, Cost]:
    """Run, and say how long it took and how high the memory of the process stood by then."""
    started = time.perf_counter()
    result = work()
    return result, Cost(time.perf_counter() - started, peak_memory_bytes(torch.device("cpu")))


def sizes(topology: Topology, masks: Masks, size: CheckpointSize) -> dict[str, float]:
    """Sparsities as shares, parameters and bytes as counted in the files."""
    return {
        "sparsity_decoder": sparsity(topology, masks.widths()),
        "sparsity_model": 1 - size.parameters_kept / size.parameters_dense,
        "params_dense": size.parameters_dense,
        "params_kept": size.parameters_kept,
        "bytes_dense": size.bytes_dense,
        "bytes_compact": size.bytes_kept,
    }
