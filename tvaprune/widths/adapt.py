"""Kept widths to the hardware's multiples (TVA-Prune section 3.2)."""

from typing import Literal

import torch
from torch import Tensor

from tvaprune.model.sparsity import dense_decoder_parameters, kept_decoder_parameters
from tvaprune.model.topology import Topology
from tvaprune.widths.masks import Masks, keep_best, sparsity

Rounding = Literal["nearest", "budget"]


def nearest_multiple(count: int, multiple: int, width: int) -> int:
    """n' = floor((n + T/2) / T) · T (TVA-Prune section 3.2, Eq. 3), clamped to [T, width].

    Departure: Eq. 3 gives 0 for n < T/2; here at least one multiple stays. The caller decides about blocks
    that lost every unit.
    """
    return min(max((2 * count + multiple) // (2 * multiple) * multiple, multiple), width)


def check_multiples(topology: Topology, hidden_multiple: int, intermediate_multiple: int) -> None:
    """Refuse multiples that do not fit the model.

    Raises:
        ValueError: names the parameter, its value and the width.
    """
    for name, multiple, width in (
        ("hidden", hidden_multiple, topology.hidden),
        ("intermediate", intermediate_multiple, topology.intermediate),
    ):
        if width % multiple:
            raise ValueError(f"adapt_dimensions.multiple.{name} = {multiple}: does not divide the {name} width {width}")


def adapt(
    topology: Topology,
    masks: Masks,
    target_sparsity: float,
    rounding: Rounding,
    hidden_multiple: int,
    intermediate_multiple: int,
) -> Masks:
    """Resize the masks of hidden and of each layer's intermediate to multiples.

    Best units first by log_alpha (Eq. 4-5), ties to the lower index. A layer whose MLP lost every unit stays
    without one. kv_heads are aligned by head_dim already.

    rounding:
        nearest: each width to its nearest multiple, as in the paper; the sparsity moves with it.
        budget: hidden to its nearest multiple; then whole multiples of intermediate units, over all layers
            together, best mean log_alpha first, while the parameters stay within the target.

    Raises:
        ValueError: a multiple that does not divide its width; a budget that one multiple a layer exceeds.
    """
    check_multiples(topology, hidden_multiple, intermediate_multiple)
    keep = {axis: mask.clone() for axis, mask in masks.keep.items()}
    hidden = nearest_multiple(int(keep["hidden"].sum()), hidden_multiple, topology.hidden)
    keep["hidden"] = keep_best(masks.log_alpha["hidden"], hidden)
    kept = keep["intermediate"].sum(-1).tolist()
    if rounding == "nearest":
        counts = [nearest_multiple(n, intermediate_multiple, topology.intermediate) if n else 0 for n in kept]
    else:
        present = [n > 0 for n in kept]
        counts = _share_budget(topology, masks, keep, present, target_sparsity, intermediate_multiple)
    keep["intermediate"] = torch.stack(
        [keep_best(score, count) for score, count in zip(masks.log_alpha["intermediate"], counts, strict=True)]
    )
    return masks.with_keep(keep)


def _share_budget(
    topology: Topology,
    masks: Masks,
    keep: dict,
    present: list[bool],
    target_sparsity: float,
    multiple: int,
) -> list[int]:
    """Intermediate widths per layer, in multiples, that fill the parameter budget with the best groups."""
    log_alpha: Tensor = masks.log_alpha["intermediate"]
    ranked = torch.sort(log_alpha, dim=-1, descending=True).values
    groups = ranked.view(topology.layers, -1, multiple).double().mean(-1)
    order = sorted(
        (-float(groups[layer, group]), group, layer)
        for layer in range(topology.layers)
        if present[layer]
        for group in range(1, groups.shape[1])
    )
    counts = [multiple if there else 0 for there in present]
    budget = (1 - target_sparsity) * dense_decoder_parameters(topology)

    def parameters() -> int:
        widths = torch.tensor(counts)
        masked = torch.arange(topology.intermediate)[None] < widths[:, None]
        return kept_decoder_parameters(topology, {**keep, "intermediate": masked})

    used = parameters()
    if used > budget:
        raise ValueError(
            f"sparsity = {target_sparsity}: one multiple of {multiple} a layer already exceeds the budget; "
            "use a smaller adapt_dimensions.multiple"
        )
    group_parameters = (3 * int(keep["hidden"].sum()) + 2 * topology.mlp_bias) * multiple
    room = int((budget - used) // group_parameters)
    # Groups of a layer come in order, since their means descend; ties go to the earlier group.
    for _, _, layer in order[:room]:
        counts[layer] += multiple
    return counts


def adapt_metrics(topology: Topology, before: Masks, after: Masks, target_sparsity: float) -> dict[str, float]:
    """metrics/adapt.json: sparsities as shares of the decoder layers' parameters, widths in units."""
    return {
        "target_sparsity": target_sparsity,
        "sparsity_before": sparsity(topology, before),
        "sparsity_decoder": sparsity(topology, after),
        "hidden_before": float(before.keep["hidden"].sum()),
        "hidden_after": float(after.keep["hidden"].sum()),
        "intermediate_mean_before": float(before.keep["intermediate"].sum(-1).double().mean()),
        "intermediate_mean_after": float(after.keep["intermediate"].sum(-1).double().mean()),
        "kv_heads_kept": float(after.keep["kv_heads"].sum()),
    }
