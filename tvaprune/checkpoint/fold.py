"""Fold what a method learned into the weights (TVA-Prune section 3.3, Eq. 6).

Departure from Eq. 6 read literally: the mean itself is folded, not a rescaled one, and once per site where the gate
multiplied in training.
"""

from torch import Tensor

from tvaprune.architecture.topology import Axis, Site, Topology, Units, cut
from tvaprune.masks.masks import Masks
from tvaprune.masks.update import WeightUpdate


def axis_of_dimension(units: str | None) -> Axis | None:
    """The axis that a weight's dimension belongs to; query and kv rows follow the key-value heads."""
    return {"hidden": "hidden", "intermediate": "intermediate", "query": "kv_heads", "kv": "kv_heads"}.get(units or "")  # type: ignore[return-value]


def per_row(topology: Topology, units: str, per_unit: Tensor) -> Tensor:
    """Spread one value a unit over the rows the unit owns, contiguous (repeat_interleave)."""
    if units == "query":
        return per_unit.repeat_interleave(topology.query_rows, dim=-1)
    if units == "kv":
        return per_unit.repeat_interleave(topology.head_dim, dim=-1)
    return per_unit


def scales(topology: Topology, name: str, update: WeightUpdate, tied: bool) -> tuple[Tensor | None, ...]:
    """What multiplies a tensor along each of its dimensions, or None where nothing does.

    Tied embeddings stay tied: the embedding's columns take mu, and the final norm takes 1/mu, so that the head,
    which is the same matrix, sees what it saw before. Exact wherever mu is not 0.

    Args:
        name: of the tensor in the checkpoint.
        tied: the head is the embedding matrix.

    Returns:
        For each dimension float32 [length] before cutting, or None.
    """
    where = cut(name)
    if tied and name == "model.norm.weight":
        return (_unless_ones(1 / update.scale["hidden"]),)
    result: list[Tensor | None] = []
    for units, scaled in zip(where.dims, where.scaled, strict=True):
        axis = axis_of_dimension(units)
        if not scaled or axis is None or units is None:
            result.append(None)
            continue
        per_unit = update.scale[axis] if where.layer is None or axis == "hidden" else update.scale[axis][where.layer]
        along = per_row(topology, units, per_unit)
        site = site_of(name, units)
        if site in update.channel_scale and where.layer is not None:
            along = along * update.channel_scale[site][where.layer]
        result.append(_unless_ones(along))
    return tuple(result)


def site_of(name: str, units: Units) -> Site | None:
    """The site whose channels a dimension of a tensor is, or None."""
    if ".self_attn.o_proj." in name:
        return "attention_in" if units == "query" else "attention_out"
    return "mlp_out" if ".mlp.down_proj." in name and units == "hidden" else None


def _unless_ones(scale: Tensor) -> Tensor | None:
    return None if bool((scale == 1).all()) else scale


def fold(tensor: Tensor, along: tuple[Tensor | None, ...]) -> Tensor:
    """Multiply a tensor of any floating dtype along its dimensions, in float32; its own dtype comes back."""
    if all(scale is None for scale in along):
        return tensor
    result = tensor.float()
    for dim, scale in enumerate(along):
        if scale is not None:
            shape = [1] * tensor.dim()
            shape[dim] = -1
            result = result * scale.view(shape)
    return result.to(tensor.dtype)


def can_stay_tied(masks: Masks, update: WeightUpdate) -> bool:
    """Whether 1/mu of every kept residual dimension is a number that half precision holds well."""
    return bool((update.scale["hidden"][masks.keep["hidden"]].abs() > 1e-3).all())
