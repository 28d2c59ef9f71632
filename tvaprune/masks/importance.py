"""What is lost with the units that a width leaves out, in one measure for all axes."""

import torch
from jaxtyping import Float
from torch import Tensor

from tvaprune.architecture.parameter_counts import dense_unit_costs
from tvaprune.architecture.topology import Topology
from tvaprune.masks.masks import Masks
from tvaprune.options.axes import Axis

# Where exp is far from overflow in float64, and beyond what decides between units.
_HIGHEST = 50.0
# Weighs parameters by exp(8 · score) in place of exp(score): scores far from the threshold are not comparable with each
# other, and a steep weight leaves what was clearly kept or dropped as it is (docs/lab-log.md, measured widths).
STEEP = 8.0


def lost_by_width(
    topology: Topology, masks: Masks, axis: Axis, steepness: float = 1.0
) -> Float[Tensor, "vectors widths"]:
    """What is lost when a vector of the axis keeps its n best units: float64, index n from 0 to the width.

    A unit counts its parameters times exp(steepness · score). With steepness 1 that is its importance, as the score is
    the logarithm of importance per parameter. One row for hidden, one a layer for the others.
    """
    parameters = dense_unit_costs(topology)[axis].view(-1, 1)
    score = masks.score[axis].double().clamp(max=_HIGHEST).view(-1, topology.width(axis))
    lost = torch.sort(parameters * (steepness * score).exp(), dim=-1).values
    return torch.cat([torch.zeros_like(lost[:, :1]), lost.cumsum(-1)], dim=-1).flip(-1)
