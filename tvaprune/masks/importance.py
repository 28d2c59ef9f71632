"""What is lost with the units that a width leaves out, in one measure for all axes."""

import torch
from jaxtyping import Float
from torch import Tensor

from tvaprune.architecture.parameter_counts import unit_costs
from tvaprune.architecture.topology import Axis, Topology
from tvaprune.masks.masks import Masks

# exp(50) is beyond anything that one unit decides, and far from overflow in float64.
_HIGHEST_LOG_ALPHA = 50.0


# Training ends with gates of sigmoid(8 (log_alpha - threshold)): a unit's odds of being kept are exp of 8 log_alpha.
SLOPE = 8.0


def lost_by_width(topology: Topology, masks: Masks, axis: Axis, slope: float = 1.0) -> Float[Tensor, "vectors widths"]:
    """What is lost when a vector of the axis keeps its n best units: float64, index n from 0 to the width.

    A unit's parameters times exp(log_alpha) is what it is worth: log_alpha ranks gain for price (its threshold is
    one for all axes), so this is the gain alone.

    Args:
        slope: of log_alpha. With SLOPE a unit's parameters count by the gate's odds instead, which stays closer to
            what the gates kept: by gain alone, units that they kept or dropped firmly are worth nearly the same.

    Returns:
        One row for hidden, one a layer for the others.
    """
    dense = (
        torch.tensor(topology.hidden),
        torch.full((topology.layers,), topology.intermediate),
        torch.full((topology.layers,), topology.kv_heads),
    )
    price = getattr(unit_costs(topology, *dense), axis).view(-1, 1)
    log_alpha = masks.score[axis].double().clamp(max=_HIGHEST_LOG_ALPHA).view(-1, topology.width(axis))
    worth = torch.sort(price * (slope * log_alpha).exp(), dim=-1).values
    return torch.cat([torch.zeros_like(worth[:, :1]), worth.cumsum(-1)], dim=-1).flip(-1)
