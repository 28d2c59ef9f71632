"""How a stage starts, and where it computes: on one process, or on the many that TVAPRUNE_NPROC asks for."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from transformers import PreTrainedModel

from stages._errors import clear_errors
from tvaprune.architecture.sharding import shard_layers
from tvaprune.device import keep_freed_memory, pick_device, pick_dtype
from tvaprune.distributed import World, join, launch, processes_asked, sharding_asked
from tvaprune.resume import ResumableRun


@dataclass(frozen=True)
class Process:
    """One process's device, the dtype it computes in, and the processes beside it."""

    device: torch.device
    dtype: torch.dtype
    world: World
    sharded: bool

    def saved(self, stage: str, settings: dict[str, Any], inputs: list[Path]) -> ResumableRun:
        """The state that a killed run of the stage left: keyed by settings, inputs, code, device and dtype."""
        kind: dict[str, Any] = {"device": self.device.type, "dtype": str(self.dtype)}
        kind |= {"processes": self.world.size, "sharded": self.sharded}
        code = [*Path("tvaprune").rglob("*.py"), Path("stages", f"{stage}.py")]
        return ResumableRun(stage, settings | kind, [*inputs, *code], writer=self.world.is_main)

    def put(self, model: PreTrainedModel) -> PreTrainedModel:
        """A frozen model to the device, or this process's part of it."""
        model.requires_grad_(False)
        return shard_layers(model, self.device, self.world.size) if self.sharded else model.to(self.device)


def run(main: Callable[..., None]) -> None:
    """Run a stage's `main` on the command line's arguments; with TVAPRUNE_NPROC above 1, in so many processes."""
    specification = sys.modules["__main__"].__spec__
    with clear_errors():
        processes = processes_asked()
        if processes > 1 and specification is not None and not {"--help", "--estimate"} & set(sys.argv):
            launch(specification.name, sys.argv[1:], processes)
            return
    typer.run(main)


@contextmanager
def join_processes() -> Iterator[Process]:
    """Meet the other processes, if there are any, for as long as the block lasts."""
    device = pick_device()
    if device.type == "cpu":
        keep_freed_memory()
    with join(device) as world:
        yield Process(device, pick_dtype(device), world, sharding_asked())
