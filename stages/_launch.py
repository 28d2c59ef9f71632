"""How a stage starts, and where it computes: in one process, or in as many as TVAPRUNE_NPROC says."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import tvaprune
from stages._command import command
from tvaprune.architecture.sharding import to_process
from tvaprune.device import keep_freed_memory, pick_device, pick_dtype
from tvaprune.distributed import Process, join, launch, processes_asked, sharding_asked
from tvaprune.errors import clear_errors
from tvaprune.resume import ResumableRun


@dataclass(frozen=True, kw_only=True)
class StageProcess(Process):
    """A process of a stage, and the dtype that it computes in."""

    dtype: torch.dtype

    def saved(self, stage: str, settings: dict[str, Any], inputs: list[Path]) -> ResumableRun:
        """State that a killed run of the stage left, identified by settings, inputs, code and where it computes."""
        kind: dict[str, Any] = {"device": self.device.type, "dtype": str(self.dtype)}
        if self.device.type == "cpu":
            kind["threads"] = torch.get_num_threads()  # sums of other parts round differently
        kind |= {"processes": self.world.size, "sharded": self.sharded}
        code = [*Path(tvaprune.__file__).parent.rglob("*.py"), Path(__file__).with_name(f"{stage}.py")]
        alone = self.world.size == 1
        return ResumableRun(stage, settings | kind, [*inputs, *code], writer=self.world.is_main, waits=alone)

    def put(self, model: PreTrainedModel) -> PreTrainedModel:
        """Freeze a model and move it, or this process's part of its layers, to the device."""
        return to_process(model.requires_grad_(False), self)


def process_command(main: Callable[..., None]) -> Callable[..., None]:
    """`command` for a stage that runs in TVAPRUNE_NPROC processes if that is above 1."""
    specification = sys.modules["__main__"].__spec__
    if main.__module__ == "__main__" and specification and "--help" not in sys.argv:
        with clear_errors():
            if (processes := processes_asked()) > 1:
                launch(specification.name, sys.argv[1:], processes)
                return main
    return command(main)


@contextmanager
def join_processes() -> Iterator[StageProcess]:
    """Connect to the other processes, if there are any, for the duration of the block."""
    device = pick_device()
    if device.type == "cpu":
        keep_freed_memory()
    with join(device) as world:
        yield StageProcess(device, world, sharding_asked(), dtype=pick_dtype(device))
