"""Keep-masks on the three axes, and their artifact.

Polarity everywhere: True = keep. Scores are log_alpha: higher = keep, keep iff strictly above 0.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tvaprune.architecture.parameter_counts import (
    dense_decoder_parameters,
    kept_decoder_parameters,
)
from tvaprune.architecture.topology import AXES, SITES, Axis, Site, Topology
from tvaprune.artifacts import ArtifactError, read_artifact, write_artifact

EPSILON = 1e-8


def log_alpha(mu: Float[Tensor, "*units"], log_var: Float[Tensor, "*units"]) -> Float[Tensor, "*units"]:
    """log(mu² + 1e-8) - log_var, natural logarithm; keep iff above the threshold (0 once projected)."""
    return torch.log(mu.square() + EPSILON) - log_var


@dataclass(frozen=True)
class Masks:
    """Which units stay, how much they matter, and how they are scaled.

    Attributes:
        keep: bool per axis, shapes of `Topology.gate_shape`; True = keep.
        log_alpha: float32 of the same shapes; higher = keep (section 3.1: log(mu² / sigma²) for VIB gates, a
            shifted score for the baselines).
        mu: float32 of the same shapes; the gate's mean, 1 where a method learns none.
        bias: float32 [hidden] by the name of the projection it is added to (FLAP); empty for the others.
        channel_mu: float32 [layers, channels] by site, means that multiply beside mu there; empty where a method
            learns none.
    """

    keep: dict[Axis, Tensor]
    log_alpha: dict[Axis, Tensor]
    mu: dict[Axis, Tensor]
    bias: dict[str, Tensor] = field(default_factory=dict)
    channel_mu: dict[Site, Tensor] = field(default_factory=dict)

    @classmethod
    def dense(cls, topology: Topology) -> "Masks":
        """Everything stays, nothing is scaled."""
        ones = {axis: torch.ones(topology.gate_shape(axis)) for axis in AXES}
        return cls(keep={axis: one.bool() for axis, one in ones.items()}, log_alpha=ones, mu=ones)

    def widths(self) -> dict[Axis, Tensor]:
        """Kept units: int64 [] for hidden, [layers] for the others."""
        return {axis: keep.sum(-1) for axis, keep in self.keep.items()}

    def with_keep(self, keep: dict[Axis, Tensor]) -> "Masks":
        return replace(self, keep=keep)


def sparsity(topology: Topology, masks: Masks) -> float:
    """Share of the decoder layers' parameters that the masks remove, 0 to 1."""
    return 1 - kept_decoder_parameters(topology, masks.keep) / dense_decoder_parameters(topology)


def write_masks(directory: Path, masks: Masks, kind: str = "masks", **meta: Any) -> None:
    """Write the artifact that `learn_masks` and `adapt_dimensions` share."""
    tensors = {f"{axis}.mask": masks.keep[axis].bool() for axis in AXES}
    tensors |= {f"{axis}.log_alpha": masks.log_alpha[axis].float() for axis in AXES}
    tensors |= {f"{axis}.mu": masks.mu[axis].float() for axis in AXES}
    tensors |= {f"channel_mu.{site}": mean.float() for site, mean in masks.channel_mu.items()}
    tensors |= {f"bias.{name}": bias.float() for name, bias in masks.bias.items()}
    widths: dict[str, Any] = {axis: width.tolist() for axis, width in masks.widths().items()}
    write_artifact(directory, kind, tensors, polarity="True = keep", widths=widths, **meta)


def read_masks(directory: Path, topology: Topology, kind: str = "masks") -> Masks:
    """Read masks and check that they fit the model.

    Raises:
        ArtifactError: the artifact is damaged or was made for a model of other sizes.
    """
    tensors, _ = read_artifact(directory, kind)
    for axis in AXES:
        expected = topology.gate_shape(axis)
        for part in ("mask", "log_alpha", "mu"):
            found = tensors.get(f"{axis}.{part}")
            if found is None or tuple(found.shape) != expected:
                shape = None if found is None else tuple(found.shape)
                raise ArtifactError(f"{directory}: {axis}.{part} is {shape}, but the model needs {expected}")
    return Masks(
        keep={axis: tensors[f"{axis}.mask"] for axis in AXES},
        log_alpha={axis: tensors[f"{axis}.log_alpha"] for axis in AXES},
        mu={axis: tensors[f"{axis}.mu"] for axis in AXES},
        bias={name.removeprefix("bias."): bias for name, bias in tensors.items() if name.startswith("bias.")},
        channel_mu=_channel_mu(directory, topology, tensors),
    )


def _channel_mu(directory: Path, topology: Topology, tensors: dict[str, Tensor]) -> dict[Site, Tensor]:
    found: dict[Site, Tensor] = {}
    for site in SITES:
        mean = tensors.get(f"channel_mu.{site}")
        if mean is None:
            continue
        if tuple(mean.shape) != topology.site_shape(site):
            raise ArtifactError(
                f"{directory}: channel_mu.{site} is {tuple(mean.shape)}, but the model needs "
                f"{topology.site_shape(site)}"
            )
        found[site] = mean
    return found
