"""Widths by a measured table on random models, masks and tables."""

from itertools import product

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from tests.tiny_models import random_masks
from tvaprune.architecture.parameter_counts import dense_decoder_parameters, kept_decoder_parameters
from tvaprune.architecture.topology import Topology
from tvaprune.masks.adapt import Layout, adapt
from tvaprune.masks.importance import STEEP, lost_by_width
from tvaprune.masks.latency_table import AIM, PHASES, LatencyTable
from tvaprune.masks.masks import Masks
from tvaprune.masks.measured import widths_within_latency, widths_within_parameters
from tvaprune.masks.projection import keep_widths, project

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


def table(topology: Topology, seed: int, step: int = 16) -> LatencyTable:
    """Latencies that rise with the width, each step by another height."""
    generator = torch.Generator().manual_seed(seed)

    def stairs(*shape: int) -> dict:
        rise = {phase: torch.rand(shape, generator=generator, dtype=torch.float64) + 0.05 for phase in PHASES}
        return {phase: steps.cumsum(0).cumsum(-1) for phase, steps in rise.items()}

    hidden = list(range(16, topology.hidden + 1, 16))
    intermediate, kv_heads = list(range(0, 49, step)), list(range(topology.kv_heads + 1))
    ms = {
        "rest": {phase: steps.flatten() for phase, steps in stairs(len(hidden), 1).items()},
        "attention": stairs(len(hidden), len(kv_heads)),
        "mlp": stairs(len(hidden), len(intermediate)),
    }
    return LatencyTable(hidden, intermediate, kv_heads, ms, {}, {"decode_tokens": 3})  # type: ignore[arg-type]


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
    masks = project(topology, random_masks(topology, seed), target)
    measured = table(topology, seed)
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
    masks = project(topology, random_masks(topology, seed), target)
    measured = table(topology, seed)
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


@settings(max_examples=30, deadline=None)
@given(topology=topologies, target=st.floats(0.3, 0.9), seed=seeds, layout=st.sampled_from(LAYOUTS))
def test_a_latency_asked_for_is_kept_or_refused(topology: Topology, target: float, seed: int, layout: Layout) -> None:
    masks = project(topology, random_masks(topology, seed), 0.3)
    measured = table(topology, seed)
    ceiling = AIM * target * measured.dense("decode", topology)
    try:
        chosen = widths_within_latency(topology, masks, measured, "decode", layout, target)
    except ValueError:
        rest, attention, mlp = measured.parts("decode")
        least = 1 if layout == "uniform" else 0
        blocks = attention[:, least:].min(-1).values + mlp[:, least:].min(-1).values
        assert layout != "uneven" or float((rest + topology.layers * blocks).min()) > ceiling
        return
    predicted = measured.predict("decode", chosen.hidden, chosen.intermediate, chosen.kv_heads)
    assert predicted == pytest.approx(chosen.latency_ms)
    assert predicted <= ceiling * (1 + 1e-9)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, target=targets, latency_target=st.floats(0.3, 0.9))
def test_as_good_as_trying_everything(seed: int, target: float, latency_target: float) -> None:
    topology = Topology(layers=2, hidden=32, intermediate=48, kv_heads=2, group_size=1, head_dim=8)
    masks, measured = random_masks(topology, seed), table(topology, seed)
    for keep in masks.keep.values():
        keep[..., 0], keep[..., 1] = True, False  # nothing whole and nothing empty, so that every width above 0 counts
    per_layer = list(product(measured.intermediate[1:], measured.kv_heads[1:]))
    of_budget, of_latency, with_the_heads = [], [], []
    ceiling = AIM * latency_target * measured.dense("decode", topology)
    for hidden, *layers in product(measured.hidden, per_layer, per_layer):
        intermediate, kv_heads = (list(counts) for counts in zip(*layers, strict=True))
        keep = {
            "hidden": torch.arange(32) < hidden,
            "intermediate": torch.arange(48)[None] < torch.tensor(intermediate)[:, None],
            "kv_heads": torch.arange(2)[None] < torch.tensor(kv_heads)[:, None],
        }
        loses = lost(topology, masks.with_keep(keep))  # type: ignore[arg-type]
        if kept_decoder_parameters(topology, keep) <= (1 - target) * dense_decoder_parameters(topology):  # type: ignore[arg-type]
            of_budget.append(loses)
        if measured.predict("decode", hidden, intermediate, kv_heads) <= ceiling:
            of_latency.append(loses)
            if kv_heads == [1, 1]:  # as the masks
                with_the_heads.append(loses)
    if of_budget:
        found = widths_within_parameters(topology, masks, measured, "decode", "uneven", target, 0.0)
        assert found.lost <= min(of_budget) * close
    if of_latency:
        found = widths_within_latency(topology, masks, measured, "decode", "uneven", latency_target)
        assert found.lost <= min(with_the_heads or of_latency) * close
        assert not with_the_heads or found.kv_heads == [1, 1]
