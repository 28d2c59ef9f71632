"""Projection and adaptation on random topologies and scores."""

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny_models import random_masks
from tvaprune.architecture.parameter_counts import (
    decoder_parameters,
    dense_decoder_parameters,
    dense_unit_costs,
    kept_decoder_parameters,
)
from tvaprune.architecture.topology import Topology
from tvaprune.masks.adapt import adapt, nearest_multiple
from tvaprune.masks.masks import Masks
from tvaprune.masks.projection import (
    UnreachableSparsityError,
    keep_above,
    keep_best,
    level_layers,
    project,
    solve_threshold,
)
from tvaprune.options.axes import AXES, Axis
from tvaprune.options.choices import Layout, Rounding

topologies = st.builds(
    Topology,
    layers=st.integers(1, 4),
    hidden=st.sampled_from([32, 64]),
    intermediate=st.sampled_from([48, 96]),
    kv_heads=st.integers(1, 4),
    group_size=st.integers(1, 3),
    head_dim=st.sampled_from([4, 8]),
    attention_bias=st.booleans(),
    output_bias=st.booleans(),
    mlp_bias=st.booleans(),
    qk_norm=st.booleans(),
)
targets = st.floats(0.05, 0.8)
seeds = st.integers(0, 2**16)


def dearest_unit(topology: Topology) -> float:
    """The parameters of the most expensive unit, its block's norm included."""
    return (
        max(float(cost.max()) for cost in dense_unit_costs(topology).values()) + topology.hidden + 2 * topology.head_dim
    )


@settings(max_examples=60, deadline=None)
@given(topology=topologies, target=targets, seed=seeds)
def test_projection_meets_the_budget_from_below_and_closely(topology: Topology, target: float, seed: int) -> None:
    """No dropped unit has room in what is left of the budget."""
    masks = project(topology, random_masks(topology, seed).score, target)
    budget = (1 - target) * dense_decoder_parameters(topology)
    assert kept_decoder_parameters(topology, masks.keep) <= budget
    for axis in AXES:
        flat = masks.keep[axis].view(-1)
        for index in (~flat).nonzero().flatten().tolist():
            flat[index] = True
            assert kept_decoder_parameters(topology, masks.keep) > budget
            flat[index] = False
    assert int(masks.keep["hidden"].sum()) >= 1


@settings(max_examples=60, deadline=None)
@given(topology=topologies, target=targets, seed=seeds)
def test_projection_prefers_higher_scores_and_puts_the_threshold_at_zero(
    topology: Topology, target: float, seed: int
) -> None:
    """Every unit above the threshold stays, one below it only where room was left over."""
    before = random_masks(topology, seed)
    masks = project(topology, before.score, target)
    for axis in AXES:
        assert masks.keep[axis][masks.score[axis] > 0].all()
        order = before.score[axis].flatten().argsort()
        assert torch.equal(order, masks.score[axis].flatten().argsort())


@settings(max_examples=30, deadline=None)
@given(topology=topologies, seed=seeds, low=targets, high=targets)
def test_more_sparsity_keeps_a_subset_with_fewer_parameters(
    topology: Topology, seed: int, low: float, high: float
) -> None:
    """One threshold gives nested sets; filling up what room is left moves a projection by one unit at most."""
    low, high = min(low, high), max(low, high)
    masks = random_masks(topology, seed)
    more, fewer = (keep_above(masks.score, solve_threshold(topology, masks.score, target)) for target in (low, high))
    assert all(bool((more[axis] | ~fewer[axis]).all()) for axis in AXES)
    kept = [kept_decoder_parameters(topology, project(topology, masks.score, target).keep) for target in (low, high)]
    assert kept[1] < kept[0] + dearest_unit(topology)


@settings(max_examples=30, deadline=None)
@given(topology=topologies, target=targets, seed=seeds)
def test_projection_of_shifted_scores_is_the_same(topology: Topology, target: float, seed: int) -> None:
    """Only the order and the differences of scores matter; exact in binary for whole numbers."""
    masks = random_masks(topology, seed)
    rounded = replace(masks, score={axis: (score * 64).round() for axis, score in masks.score.items()})
    shifted = replace(masks, score={axis: score + 8 for axis, score in rounded.score.items()})
    one, other = project(topology, rounded.score, target), project(topology, shifted.score, target)
    assert all(torch.equal(one.keep[axis], other.keep[axis]) for axis in AXES)


@settings(max_examples=60, deadline=None)
@given(topology=topologies, target=targets, seed=seeds, multiple=st.sampled_from([1, 4, 8, 16]))
def test_nearest_gives_multiples_of_the_best_units(topology: Topology, target: float, seed: int, multiple: int) -> None:
    before = project(topology, random_masks(topology, seed).score, target)
    after = adapt(topology, before, target, "nearest", multiple, multiple)
    vectors = [(before.keep["hidden"], after.keep["hidden"], after.score["hidden"], topology.hidden)]
    for layer in range(topology.layers):
        parts = (masks.keep["intermediate"][layer] for masks in (before, after))
        vectors.append((*parts, after.score["intermediate"][layer], topology.intermediate))
    for was, now, score, width in vectors:
        count = int(was.sum())
        assert int(now.sum()) == (nearest_multiple(count, multiple, width) if count else 0)
        assert abs(int(now.sum()) - count) <= max(multiple / 2, multiple - count) or not count
        if 0 < int(now.sum()) < width:
            assert score[now].min() >= score[~now].max()


@settings(max_examples=60, deadline=None)
@given(topology=topologies, target=st.floats(0.05, 0.6), seed=seeds, multiple=st.sampled_from([1, 4, 8]))
def test_budget_gives_multiples_within_the_target_or_says_why_not(
    topology: Topology, target: float, seed: int, multiple: int
) -> None:
    before = project(topology, random_masks(topology, seed).score, target)
    try:
        after = adapt(topology, before, target, "budget", multiple, multiple)
    except ValueError as error:
        if "already exceeds the budget" not in str(error):
            raise
        return
    widths = after.widths()
    assert int(widths["hidden"]) % multiple == 0
    assert (widths["intermediate"] % multiple == 0).all()
    budget = (1 - target) * dense_decoder_parameters(topology)
    kept = kept_decoder_parameters(topology, after.keep)
    assert kept <= budget
    group = (3 * int(widths["hidden"]) + 2 * topology.mlp_bias) * multiple
    full = (widths["intermediate"] == topology.intermediate) | (before.keep["intermediate"].sum(-1) == 0)
    assert kept + group > budget or bool(full.all())


@settings(max_examples=40, deadline=None)
@given(topology=topologies, seed=seeds)
def test_fewer_units_are_never_more_parameters(topology: Topology, seed: int) -> None:
    masks = random_masks(topology, seed)
    counts = [masks.keep["hidden"].sum(), masks.keep["intermediate"].sum(-1), masks.keep["kv_heads"].sum(-1)]
    fewer = [(count - 1).clamp(min=0) for count in counts]
    assert decoder_parameters(topology, *fewer) < decoder_parameters(topology, *counts)
    assert kept_decoder_parameters(topology, Masks.dense(topology).keep) == dense_decoder_parameters(topology)


@settings(max_examples=60, deadline=None)
@given(layers=st.integers(1, 4), units=st.integers(1, 40), seed=seeds)
def test_level_scores_keep_as_many_of_every_layer_and_its_best(layers: int, units: int, seed: int) -> None:
    scores = torch.randn(layers, units, generator=torch.Generator().manual_seed(seed)).round(decimals=1)
    level = level_layers(scores)
    for threshold in level.unique():
        keep = level > threshold
        (count,) = keep.sum(-1).unique().tolist()
        assert all(torch.equal(kept, keep_best(score, count)) for kept, score in zip(keep, scores, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    topology=topologies,
    target=st.floats(0.05, 0.5),
    seed=seeds,
    multiple=st.sampled_from([1, 4, 8]),
    axes=st.sets(st.sampled_from(AXES), min_size=1, max_size=2),
    rounding=st.sampled_from(["budget", "nearest"]),
    layout=st.sampled_from(["uneven", "padded"]),
)
def test_an_axis_that_is_not_pruned_stays_whole(
    topology: Topology, target: float, seed: int, multiple: int, axes: set[Axis], rounding: Rounding, layout: Layout
) -> None:
    """Also where hidden rounds up, or where the widest layer's heads do not fit a whole hidden width."""
    pruned = tuple(axis for axis in AXES if axis in axes)
    heads_divide = topology.hidden % (topology.kv_heads * topology.group_size) == 0  # as of every LlamaConfig
    topology = replace(topology, heads_divide_hidden=heads_divide)
    try:
        before = project(topology, random_masks(topology, seed).score, target, pruned)
        after = adapt(topology, before, target, rounding, multiple, multiple, layout=layout)
    except ValueError as error:
        if not isinstance(error, UnreachableSparsityError) and "use a smaller" not in str(error):
            raise
        return
    for axis in AXES:
        assert axis in axes or after.keep[axis].all()
    if layout == "padded":
        heads = topology.stock_heads(int(after.widths()["hidden"]), max(1, int(after.widths()["kv_heads"].max())))
        assert int(after.widths()["hidden"]) % topology.hidden_divisor(heads) == 0
    if rounding == "budget":
        assert kept_decoder_parameters(topology, after.keep) <= (1 - target) * dense_decoder_parameters(topology)
