"""What a method changes in the weights of the units that it keeps, and its artifact."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tvaprune.architecture.topology import AXIS_OF_UNITS, SITES, Site, Topology, cut, reader_shapes
from tvaprune.artifacts import ArtifactError, read_artifact, write_artifact
from tvaprune.masks.masks import Masks, check_shapes
from tvaprune.options.axes import AXES, Axis
from tvaprune.options.choices import Fold


@dataclass(frozen=True)
class WeightUpdate:
    """Factors to fold into the weights of the kept units (TVA-Prune section 3.3, Eq. 6), mean inputs and new matrices.

    Attributes:
        scale: per axis, shapes of `Topology.gate_shape`; the gates' means, 1 where a method learns none.
        mean_input: float32 [inputs] by projection, for example "model.layers.3.mlp.down_proj" (FLAP); empty for the
            others. What the masks drop of it becomes a bias; see `bias`.
        channel_scale: per site, multiplied with the unit's own scale where a gate is; empty where a method learns none.
        weight: matrices in place of the dense ones, by parameter, for example "model.layers.3.mlp.down_proj.weight"
            (OSSCAR): the dense shape, in the dtype of the model that they were solved for. They are scaled and cut
            like the dense ones.
    """

    scale: dict[Axis, Float[Tensor, "..."]]
    mean_input: dict[str, Float[Tensor, " inputs"]] = field(default_factory=dict)
    channel_scale: dict[Site, Float[Tensor, "..."]] = field(default_factory=dict)
    weight: dict[str, Float[Tensor, "hidden inputs"]] = field(default_factory=dict)

    @classmethod
    def none(
        cls, topology: Topology, mean_input: dict[str, Tensor] | None = None, weight: dict[str, Tensor] | None = None
    ) -> "WeightUpdate":
        """Nothing is scaled; biases are added and matrices replaced where given."""
        return cls(
            {axis: torch.ones(topology.gate_shape(axis)) for axis in AXES}, mean_input or {}, weight=weight or {}
        )

    @torch.no_grad()
    def bias(self, projection: str, weight: Float[Tensor, "rows inputs"], masks: Masks) -> Float[Tensor, " rows"]:
        """What a projection's dropped inputs contributed on average: W · (mean ⊙ (1 - m)), float32, for rows of it.

        The masks are those that the model is cut by: after adaptation others than the method found.
        """
        where = cut(f"{projection}.weight")
        units = where.dims[1]
        assert units, f"{projection} reads no units"
        mean, keep = self.mean_input[projection], masks.keep[AXIS_OF_UNITS[units]][where.layer]
        dropped = mean.double().masked_fill(keep.repeat_interleave(len(mean) // len(keep)), 0)
        return (weight.double() @ dropped.to(weight.device)).float()


def weight_update(topology: Topology, learned: WeightUpdate, method: Fold) -> WeightUpdate:
    """What to fold of what a method learned. mean: all of it; none: its biases and matrices alone."""
    return learned if method == "mean" else WeightUpdate.none(topology, learned.mean_input, learned.weight)


def perplexities_after(measured: dict[str, float], learned: WeightUpdate, folded: WeightUpdate) -> dict[str, float]:
    """Of the perplexities that `learn_masks` measured, those that are true of what is folded.

    `dense` always is, `mean` (of the whole update) where nothing of it is left out, and `binary` (of 0/1 gates alone)
    where no biases or matrices are folded.
    """
    whole = all(torch.equal(folded.scale[axis], scale) for axis, scale in learned.scale.items())
    false = {"mean": not whole or folded.channel_scale.keys() != learned.channel_scale.keys()}
    false["binary"] = bool(folded.mean_input or folded.weight)
    return {name: value for name, value in measured.items() if not false.get(name)}


@contextmanager
def replaced(model: nn.Module, update: WeightUpdate, masks: Masks | None = None) -> Iterator[None]:
    """The dense model with the update's matrices and its biases for these masks, in its own dtype, in the context.

    Nothing is scaled. Without masks there are no biases.
    """
    given = dict(update.weight)
    if masks is not None:
        for name in update.mean_input:
            given[f"{name}.bias"] = update.bias(name, model.get_submodule(name).get_parameter("weight"), masks)
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
    tensors |= {f"mean_input.{name}": mean.float() for name, mean in update.mean_input.items()}
    tensors |= {f"weight.{name}": weight for name, weight in update.weight.items()}
    write_artifact(directory, "update", tensors, **meta)


def read_update(directory: Path, topology: Topology) -> WeightUpdate:
    """Read an update. Raises ArtifactError if it is damaged or was made for a model of other sizes."""
    tensors, _ = read_artifact(directory, "update")
    sites = [site for site in SITES if f"channel.{site}" in tensors]
    shapes: dict[str, tuple[int, ...]] = {f"{axis}.scale": topology.gate_shape(axis) for axis in AXES}
    shapes |= {f"channel.{site}": topology.site_shape(site) for site in sites}
    readers: dict[str, tuple[int, ...]] = {}
    for name, (rows, inputs) in reader_shapes(topology).items():
        readers[f"weight.{name}"] = (rows, inputs)
        readers[f"mean_input.{name.removesuffix('.weight')}"] = (inputs,)
    shapes |= {name: shape for name, shape in readers.items() if name in tensors}
    check_shapes(directory, tensors, shapes)
    for name, tensor in tensors.items():
        if name.startswith(("weight.", "mean_input.")) and name not in readers:
            raise ArtifactError(f"{directory}: {name} is no o_proj or down_proj of this model; run dvc repro")
        if not bool(tensor.isfinite().all()):
            raise ArtifactError(f"{directory}: {name} has a value that is not finite; learn the masks again")
    return WeightUpdate(
        {axis: tensors[f"{axis}.scale"] for axis in AXES},
        {name.removeprefix("mean_input."): mean for name, mean in tensors.items() if name.startswith("mean_input.")},
        {site: tensors[f"channel.{site}"] for site in sites},
        {name.removeprefix("weight."): weight for name, weight in tensors.items() if name.startswith("weight.")},
    )
