"""What one of several processes runs in tests/unit/test_distributed.py: learn gates on a tiny model, rank 0 saves."""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from tests.tiny_models import tiny_model
from tests.unit.test_gates import DETERMINISTIC, GRASPRUNE, PAPER, TVA, WINDOWS
from tvaprune.architecture.sharding import shard_layers
from tvaprune.architecture.topology import Topology
from tvaprune.distributed import World, join
from tvaprune.gates.training import Gates, learn_gates, new_gates
from tvaprune.options.axes import AXES
from tvaprune.resume import ResumableRun

# At a high rate the paper's noisy steps amplify the rounding of sums over processes.
CASES = {
    "tva": TVA,
    "deterministic": DETERMINISTIC,
    "paper": replace(PAPER, lr=0.002),
    "grasprune": GRASPRUNE,
}


def main(case: str, family: str, sharded: str, out: str, killed_at: str = "") -> None:
    """Learn, and write what was learned to `out`, a safetensors file, with the steps that this run took.

    Args:
        killed_at: step at which rank 1 kills itself; a run with the same other arguments goes on from the saved state.
    """
    device = torch.device("cpu")
    with join(device) as world, ResumableRun("learn", {"case": case}, [], writer=world.is_main) as saved:
        own_device_only(world.rank)
        model = tiny_model(family)
        topology = Topology.of(model.config)
        if sharded == "sharded":
            shard_layers(model, device, world.size)
            assert isinstance(model.get_parameter("model.layers.0.mlp.up_proj.weight"), DTensor)
        gates = new_gates(topology, replace(CASES[case], batch_size=4), 0.4, AXES, device, seed=0)
        steps = watched(gates, int(killed_at) if killed_at and world.rank == 1 else None)
        learned = learn_gates(model, WINDOWS, gates, saved, progress=False, world=world)
        if world.is_main:
            tensors = {f"keep.{axis}": keep for axis, keep in learned.masks.keep.items()}
            tensors |= {f"score.{axis}": score for axis, score in learned.masks.score.items()}
            tensors |= {f"mean.{axis}": mean for axis, mean in learned.update.scale.items()}
            tensors |= {f"channel_mean.{site}": mean for site, mean in learned.update.channel_scale.items()}
            tensors["loss"] = torch.tensor([row["loss"] for row in learned.curve])
            tensors["steps"] = torch.tensor(steps)
            save_file(tensors, Path(out))


def watched(gates: Gates, killed_at: int | None) -> list[int]:
    """The steps that these gates will have taken; at `killed_at` the process kills itself."""
    steps: list[int] = []
    take = gates.step

    def step(gated: Any, batch: Any, number: int, world: World) -> Any:
        if number == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        steps.append(number)
        return take(gated, batch, number, world)

    gates.step = step  # type: ignore[method-assign]
    return steps


def own_device_only(rank: int) -> None:
    """As if each process had a GPU alone: what it saves is of `cuda:RANK`, and another's device cannot be read."""

    def tag(storage: Any) -> str:
        return f"cuda:{rank}"

    def restore(storage: Any, location: str) -> Any:
        if location.startswith("cuda:") and location != f"cuda:{rank}":
            raise RuntimeError(f"{location} is another process's")
        return storage if location.startswith("cuda:") else None

    torch.serialization.register_package(0, tag, restore)


if __name__ == "__main__":
    main(*sys.argv[1:])
