"""Keep-masks on the three axes, and their artifact.

Polarity everywhere: True = keep. A higher score means keep. A projected mask keeps what scores above 0, and of the rest
what the budget still has room for.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tvaprune.architecture.topology import Topology
from tvaprune.artifacts import ArtifactError, read_artifact, write_artifact
from tvaprune.options.axes import AXES, Axis

EPSILON = 1e-8
IMPORTED = "import_masks"  # in `made_with`, of masks that were not learned here


def log_alpha(mean: Float[Tensor, "*units"], log_var: Float[Tensor, "*units"]) -> Float[Tensor, "*units"]:
    """log(mu² + 1e-8) - log_var, natural logarithm: the score of a gate with noise (section 3.1)."""
    return torch.log(mean.square() + EPSILON) - log_var


@dataclass(frozen=True)
class Masks:
    """Which units stay, and how much they matter; shapes of `Topology.gate_shape`."""

    keep: dict[Axis, Bool[Tensor, "..."]]  # True = keep
    score: dict[Axis, Float[Tensor, "..."]]  # float32, higher = keep: log_alpha, or a baseline's shifted score

    @classmethod
    def dense(cls, topology: Topology) -> "Masks":
        """Every unit stays."""
        ones = {axis: torch.ones(topology.gate_shape(axis)) for axis in AXES}
        return cls({axis: one.bool() for axis, one in ones.items()}, ones)

    def widths(self) -> dict[Axis, Int[Tensor, "..."]]:
        """Kept units: int64 [] for hidden, [layers] for the others."""
        return {axis: keep.sum(-1) for axis, keep in self.keep.items()}


def write_masks(directory: Path, masks: Masks, **meta: Any) -> None:
    """Write the artifact that `learn_masks` and `adapt_dimensions` share."""
    tensors = {f"{axis}.keep": masks.keep[axis].bool() for axis in AXES}
    tensors |= {f"{axis}.score": masks.score[axis].float() for axis in AXES}
    widths: dict[str, Any] = {axis: width.tolist() for axis, width in masks.widths().items()}
    write_artifact(directory, "masks", tensors, polarity="True = keep", widths=widths, **meta)


def read_masks(directory: Path, topology: Topology) -> Masks:
    """Read masks. Raises ArtifactError if they are damaged or were made for a model of other sizes."""
    tensors, _ = read_artifact(directory, "masks")
    shapes = {f"{axis}.{part}": topology.gate_shape(axis) for axis in AXES for part in ("keep", "score")}
    check_shapes(directory, tensors, shapes)
    for axis in AXES:
        if tensors[f"{axis}.keep"].dtype != torch.bool:
            raise ArtifactError(f"{directory}: {axis}.keep is {tensors[f'{axis}.keep'].dtype}, not bool")
        if bool((tensors[f"{axis}.keep"].view(torch.uint8) > 1).any()):  # counts of units would be wrong
            raise ArtifactError(f"{directory}: {axis}.keep has bytes other than 0 and 1; learn the masks again")
        if bool(tensors[f"{axis}.score"].isnan().any()):
            raise ArtifactError(f"{directory}: {axis}.score has NaN, which no threshold orders; learn the masks again")
    return Masks({axis: tensors[f"{axis}.keep"] for axis in AXES}, {axis: tensors[f"{axis}.score"] for axis in AXES})


def check_shapes(directory: Path, tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises ArtifactError where a tensor of these names is absent or has another shape."""
    for name, shape in shapes.items():
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != shape:
            raise ArtifactError(f"{directory}: {name} is {found}, but the model needs {shape}")
