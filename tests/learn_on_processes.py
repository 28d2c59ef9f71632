"""What one of several processes runs in tests/unit/test_distributed.py: learn gates on a tiny model, rank 0 saves."""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from tests.tiny_models import tiny_model
from tests.unit.test_gates import PAPER, SETTINGS, TRACKED, WINDOWS
from tvaprune.architecture.sharding import shard_layers
from tvaprune.architecture.topology import Topology
from tvaprune.distributed import join
from tvaprune.gates.training import learn_gates

CASES = {"tracked": TRACKED, "budget": SETTINGS, "noisy": replace(SETTINGS, noise=0.5), "lagrangian": PAPER}


def main(case: str, family: str, sharded: str, out: str) -> None:
    """Learn, and write what was learned to `out`, a safetensors file."""
    device = torch.device("cpu")
    with join(device) as world:
        model = tiny_model(family)
        topology = Topology.of(model.config)
        if sharded == "sharded":
            shard_layers(model, device, world.size)
            assert isinstance(model.get_parameter("model.layers.0.mlp.up_proj.weight"), DTensor)
        settings = replace(CASES[case], batch_size=4)
        learned = learn_gates(model, topology, WINDOWS, 0.4, settings, progress=False, world=world)
        masks = learned.masks
        if world.is_main:
            tensors = {f"keep.{axis}": keep for axis, keep in masks.keep.items()}
            tensors |= {f"log_alpha.{axis}": score for axis, score in masks.log_alpha.items()}
            tensors |= {f"mu.{axis}": mean for axis, mean in masks.mu.items()}
            tensors |= {f"channel_mu.{site}": mean for site, mean in masks.channel_mu.items()}
            tensors["loss"] = torch.tensor([row["loss"] for row in learned.curve])
            save_file(tensors, Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
