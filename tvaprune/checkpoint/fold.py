"""Fold what a method learned into the weights (TVA-Prune section 3.3, Eq. 6).

Departure from Eq. 6 read literally: the mean itself is folded, not a rescaled one, and once per site where the gate
multiplied in training.
"""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from tvaprune.architecture.topology import AXIS_OF_UNITS, FINAL_NORM, Topology, Units, cut, site_of
from tvaprune.masks.masks import Masks
from tvaprune.masks.update import WeightUpdate
from tvaprune.options.axes import Axis

# Means of smaller magnitude are not divided by.
SMALLEST_MEAN = 1e-3


def along_dimension(
    topology: Topology, values: dict[Axis, Tensor], units: Units, layer: int | None
) -> Shaped[Tensor, " length"]:
    """Spread values of `Topology.gate_shape`, one a unit, over a tensor's dimension: rows of one unit are contiguous.

    Query and kv rows follow the key-value heads. The layer is None for a tensor of the whole model.
    """
    axis = AXIS_OF_UNITS[units]
    per_unit = values[axis] if axis == "hidden" else values[axis][layer]
    rows = {"query": topology.query_rows, "kv": topology.head_dim}.get(units, 1)
    return per_unit.repeat_interleave(rows)


def scales(topology: Topology, name: str, update: WeightUpdate, tied: bool) -> tuple[Float[Tensor, " _"] | None, ...]:
    """The factors of a tensor along each of its dimensions, before cutting; None where nothing is multiplied.

    Tied embeddings stay tied: the embedding's columns are multiplied by mu and the final norm by 1/mu, so the head,
    which is the same matrix, gets the same input as before. Exact in every dimension that `can_stay_tied` allows.
    """
    where = cut(name)
    result: list[Tensor] = []
    for units, scaled in zip(where.dims, where.scaled, strict=True):
        if tied and name == FINAL_NORM:
            mean = update.scale["hidden"]
            # A dropped dimension may have learned a mean of 0. Its activation is 0, and so must its product be.
            along = 1 / torch.where(mean.abs() > SMALLEST_MEAN, mean, 1.0)
        else:
            along = along_dimension(topology, update.scale, units, where.layer) if scaled and units else torch.ones(1)
            site = site_of(name, units) if units else None
            if site in update.channel_scale:
                along = along * update.channel_scale[site][where.layer]
        result.append(along)
    return tuple(None if bool((along == 1).all()) else along for along in result)


def fold(tensor: Float[Tensor, "*shape"], factors: tuple[Float[Tensor, " _"] | None, ...]) -> Float[Tensor, "*shape"]:
    """Multiply a tensor along its dimensions, in float32; returns its own dtype."""
    if all(factor is None for factor in factors):
        return tensor
    result = tensor.float()
    for dim, factor in enumerate(factors):
        if factor is not None:
            result = result * factor.view(-1, *[1] * (tensor.dim() - 1 - dim))
    return result.to(tensor.dtype)


def can_stay_tied(masks: Masks, update: WeightUpdate) -> bool:
    """Whether 1/mu of every kept residual dimension is a number that half precision holds well."""
    return bool((update.scale["hidden"][masks.keep["hidden"]].abs() > SMALLEST_MEAN).all())
