"""Kept widths to the hardware's multiples (TVA-Prune section 3.2)."""

from dataclasses import replace
from math import lcm
from typing import Any

import torch

from tvaprune.architecture.parameter_counts import (
    decoder_parameters,
    dense_decoder_parameters,
    parameter_budget,
    sparsity,
)
from tvaprune.architecture.topology import LayerWidths, Topology
from tvaprune.masks.masks import Masks
from tvaprune.masks.projection import keep_widths
from tvaprune.masks.uniform import UniformWidths, uniform_widths
from tvaprune.options.axes import AXES
from tvaprune.options.choices import Layout, Rounding


def nearest_multiple(count: int, multiple: int, width: int) -> int:
    """n' = floor((n + T/2) / T) · T (TVA-Prune section 3.2, Eq. 3), clamped to [T, width].

    Departure: Eq. 3 gives 0 for n < T/2; here at least one multiple stays. Callers decide about blocks without units.
    """
    return min(max((2 * count + multiple) // (2 * multiple) * multiple, multiple), width)


def check_multiples(topology: Topology, hidden_multiple: int, intermediate_multiple: int) -> None:
    """Raise a ValueError that names the parameter, its value and the width if a multiple does not divide the width."""
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
    layout: Layout = "uneven",
) -> Masks:
    """Resize the masks of hidden and of each layer's intermediate to multiples, and to what the layout can hold.

    Best units first by score (Eq. 4-5), ties to the lower index. A layer whose MLP lost every unit stays without one.
    An axis that the masks leave whole stays whole, except in `uniform` where nothing would fit.
    kv_heads are aligned by head_dim already.

    rounding:
        nearest: each width to its nearest multiple, as in the paper; the sparsity moves with it.
        budget: hidden to its nearest multiple; then whole multiples of intermediate units, over all layers
            together, best mean score first, while the parameters stay within the target. Where the masks leave all
            units, hidden takes the largest multiple within the target, up to the nearest.
    layout:
        uneven: nothing more is asked.
        padded: the base family's config describes the widest layer, so hidden takes the nearest width that it accepts
            (LlamaConfig wants a multiple of the query heads); where hidden is whole, heads are padded instead.
        uniform: every layer the same widths, which that config accepts; with `budget` the least lost within the
            target, with `nearest` the layers' mean widths rounded.

    Raises:
        ValueError: a multiple that does not divide its width; a budget that one multiple a layer exceeds.
    """
    check_multiples(topology, hidden_multiple, intermediate_multiple)
    hidden, intermediate, kv_heads = LayerWidths.of_counts(masks.widths())
    if layout == "uniform":
        if rounding == "budget":
            same = uniform_widths(topology, masks, target_sparsity, hidden_multiple, intermediate_multiple)
        else:
            heads = max(1, round(sum(kv_heads) / topology.layers))
            if hidden == topology.hidden:
                heads = topology.stock_heads(hidden, heads)
            mean = round(sum(intermediate) / topology.layers)
            units = nearest_multiple(mean, intermediate_multiple, topology.intermediate)
            step = _hidden_step(topology, hidden, hidden_multiple, heads)
            same = UniformWidths(_nearest_hidden(topology, hidden, step), units, heads)
        return keep_widths(masks, same.hidden, [same.intermediate] * topology.layers, [same.kv_heads] * topology.layers)
    step = _hidden_step(topology, hidden, hidden_multiple, 0 if layout == "uneven" else max(1, *kv_heads))
    hidden, budget = _nearest_hidden(topology, hidden, step), parameter_budget(topology, target_sparsity)
    if rounding == "nearest":
        counts = [nearest_multiple(n, intermediate_multiple, topology.intermediate) if n else 0 for n in intermediate]
    elif masks.keep["intermediate"].all():
        hidden, counts = _hidden_within(topology, masks, hidden, step, budget), intermediate
    else:
        counts = _share_budget(topology, masks, hidden, intermediate_multiple, budget)
    # Heads stay those of the masks, which need not be a layer's best by score.
    resized = keep_widths(masks, hidden, counts, kv_heads)
    return replace(masks, keep=resized.keep | {"kv_heads": masks.keep["kv_heads"]})


def _hidden_step(topology: Topology, hidden: int, multiple: int, kv_heads: int) -> int:
    """What a hidden width is a multiple of so that a config with so many heads takes it; 0 heads: the multiple."""
    if hidden == topology.hidden:
        return topology.hidden  # stays whole
    step = lcm(multiple, topology.hidden_divisor(kv_heads)) if kv_heads else multiple
    if step > topology.hidden:
        raise ValueError(
            f"adapt_dimensions.multiple.hidden = {multiple}: no multiple of it is a hidden width that the model's "
            f"config takes with {kv_heads * topology.group_size} heads; use a smaller one, or compact.layout uneven"
        )
    return step


def _nearest_hidden(topology: Topology, hidden: int, step: int) -> int:
    return nearest_multiple(hidden, step, topology.hidden // step * step)


def _hidden_within(topology: Topology, masks: Masks, hidden: int, step: int, budget: float) -> int:
    """The largest hidden width within the budget of those that are whole steps below this one, units and heads kept."""
    _, units, kv_heads = (masks.widths()[axis] for axis in AXES)
    for width in range(hidden, 0, -step):
        if float(decoder_parameters(topology, torch.tensor(width), units, kv_heads)) <= budget:
            return width
    raise ValueError(
        f"adapt_dimensions.multiple.hidden = {step}: no hidden width in multiples of it meets sparsity = "
        f"{1 - budget / dense_decoder_parameters(topology):.4g} where intermediate is whole; use a smaller one"
    )


def _share_budget(topology: Topology, masks: Masks, hidden: int, multiple: int, budget: float) -> list[int]:
    """Intermediate widths per layer, in multiples, that fill the parameter budget with the best groups."""
    ranked = torch.sort(masks.score["intermediate"], dim=-1, descending=True).values
    groups = ranked.view(topology.layers, -1, multiple).double().mean(-1)
    present = masks.keep["intermediate"].any(-1)
    order = sorted(
        (-float(groups[layer, group]), group, layer)
        for layer in present.nonzero().flatten().tolist()
        for group in range(1, groups.shape[1])
    )
    counts = (multiple * present).tolist()
    kv_heads = masks.widths()["kv_heads"]
    used = float(decoder_parameters(topology, torch.tensor(hidden), torch.tensor(counts), kv_heads))
    if used > budget:
        raise ValueError(
            f"sparsity = {1 - budget / dense_decoder_parameters(topology):.4g}: one multiple of {multiple} a layer "
            "already exceeds the budget; use a smaller adapt_dimensions.multiple"
        )
    group_parameters = (3 * hidden + 2 * topology.mlp_bias) * multiple
    # Groups of a layer come in order, since their means descend; ties go to the earlier group.
    for _, _, layer in order[: int((budget - used) // group_parameters)]:
        counts[layer] += multiple
    return counts


def adapt_metrics(topology: Topology, before: Masks, after: Masks, target_sparsity: float | None) -> dict[str, Any]:
    """metrics/adapt.json: sparsities as shares of the decoder layers' parameters, widths in units.

    target_sparsity: None where the masks were not learned for one.
    """
    return {
        **({} if target_sparsity is None else {"target_sparsity": target_sparsity}),
        "sparsity_before": sparsity(topology, before.widths()),
        "sparsity_decoder": sparsity(topology, after.widths()),
        "hidden_before": float(before.keep["hidden"].sum()),
        "hidden_after": float(after.keep["hidden"].sum()),
        "intermediate_mean_before": float(before.keep["intermediate"].sum(-1).double().mean()),
        "intermediate_mean_after": float(after.keep["intermediate"].sum(-1).double().mean()),
        "kv_heads_kept": float(after.keep["kv_heads"].sum()),
    }
