"""Widths by a measured table on random models, masks and tables."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from tests.tiny_models import random_masks, stairs_table
from tvaprune.architecture.parameter_counts import dense_decoder_parameters, kept_decoder_parameters, sparsity
from tvaprune.architecture.topology import LayerWidths, Topology
from tvaprune.masks.adapt import adapt
from tvaprune.masks.importance import STEEP, lost_by_width
from tvaprune.masks.latency_budget import LatencyBudget, upper_hull
from tvaprune.masks.latency_table import AIM, PHASES, LatencyTable
from tvaprune.masks.masks import Masks
from tvaprune.masks.measured import widths_within_parameters
from tvaprune.masks.projection import keep_widths, project
from tvaprune.options.axes import AXES, Axis
from tvaprune.options.choices import Layout

LAYOUTS: tuple[Layout, ...] = ("uneven", "uniform", "padded")
topologies = st.builds(
    Topology,
    layers=st.integers(1, 3),
    hidden=st.sampled_from([32, 64]),
    intermediate=st.just(48),
    kv_heads=st.integers(1, 3),
    group_size=st.integers(1, 2),
    head_dim=st.sampled_from([4, 8]),
    attention_bias=st.booleans(),
    mlp_bias=st.booleans(),
    heads_divide_hidden=st.booleans(),
)
targets = st.floats(0.1, 0.6)
seeds = st.integers(0, 2**16)
close = 1 + 2e-4  # the solver's own gap


def lost(topology: Topology, masks: Masks) -> float:
    total = 0.0
    for axis, kept in masks.widths().items():
        by_width = lost_by_width(topology, masks, axis, STEEP)
        total += sum(float(row[n]) for row, n in zip(by_width, kept.reshape(-1).tolist(), strict=True))
    return total


def latency(table: LatencyTable, masks: Masks) -> float:
    widths = masks.widths()
    return table.predict("request", int(widths["hidden"]), widths["intermediate"].tolist(), widths["kv_heads"].tolist())


@settings(max_examples=40, deadline=None)
@given(topology=topologies, target=targets, seed=seeds, layout=st.sampled_from(LAYOUTS), slack=st.floats(0, 0.2))
def test_the_parameters_are_met_and_the_widths_are_the_tables(
    topology: Topology, target: float, seed: int, layout: Layout, slack: float
) -> None:
    masks = project(topology, random_masks(topology, seed).score, target)
    measured = stairs_table(topology, seed)
    try:
        chosen = widths_within_parameters(topology, masks, measured, "request", layout, target, slack)
    except ValueError:
        assert layout != "uneven", "without heads and units nothing is left to count"
        return
    after = keep_widths(masks, chosen.hidden, chosen.intermediate, chosen.kv_heads)
    kept = kept_decoder_parameters(topology, after.keep)
    assert kept <= (1 - target) * dense_decoder_parameters(topology)
    assert kept == pytest.approx(chosen.parameters)
    assert lost(topology, after) == pytest.approx(chosen.lost, rel=1e-9)
    assert chosen.hidden in measured.hidden
    assert set(chosen.intermediate) <= set(measured.intermediate)
    if layout != "uneven":
        assert chosen.hidden % topology.hidden_divisor(max(1, *chosen.kv_heads)) == 0
    if layout == "uniform":
        assert len(set(chosen.intermediate)) == len(set(chosen.kv_heads)) == 1


# One layer, whose attention the masks drop.
@example(topology=Topology(1, 64, 48, 1, 1, 4), target=0.5, seed=97, slack=0.0, multiple=16, layout="uneven")
@settings(max_examples=40, deadline=None)
@given(
    topology=topologies, target=targets, seed=seeds, slack=st.floats(0, 0.2), multiple=st.sampled_from([16, 48]),
    layout=st.sampled_from(["uneven", "uniform"]),
)  # fmt: skip
def test_never_worse_than_rounding_to_multiples(
    topology: Topology, target: float, seed: int, slack: float, multiple: int, layout: Layout
) -> None:
    """Rounding that meets the budget loses more than the slack allows, or is no faster at the same size."""
    masks = project(topology, random_masks(topology, seed).score, target)
    measured = stairs_table(topology, seed)
    try:
        rounded = adapt(topology, masks, target, "budget", 16, multiple, layout=layout)
    except ValueError:
        assume(False)
    assume(bool((rounded.widths()["kv_heads"] > 0).all() or layout == "uneven"))
    least = widths_within_parameters(topology, masks, measured, "request", layout, target, 0.0)
    chosen = widths_within_parameters(topology, masks, measured, "request", layout, target, slack)
    # Axes and blocks that the masks keep whole stay whole; a rounding that prunes them is no candidate.
    whole = all(bool(rounded.keep[axis].all()) for axis, keep in masks.keep.items() if keep.all())
    if whole and bool((rounded.keep["intermediate"].any(-1) == masks.keep["intermediate"].any(-1)).all()):
        assert least.lost <= lost(topology, rounded) * close
    within = lost(topology, rounded) <= (1 + slack) * least.lost
    same = kept_decoder_parameters(topology, rounded.keep) >= 0.995 * least.parameters
    assert chosen.kv_heads == least.kv_heads
    if within and same and rounded.widths()["kv_heads"].tolist() == least.kv_heads:
        assert chosen.latency_ms <= latency(measured, rounded) * 1.002


@settings(max_examples=25, deadline=None)
@given(seed=seeds, target=targets)
def test_as_good_as_trying_everything(seed: int, target: float) -> None:
    topology = Topology(layers=2, hidden=32, intermediate=48, kv_heads=2, group_size=1, head_dim=8)
    masks, measured = random_masks(topology, seed), stairs_table(topology, seed)
    for keep in masks.keep.values():
        keep[..., 0], keep[..., 1] = True, False  # nothing whole and nothing empty, so that every width above 0 counts
    per_layer = list(product(measured.intermediate[1:], measured.kv_heads[1:]))
    within = []
    for hidden, *layers in product(measured.hidden, per_layer, per_layer):
        intermediate, kv_heads = (list(counts) for counts in zip(*layers, strict=True))
        keep = {
            "hidden": torch.arange(32) < hidden,
            "intermediate": torch.arange(48)[None] < torch.tensor(intermediate)[:, None],
            "kv_heads": torch.arange(2)[None] < torch.tensor(kv_heads)[:, None],
        }
        if kept_decoder_parameters(topology, keep) <= (1 - target) * dense_decoder_parameters(topology):  # type: ignore[arg-type]
            within.append(lost(topology, replace(masks, keep=keep)))  # type: ignore[arg-type]
    if within:
        found = widths_within_parameters(topology, masks, measured, "decode", "uneven", target, 0.0)
        assert found.lost <= min(within) * close


def test_faster_widths_have_nearly_the_parameters_of_the_budget() -> None:
    """A third of the units has to go; the slack alone would let another third go, which is worth no more."""
    topology = Topology(layers=1, hidden=32, intermediate=48, kv_heads=1, group_size=1, head_dim=8)
    dense, score = Masks.dense(topology), torch.zeros(1, 48)
    score[0, :16] = 1.0
    masks = Masks({**dense.keep, "intermediate": torch.arange(48)[None] < 32}, {**dense.score, "intermediate": score})
    target = sparsity(topology, masks.widths()) - 1e-6
    for slack in (0.0, 1.5):
        chosen = widths_within_parameters(topology, masks, stairs_table(topology, 0), "decode", "uneven", target, slack)
        assert chosen.intermediate == [32]


@pytest.mark.parametrize(("slack", "widths"), [(0.0, [32, 32]), (0.45, [32, 32]), (0.55, [16, 48])])
def test_the_slack_is_how_much_more_may_be_lost_for_speed(slack: float, widths: list[int]) -> None:
    """Two thirds of one layer cost 1.5 times as much as a third of both, and nearly all of the time is saved there."""
    topology = Topology(layers=2, hidden=32, intermediate=48, kv_heads=1, group_size=1, head_dim=8)
    dense, score = Masks.dense(topology), torch.zeros(2, 48)
    score[:, :16], score[:, 16:32] = 1.0, math.log(2) / STEEP
    masks = Masks(
        {**dense.keep, "intermediate": torch.arange(48).expand(2, 48) < 32}, {**dense.score, "intermediate": score}
    )
    target = sparsity(topology, masks.widths()) - 1e-6
    times = torch.tensor([0.0, 1.0, 5.0, 5.1], dtype=torch.float64).expand(2, 4)
    table = stairs_table(topology, 0)
    table = replace(table, ms={**table.ms, "mlp": dict.fromkeys(PHASES, times)})
    chosen = widths_within_parameters(topology, masks, table, "decode", "uneven", target, slack)
    assert sorted(chosen.intermediate) == widths


rises = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=9)


@settings(max_examples=200, deadline=None)
@given(steps=rises, price=st.floats(0.01, 25))
def test_a_threshold_keeps_the_width_that_is_worth_most_after_its_price(
    steps: list[tuple[int, int]], price: float
) -> None:
    value, latency = [0.0], [0.0]
    for worth, time in steps:
        value.append(value[-1] + worth)
        latency.append(latency[-1] + time)
    found = upper_hull(value, latency)
    assert found.worth == sorted(found.worth, reverse=True)
    chosen = found.vertices[sum(worth > price for worth in found.worth)]
    gains = [worth - price * time for worth, time in zip(value, latency, strict=True)]
    assert gains[chosen] == pytest.approx(max(gains), abs=1e-6)


def test_the_last_step_of_a_block_carries_its_fixed_cost() -> None:
    """A step of 16 units takes 1 ms, and the block takes 4 ms more at any width but 0."""
    latency = [0.0, 5.0, 6.0, 7.0]
    assert upper_hull([0.0, 30.0, 34.0, 36.0], latency) == ([0, 1, 2, 3], [6.0, 4.0, 2.0])
    # Where the first units alone are not worth the fixed cost, they go together with those that share it.
    assert upper_hull([0.0, 10.0, 20.0, 21.0], latency) == ([0, 2, 3], [20 / 6, 1.0])
    assert upper_hull([0.0, 10.0, 20.0, 30.0], latency) == ([0, 3], [30 / 7])


def worths(topology: Topology, seed: int) -> dict[Axis, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {axis: torch.randn(topology.gate_shape(axis), generator=generator).exp().double() for axis in AXES}


def rising_table(topology: Topology, seed: int) -> LatencyTable:
    """Noise up and down, on times that rise."""
    rising, noise = stairs_table(topology, seed), torch.Generator().manual_seed(seed)

    def shaken(times: torch.Tensor) -> torch.Tensor:
        return times * (0.7 + 0.6 * torch.rand(times.shape, generator=noise, dtype=torch.float64))

    ms = {block: {of: shaken(times) for of, times in by.items()} for block, by in rising.ms.items()}
    return replace(rising, ms=ms).rising()


@settings(max_examples=40, deadline=None)
@given(topology=topologies, seed=seeds, share=st.floats(0.2, 1.0))
def test_widths_for_a_latency_keep_to_it_and_its_prediction_is_the_tables(
    topology: Topology, seed: int, share: float
) -> None:
    measured = rising_table(topology, seed)
    for by in measured.ms.values():
        for times in by.values():
            for axis in range(times.dim()):
                assert bool((times.diff(dim=axis) >= 0).all())
    budget = LatencyBudget(topology, measured, "request")
    try:
        budget.check(share)
    except ValueError:
        least = measured.predict("request", measured.hidden[0], [0] * topology.layers, [0] * topology.layers)
        assert least / measured.dense("request", topology) > share
        return
    current = LayerWidths.dense(topology)
    for _ in range(3):  # priced at the widths before
        chosen = budget.choose(worths(topology, seed), current, share)
        predicted = measured.predict("request", *chosen) / measured.dense("request", topology)
        assert budget.share(chosen) == pytest.approx(predicted)
        assert predicted <= share * (1 + 1e-9)
        current = chosen
    assert budget.choose(worths(topology, seed), LayerWidths.dense(topology), 1.0) == LayerWidths.dense(topology)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, share=st.floats(0.3, 0.99))
def test_widths_for_a_latency_are_within_a_step_of_trying_everything(seed: int, share: float) -> None:
    """One threshold takes the steps in the order of their worth, so at most the step that does not fit is missed."""
    topology = Topology(layers=2, hidden=32, intermediate=48, kv_heads=2, group_size=1, head_dim=8)
    measured, worth = rising_table(topology, seed), worths(topology, seed)
    axes: tuple[Axis, ...] = ("intermediate", "kv_heads")
    budget = LatencyBudget(topology, measured, "decode", axes)

    def kept(widths: LayerWidths) -> float:
        layers = [(worth[axis][layer], n) for axis in axes for layer, n in enumerate(getattr(widths, axis))]
        return sum(float(units.sort(descending=True).values[:n].sum()) for units, n in layers)

    per_layer = list(product(measured.intermediate, measured.kv_heads))
    every = [LayerWidths(32, [one[0], two[0]], [one[1], two[1]]) for one, two in product(per_layer, per_layer)]
    fast = [widths for widths in every if budget.share(widths) <= share]
    if not fast:
        with pytest.raises(ValueError, match="learn_masks\\.latency\\.ratio"):
            budget.check(share)
        return
    best = max(kept(widths) for widths in fast)
    steps = [(units.sort(descending=True).values.sum()) for axis in axes for units in worth[axis]]
    assert kept(budget.choose(worth, LayerWidths.dense(topology), share)) >= best - float(max(steps))


def test_axes_out_of_play_stay_whole_and_a_latency_out_of_reach_is_refused() -> None:
    topology = Topology(layers=2, hidden=64, intermediate=48, kv_heads=2, group_size=1, head_dim=8)
    budget = LatencyBudget(topology, rising_table(topology, 1), "decode", ("intermediate",))
    chosen = budget.choose(worths(topology, 1), LayerWidths.dense(topology), 0.9)
    assert (chosen.hidden, chosen.kv_heads) == (64, [2, 2])
    assert min(chosen.intermediate) < 48
    with pytest.raises(ValueError, match=r"learn_masks\.latency\.ratio = 0\.01: the narrowest .*add axes"):
        budget.check(AIM * 0.01)


def test_heavier_prices_of_hidden_drop_hidden_first() -> None:
    """All times are in the vocabulary product: nothing but the hidden width makes a token faster."""
    topology = Topology(layers=2, hidden=64, intermediate=48, kv_heads=2, group_size=1, head_dim=8)
    measured = stairs_table(topology, 0)
    ms = {block: {of: torch.zeros_like(times) for of, times in by.items()} for block, by in measured.ms.items()}
    ms["rest"] = {of: torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64) for of in PHASES}
    budget = LatencyBudget(topology, replace(measured, ms=ms), "decode")
    assert budget.choose(worths(topology, 0), LayerWidths.dense(topology), 0.75) == LayerWidths(48, [48, 48], [2, 2])
