"""Masks, their projection onto a budget and their adaptation: what the property tests do not cover."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tiny_models import FAMILIES, random_masks, random_mean_inputs, random_update, tiny_model
from tvaprune.architecture.parameter_counts import (
    decoder_parameters,
    dense_decoder_parameters,
    kept_decoder_parameters,
    shared_parameters,
    sparsity,
    unit_costs,
)
from tvaprune.architecture.topology import Topology, reader_shapes
from tvaprune.artifacts import ArtifactError
from tvaprune.export.card import _quality
from tvaprune.masks.adapt import adapt, adapt_metrics, nearest_multiple
from tvaprune.masks.importance import lost_by_width
from tvaprune.masks.masks import Masks, read_masks, write_masks
from tvaprune.masks.projection import UnreachableSparsityError, keep_above, keep_best, project, solve_threshold
from tvaprune.masks.update import WeightUpdate, perplexities_after, read_update, weight_update, write_update
from tvaprune.options.axes import AXES
from tvaprune.options.choices import Fold

TOPOLOGY = Topology(layers=4, hidden=64, intermediate=96, kv_heads=4, group_size=2, head_dim=8)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dense_count_is_the_models_own(family: str) -> None:
    """Every parameter of the model is in a decoder layer or shared; none is counted twice."""
    model = tiny_model(family)
    topology = Topology.of(model.config)
    in_layers = sum(weight.numel() for name, weight in model.named_parameters() if ".layers." in name)
    assert dense_decoder_parameters(topology) == in_layers
    tied = model.config.tie_word_embeddings
    everything = sum(weight.numel() for weight in model.parameters())
    assert in_layers + shared_parameters(topology, 64, model.config.vocab_size, tied) == everything


def test_the_count_is_the_papers_formula_for_a_model_without_biases() -> None:
    """Section 3.1: sum over layers of 2·head_dim·k·h·(1+G) + 3·m·h + 2·h."""
    h, m, k = torch.tensor(50), torch.tensor([96, 1, 40, 7]), torch.tensor([4, 1, 2, 3])
    expected = sum(2 * 8 * kk * 50 * 3 + 3 * mm * 50 + 2 * 50 for mm, kk in zip(m.tolist(), k.tolist(), strict=True))
    assert int(decoder_parameters(TOPOLOGY, h, m, k)) == expected


def test_an_empty_block_loses_its_norm_too() -> None:
    h, full = torch.tensor(64), torch.full((4,), 96)
    some = torch.tensor([0, 4, 4, 4])
    whole = decoder_parameters(TOPOLOGY, h, full, torch.full((4,), 4))
    assert int(whole - decoder_parameters(TOPOLOGY, h, full, some)) == 2 * 8 * 4 * 64 * 3 + 64


def test_unit_costs_are_what_one_unit_more_adds() -> None:
    h, m, k = torch.tensor(50), torch.tensor([90, 20, 40, 7]), torch.tensor([3, 1, 2, 3])
    costs = unit_costs(TOPOLOGY, h, m, k)
    base = decoder_parameters(TOPOLOGY, h, m, k)
    one = torch.tensor([0, 1, 0, 0])
    assert costs["hidden"] == decoder_parameters(TOPOLOGY, h + 1, m, k) - base
    assert costs["intermediate"][1] == decoder_parameters(TOPOLOGY, h, m + one, k) - base
    assert costs["kv_heads"][1] == decoder_parameters(TOPOLOGY, h, m, k + one) - base


def test_keep_is_strictly_above_the_threshold() -> None:
    scores = {axis: torch.zeros(TOPOLOGY.gate_shape(axis)) for axis in AXES}
    scores["hidden"][3] = 1e-6
    keep = keep_above(scores, 0.0)
    assert keep["hidden"].nonzero().flatten().tolist() == [3]
    assert not keep["intermediate"].any()


def test_ties_go_to_the_lower_index() -> None:
    assert keep_best(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]), 3).tolist() == [True, True, False, True, False]


def test_at_least_one_hidden_dimension_stays_and_it_is_the_best() -> None:
    scores = {axis: torch.zeros(TOPOLOGY.gate_shape(axis)) for axis in AXES}
    scores["hidden"][5] = 0.5
    assert keep_above(scores, 9.0)["hidden"].nonzero().flatten().tolist() == [5]


def test_an_unreachable_sparsity_names_it_and_what_is_reachable() -> None:
    masks = random_masks(TOPOLOGY, seed=0)
    with pytest.raises(UnreachableSparsityError, match=r"sparsity = 0\.9: the pruned axes reach 0\.4\d\d at most"):
        project(TOPOLOGY, masks.score, 0.9, axes=("kv_heads",))


def test_equal_scores_are_dropped_no_further_than_the_budget_asks() -> None:
    """All scores equal: a threshold alone would keep everything or nothing."""
    masks = Masks.dense(TOPOLOGY)
    projected = project(TOPOLOGY, masks.score, 0.2, axes=("intermediate",))
    assert sparsity(TOPOLOGY, projected.widths()) >= 0.2
    assert projected.keep["hidden"].all()


def test_the_threshold_is_the_lowest_that_fits() -> None:
    masks = random_masks(TOPOLOGY, seed=3)
    budget = 0.7 * dense_decoder_parameters(TOPOLOGY)
    threshold = solve_threshold(TOPOLOGY, masks.score, 0.3)
    assert kept_decoder_parameters(TOPOLOGY, keep_above(masks.score, threshold)) <= budget
    below = float(torch.nextafter(torch.tensor(threshold), torch.tensor(-torch.inf)))
    assert kept_decoder_parameters(TOPOLOGY, keep_above(masks.score, below)) > budget


def test_masks_read_back_as_written(tmp_path: Path) -> None:
    masks = random_masks(TOPOLOGY, seed=1)
    write_masks(tmp_path / "masks", masks, method="tva", target_sparsity=0.2)
    again = read_masks(tmp_path / "masks", TOPOLOGY)
    for axis in AXES:
        assert torch.equal(masks.keep[axis], again.keep[axis])
        assert torch.equal(masks.score[axis], again.score[axis])
    meta = json.loads((tmp_path / "masks" / "meta.json").read_text())
    assert meta["widths"]["kv_heads"] == masks.keep["kv_heads"].sum(-1).tolist()
    assert meta["polarity"] == "True = keep"


def test_an_update_reads_back_as_written_and_none_keeps_biases_and_matrices(tmp_path: Path) -> None:
    shapes = reader_shapes(TOPOLOGY)
    update = replace(
        random_update(TOPOLOGY, seed=1),
        mean_input=random_mean_inputs(TOPOLOGY),
        weight={name: torch.randn(shapes[name]).bfloat16() for name in list(shapes)[:3]},
    )
    write_update(tmp_path, update, made_with={})
    again = read_update(tmp_path, TOPOLOGY)
    for part in ("scale", "mean_input", "channel_scale", "weight"):
        assert getattr(update, part).keys() == getattr(again, part).keys()
        assert all(torch.equal(value, getattr(again, part)[name]) for name, value in getattr(update, part).items())
    assert weight_update(TOPOLOGY, update, "mean") is update
    none = weight_update(TOPOLOGY, update, "none")
    assert (none.mean_input, none.weight) == (update.mean_input, update.weight)
    assert not none.channel_scale
    assert all((scale == 1).all() for scale in none.scale.values())


def test_the_perplexity_that_is_told_is_that_of_what_is_folded() -> None:
    measured = {"dense": 10.0, "mean": 12.0, "binary": 20.0}
    scaled, nothing = random_update(TOPOLOGY, seed=1), WeightUpdate.none(TOPOLOGY)
    biased = WeightUpdate.none(TOPOLOGY, random_mean_inputs(TOPOLOGY))

    def told(learned: WeightUpdate, method: Fold) -> set[str]:
        return set(perplexities_after(measured, learned, weight_update(TOPOLOGY, learned, method)))

    assert told(WeightUpdate(scaled.scale), "mean") == {"dense", "mean", "binary"}
    assert told(WeightUpdate(scaled.scale), "none") == {"dense", "binary"}
    assert told(nothing, "none") == {"dense", "mean", "binary"}
    assert told(biased, "mean") == told(biased, "none") == {"dense", "mean"}
    assert told(replace(biased, scale=scaled.scale), "none") == {"dense"}
    assert "20.0, dense model 10.0" in _quality({"validation_ppl_dense": 10.0, "validation_ppl_binary": 20.0})
    assert not _quality({"validation_ppl_dense": 10.0})


@pytest.mark.parametrize(
    ("changed", "named"), [({"intermediate": 128}, "intermediate.scale"), ({"layers": 3}, "inter")]
)
def test_an_update_of_another_model_is_refused(tmp_path: Path, changed: dict, named: str) -> None:
    write_update(tmp_path, random_update(TOPOLOGY, seed=1))
    with pytest.raises(ArtifactError, match=named):
        read_update(tmp_path, replace(TOPOLOGY, **changed))


@pytest.mark.parametrize(
    ("weight", "named"),
    [
        ({"model.layers.0.mlp.down_proj.weight": torch.ones(64, 80)}, r"is \(64, 80\), but the model needs \(64, 96\)"),
        ({"model.layers.9.mlp.down_proj.weight": torch.ones(64, 96)}, "no o_proj or down_proj of this model"),
        ({"model.layers.0.mlp.down_proj.weight": torch.full((64, 96), torch.nan)}, "not finite"),
    ],
)
def test_matrices_that_do_not_fit_are_refused(tmp_path: Path, weight: dict, named: str) -> None:
    write_update(tmp_path, WeightUpdate.none(TOPOLOGY, weight=weight))
    with pytest.raises(ArtifactError, match=named):
        read_update(tmp_path, TOPOLOGY)


def test_masks_of_another_model_are_refused(tmp_path: Path) -> None:
    write_masks(tmp_path, random_masks(TOPOLOGY, seed=1))
    with pytest.raises(ArtifactError, match=r"intermediate\.keep is \(4, 96\), but the model needs \(4, 128\)"):
        read_masks(tmp_path, replace(TOPOLOGY, intermediate=128))


@pytest.mark.parametrize(
    ("count", "expected"), [(0, 16), (1, 16), (7, 16), (23, 16), (24, 32), (39, 32), (40, 48), (95, 96), (96, 96)]
)
def test_nearest_multiple_is_equation_3_clamped(count: int, expected: int) -> None:
    """n' = floor((n + T/2) / T) · T: halves go up; at least one multiple."""
    assert nearest_multiple(count, 16, 96) == expected


def test_nearest_multiple_of_an_odd_multiple_matches_equation_3() -> None:
    for count in range(3, 99):
        assert nearest_multiple(count, 9, 99) == max(9, int((count + 9 / 2) // 9) * 9)


@pytest.mark.parametrize("rounding", ["nearest", "budget"])
def test_a_layer_without_an_mlp_stays_without_one(rounding: str) -> None:
    masks = project(TOPOLOGY, random_masks(TOPOLOGY, seed=2).score, 0.5)
    masks.keep["intermediate"][2] = False
    adapted = adapt(TOPOLOGY, masks, 0.5, rounding, 16, 16)  # type: ignore[arg-type]
    widths = adapted.widths()["intermediate"]
    assert int(widths[2]) == 0
    assert (widths[torch.tensor([0, 1, 3])] >= 16).all()


def test_groups_of_units_are_ranked_by_their_mean_score() -> None:
    """There is room for one group more than each layer's first: the one of mean 2, whose worst unit is a bad one."""
    masks = Masks.dense(TOPOLOGY)
    scores = torch.full((4, 96), -3.0)
    scores[:, :16], scores[0, 16:24], scores[0, 24:32], scores[1, 16:32] = 9.0, 5.0, -1.0, 1.0
    kept = torch.tensor([32, 16, 16, 16])
    target = sparsity(TOPOLOGY, {**masks.widths(), "intermediate": kept}) - 1e-6
    masks = Masks({**masks.keep, "intermediate": scores > 0}, {**masks.score, "intermediate": scores})
    adapted = adapt(TOPOLOGY, masks, target, "budget", 64, 16)
    assert torch.equal(adapted.widths()["intermediate"], kept)


def test_a_width_loses_the_importance_and_the_parameters_of_the_units_it_leaves_out() -> None:
    masks = random_masks(TOPOLOGY, seed=3)
    full = [torch.tensor(64), *(torch.full((4,), TOPOLOGY.width(axis)) for axis in AXES[1:])]
    for axis, cost in unit_costs(TOPOLOGY, *full).items():
        lost = lost_by_width(TOPOLOGY, masks, axis, steepness=2.0)
        scores = masks.score[axis].double().view(-1, TOPOLOGY.width(axis)).sort(-1, descending=True).values
        for width in (0, 1, TOPOLOGY.width(axis)):
            left_out = (float(cost.flatten()[0]) * (2 * scores[:, width:]).exp()).sum(-1)
            torch.testing.assert_close(lost[:, width], left_out)


def test_kv_heads_are_left_as_they_are() -> None:
    masks = project(TOPOLOGY, random_masks(TOPOLOGY, seed=2).score, 0.5)
    assert torch.equal(adapt(TOPOLOGY, masks, 0.5, "budget", 8, 8).keep["kv_heads"], masks.keep["kv_heads"])


@pytest.mark.parametrize(("hidden", "intermediate", "named"), [(48, 16, "hidden = 48"), (16, 36, "intermediate = 36")])
def test_a_multiple_that_does_not_divide_is_named(hidden: int, intermediate: int, named: str) -> None:
    with pytest.raises(ValueError, match=rf"adapt_dimensions\.multiple\.{named}"):
        adapt(TOPOLOGY, Masks.dense(TOPOLOGY), 0.2, "nearest", hidden, intermediate)


def test_a_budget_below_one_multiple_a_layer_is_refused() -> None:
    masks = project(TOPOLOGY, random_masks(TOPOLOGY, seed=2).score, 0.9)
    with pytest.raises(ValueError, match=r"sparsity = 0\.95: one multiple of 96 a layer"):
        adapt(TOPOLOGY, masks, 0.95, "budget", 8, 96)


def test_adapt_metrics_tell_before_from_after() -> None:
    masks = project(TOPOLOGY, random_masks(TOPOLOGY, seed=5).score, 0.3)
    after = adapt(TOPOLOGY, masks, 0.3, "nearest", 16, 16)
    report = adapt_metrics(TOPOLOGY, masks, after, 0.3)
    assert report["hidden_before"] == _count(masks.keep["hidden"])
    assert report["hidden_after"] == _count(after.keep["hidden"])
    assert report["sparsity_decoder"] == sparsity(TOPOLOGY, after.widths())
    assert report["intermediate_mean_after"] == _count(after.keep["intermediate"]) / 4


def _count(keep: Tensor) -> int:
    return int(keep.sum())
