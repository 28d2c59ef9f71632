"""Several processes that compute one result: starting them, their ranks, and what they reduce together.

torchrun starts them, or a stage itself where TVAPRUNE_NPROC is set, so the stage's command never changes.
torch.distributed connects them: NCCL between CUDA devices, Gloo between CPUs.
"""

import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tvaprune.out_of_memory import advice


class ProcessFailedError(ValueError):
    """One of the processes ended early; the others were stopped."""


@dataclass(frozen=True)
class World:
    """The processes of one computation."""

    rank: int = 0  # of this process, 0 to size - 1; only rank 0 writes
    size: int = 1  # number of processes

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def part(self, count: int, name: str) -> slice:
        """This process's equal share of `count` items. Raises ValueError if there is none, naming the parameter."""
        if count % self.size:
            raise ValueError(f"{name} = {count}: {self.size} processes cannot share it equally; make it a multiple")
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def turns(self, count: int) -> list[tuple[int, bool]]:
        """This process's turns when `count` items need not divide equally: an item's index, and whether it counts.

        Every process has the same number of turns, because a model with split layers needs all of them in each
        forward; a turn that does not count repeats another process's item.
        """
        rounds = -(-count // self.size)
        indices = range(self.rank, rounds * self.size, self.size)
        return [(min(index, count - 1), index < count) for index in indices]

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replace float32 tensors by their mean over the processes, in one all-reduce; the same bits everywhere."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        distributed.all_reduce(flat)
        flat /= self.size
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over the processes, and return it."""
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its largest value over the processes, element by element, and return it."""
        if self.size > 1:
            distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
        return tensor


ALONE = World()


@dataclass(frozen=True)
class Process:
    """Where one process computes."""

    device: torch.device
    world: World = ALONE
    sharded: bool = False  # whether the world's processes split a model's layers between them


@contextmanager
def join(device: torch.device) -> Iterator[World]:
    """Connect to the other processes that torchrun started; `ALONE` without torchrun."""
    size = int(os.environ.get("WORLD_SIZE") or 1)
    if size == 1 or "RANK" not in os.environ:
        yield ALONE
        return
    _end_with_parent()
    cuda = device.type == "cuda"
    distributed.init_process_group(
        "nccl" if cuda else "gloo", timeout=timedelta(minutes=30), device_id=device if cuda else None
    )
    try:
        yield World(distributed.get_rank(), size)
    finally:
        distributed.destroy_process_group()


def processes_asked() -> int:
    """How many processes to start: TVAPRUNE_NPROC (ValueError if it is no whole number above 0), 1 under torchrun."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return 1
    return _whole("TVAPRUNE_NPROC")


def launch(module: str, arguments: Sequence[str], processes: int) -> None:
    """Run `python -m module arguments` in several processes, and wait for all of them.

    With TVAPRUNE_NNODES above 1, the same command runs on every node, over one file system, and the nodes connect at
    TVAPRUNE_RENDEZVOUS (host:port).

    Raises:
        ProcessFailedError: a process ended early; the others were stopped.
        ValueError: a variable is wrong.
    """
    nodes = _whole("TVAPRUNE_NNODES")
    endpoint = os.environ.get("TVAPRUNE_RENDEZVOUS", "")
    if nodes > 1 and not endpoint:
        raise ValueError(f"TVAPRUNE_NNODES={nodes}: set TVAPRUNE_RENDEZVOUS to the host:port where they connect")
    # By default every process would use every core.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    config = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=processes,
        run_id=f"tvaprune-{module}" if nodes > 1 else uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=endpoint or "localhost:0",
        max_restarts=0,
        shutdown_timeout=10,
    )
    try:
        elastic_launch(config, sys.executable)("-m", module, *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        how = f"was killed by signal {-failure.exitcode}" if failure.exitcode < 0 else "stopped with an error (above)"
        memory = ""
        if failure.exitcode == -signal.SIGKILL:
            memory = f" The kernel sends signal 9 where memory runs out; to need less, {advice(module)}."
        raise ProcessFailedError(
            f"{module}: process {rank} of {nodes * processes} {how}, so the others were stopped. "
            "Nothing was written; run it again and it goes on from its last saved state." + memory
        ) from error
    except SignalException as error:
        raise ProcessFailedError(f"{module}: stopped by signal {int(error.sigval)}, with all its processes") from error


def sharding_asked() -> bool:
    """Whether TVAPRUNE_SHARD is 1: split the dense model's layers over the processes.

    Raises ValueError if it is neither 0 nor 1, or if there is only one process.
    """
    value = os.environ.get("TVAPRUNE_SHARD") or "0"
    if value not in {"0", "1"}:
        raise ValueError(f"TVAPRUNE_SHARD={value!r}: give 1 to split the model over the processes, or 0")
    if value == "1" and not distributed.is_initialized():
        raise ValueError("TVAPRUNE_SHARD=1: one process has nothing to split; set TVAPRUNE_NPROC above 1")
    return value == "1"


def _whole(variable: str) -> int:
    value = os.environ.get(variable) or "1"
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"{variable}={value!r}: give a whole number, at least 1")
    return int(value)


def _end_with_parent() -> None:
    """End this process when its parent is gone: a killed parent cannot stop its children."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
