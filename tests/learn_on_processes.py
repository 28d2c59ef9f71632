"""What one of several processes runs in tests/unit/test_distributed.py: learn gates on a tiny model, rank 0 saves."""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from tests.tiny_models import tiny_model
from tests.unit.test_gates import DETERMINISTIC, PAPER, TVA, WINDOWS
from tvaprune.architecture.sharding import shard_layers
from tvaprune.architecture.topology import AXES, Topology
from tvaprune.distributed import join
from tvaprune.gates.training import learn_gates, new_gates

# At a high rate the paper's noisy steps amplify the rounding of sums over processes.
CASES = {"tva": TVA, "deterministic": DETERMINISTIC, "paper": replace(PAPER, lr=0.002)}


def main(case: str, family: str, sharded: str, out: str) -> None:
    """Learn, and write what was learned to `out`, a safetensors file."""
    device = torch.device("cpu")
    with join(device) as world:
        model = tiny_model(family)
        topology = Topology.of(model.config)
        if sharded == "sharded":
            shard_layers(model, device, world.size)
            assert isinstance(model.get_parameter("model.layers.0.mlp.up_proj.weight"), DTensor)
        gates = new_gates(topology, replace(CASES[case], batch_size=4), 0.4, AXES, device, seed=0)
        learned = learn_gates(model, WINDOWS, gates, progress=False, world=world)
        if world.is_main:
            tensors = {f"keep.{axis}": keep for axis, keep in learned.masks.keep.items()}
            tensors |= {f"score.{axis}": score for axis, score in learned.masks.score.items()}
            tensors |= {f"mean.{axis}": mean for axis, mean in learned.update.scale.items()}
            tensors |= {f"channel_mean.{site}": mean for site, mean in learned.update.channel_scale.items()}
            tensors["loss"] = torch.tensor([row["loss"] for row in learned.curve])
            save_file(tensors, Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
