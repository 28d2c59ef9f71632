"""What a method changes in the weights of the units that it keeps, and its artifact."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tvaprune.architecture.topology import SITES, Site, Topology, bias_names, reader_shapes
from tvaprune.artifacts import ArtifactError, read_artifact, write_artifact
from tvaprune.masks.masks import check_shapes
from tvaprune.options.axes import AXES, Axis
from tvaprune.options.choices import Fold


@dataclass(frozen=True)
class WeightUpdate:
    """Factors to fold into the weights of the kept units (TVA-Prune section 3.3, Eq. 6), biases and new matrices.

    Attributes:
        scale: per axis, shapes of `Topology.gate_shape`; the gates' means, 1 where a method learns none.
        bias: float32 [hidden] by projection, for example "model.layers.3.mlp.down_proj" (FLAP); empty for the others.
        channel_scale: per site, multiplied with the unit's own scale where a gate is; empty where a method learns none.
        weight: matrices in place of the dense ones, by parameter, for example "model.layers.3.mlp.down_proj.weight"
            (OSSCAR): the dense shape, in the dtype of the model that they were solved for. They are scaled and cut
            like the dense ones.
    """

    scale: dict[Axis, Float[Tensor, "..."]]
    bias: dict[str, Float[Tensor, " hidden"]] = field(default_factory=dict)
    channel_scale: dict[Site, Float[Tensor, "..."]] = field(default_factory=dict)
    weight: dict[str, Float[Tensor, "hidden inputs"]] = field(default_factory=dict)

    @classmethod
    def none(
        cls, topology: Topology, bias: dict[str, Tensor] | None = None, weight: dict[str, Tensor] | None = None
    ) -> "WeightUpdate":
        """Nothing is scaled; biases are added and matrices replaced where given."""
        return cls({axis: torch.ones(topology.gate_shape(axis)) for axis in AXES}, bias or {}, weight=weight or {})


def weight_update(topology: Topology, learned: WeightUpdate, method: Fold) -> WeightUpdate:
    """What to fold of what a method learned. mean: all of it; none: its biases and matrices alone."""
    return learned if method == "mean" else WeightUpdate.none(topology, learned.bias, learned.weight)


def perplexities_after(measured: dict[str, float], learned: WeightUpdate, folded: WeightUpdate) -> dict[str, float]:
    """Of the perplexities that `learn_masks` measured, those that are true of what is folded.

    `dense` always is, `mean` (of the whole update) where nothing of it is left out, and `binary` (of 0/1 gates alone)
    where no biases or matrices are folded.
    """
    whole = all(torch.equal(folded.scale[axis], scale) for axis, scale in learned.scale.items())
    false = {"mean": not whole or folded.channel_scale.keys() != learned.channel_scale.keys()}
    false["binary"] = bool(folded.bias or folded.weight)
    return {name: value for name, value in measured.items() if not false.get(name)}


@contextmanager
def replaced(model: nn.Module, update: WeightUpdate) -> Iterator[None]:
    """The dense model with the update's biases and matrices, in its own dtype, as long as the context lasts.

    Nothing is scaled.
    """
    given = {f"{name}.bias": bias for name, bias in update.bias.items()} | update.weight
    before: dict[str, nn.Parameter | None] = {}
    try:
        for name, tensor in given.items():
            module, own = _owner(model, name)
            before[name] = getattr(module, own)
            like = module.get_parameter("weight")
            setattr(module, own, nn.Parameter(tensor.to(like.device, like.dtype), requires_grad=False))
        yield
    finally:
        for name, parameter in before.items():
            module, own = _owner(model, name)
            setattr(module, own, parameter)


def _owner(model: nn.Module, parameter: str) -> tuple[nn.Module, str]:
    """The module that has a parameter, and the parameter's own name there."""
    module, _, own = parameter.rpartition(".")
    return model.get_submodule(module), own


def write_update(directory: Path, update: WeightUpdate, **meta: Any) -> None:
    tensors = {f"{axis}.scale": update.scale[axis].float() for axis in AXES}
    tensors |= {f"channel.{site}": scale.float() for site, scale in update.channel_scale.items()}
    tensors |= {f"bias.{name}": bias.float() for name, bias in update.bias.items()}
    tensors |= {f"weight.{name}": weight for name, weight in update.weight.items()}
    write_artifact(directory, "update", tensors, **meta)


def read_update(directory: Path, topology: Topology) -> WeightUpdate:
    """Read an update. Raises ArtifactError if it is damaged or was made for a model of other sizes."""
    tensors, _ = read_artifact(directory, "update")
    sites = [site for site in SITES if f"channel.{site}" in tensors]
    shapes: dict[str, tuple[int, ...]] = {f"{axis}.scale": topology.gate_shape(axis) for axis in AXES}
    shapes |= {f"channel.{site}": topology.site_shape(site) for site in sites}
    shapes |= {name: (topology.hidden,) for name in tensors if name.startswith("bias.")}
    readers = {f"weight.{name}": shape for name, shape in reader_shapes(topology).items()}
    shapes |= {name: shape for name, shape in readers.items() if name in tensors}
    check_shapes(directory, tensors, shapes)
    outputs = {f"bias.{name}" for layer in range(topology.layers) for name in bias_names(layer, outputs_only=True)}
    for name, tensor in tensors.items():
        if name.startswith("bias.") and f"{name}.bias" not in outputs:
            raise ArtifactError(f"{directory}: {name} is no projection with a bias in this model; run dvc repro")
        if name.startswith("weight.") and name not in readers:
            raise ArtifactError(f"{directory}: {name} is no o_proj or down_proj of this model; run dvc repro")
        if not bool(tensor.isfinite().all()):
            raise ArtifactError(f"{directory}: {name} has a value that is not finite; learn the masks again")
    return WeightUpdate(
        {axis: tensors[f"{axis}.scale"] for axis in AXES},
        {name.removeprefix("bias."): bias for name, bias in tensors.items() if name.startswith("bias.")},
        {site: tensors[f"channel.{site}"] for site in sites},
        {name.removeprefix("weight."): weight for name, weight in tensors.items() if name.startswith("weight.")},
    )
