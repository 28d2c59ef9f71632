"""Baselines: every score against a slow direct reference, every method on budget, whole groups, repeatable."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from scipy.stats import kendalltau
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from tests.tiny_models import random_masks, tiny_model
from tvaprune.architecture.parameter_counts import dense_decoder_parameters, kept_decoder_parameters, unit_costs
from tvaprune.architecture.topology import Topology
from tvaprune.baselines import bonsai, loraprune, registry
from tvaprune.baselines.activations import input_statistics
from tvaprune.baselines.allocation import (
    StagedPruning,
    allocate_balanced,
    allocate_global,
    allocate_uniform,
    percentiles,
)
from tvaprune.baselines.bonsai import candidate_modules, draw_mask, perplexity, prior_scores, submodel
from tvaprune.baselines.bonsai_fit import fit_coefficients, kendall_tau
from tvaprune.baselines.depth import depth, similarities
from tvaprune.baselines.flap import flap_scores
from tvaprune.baselines.llm_pruner import llm_pruner_scores
from tvaprune.baselines.loraprune import Adapter, ramp_share, step_scores
from tvaprune.baselines.magnitude import magnitude_scores, random
from tvaprune.baselines.nirvana import divergence, nirvana_scores
from tvaprune.baselines.osscar import _rounds, osscar, refit
from tvaprune.baselines.problem import Problem
from tvaprune.baselines.registry import score_baseline
from tvaprune.baselines.wanda_sp import wanda_scores
from tvaprune.gates.insertion import GatedModel, hard_gates
from tvaprune.masks.masks import Masks
from tvaprune.masks.projection import UnreachableSparsityError, keep_best, make_scores_match_mask
from tvaprune.masks.update import WeightUpdate, replaced
from tvaprune.methods import check_request
from tvaprune.options.axes import AXES, UNIT_AXES, Axis
from tvaprune.options.baselines import (
    BASELINE_OPTIONS,
    BonsaiOptions,
    DepthOptions,
    FlapOptions,
    LlmPrunerOptions,
    LoraPruneOptions,
    MagnitudeOptions,
    NirvanaOptions,
    OsscarOptions,
    RandomOptions,
    WandaSpOptions,
)
from tvaprune.options.masks import MaskRequest

WINDOWS = torch.randint(0, 128, (4, 20), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
QUICK: dict[str, Any] = {
    # The tiny models have three layers, all open.
    **{
        method: BASELINE_OPTIONS[method](protect_first=0, protect_last=0)
        for method in ("random", "magnitude", "llm_pruner")
    },
    "flap": FlapOptions(bias=False),
    "nirvana": NirvanaOptions(candidates=2, kl_windows=2),
    "bonsai": BonsaiOptions(prune_frac=0.2, submodels=10, submodel_windows=1, prior_windows=2),
    "loraprune": LoraPruneOptions(steps=6, prune_every=2, batch_size=1, protect_first=0, protect_last=0),
}
CASES = [
    (method, axes)
    for method in BASELINE_OPTIONS
    for axes in (AXES, UNIT_AXES, ("intermediate",), ("kv_heads",), ("hidden",))
    if set(axes) <= set(BASELINE_OPTIONS[method].axes) and (method != "depth" or axes == UNIT_AXES)
]


def problem_of(model: PreTrainedModel, axes: tuple[Axis, ...] = UNIT_AXES, **changed) -> Problem:
    given = {"windows": WINDOWS, "target_sparsity": 0.3, "progress": False} | changed
    return Problem(model, Topology.of(model.config), axes=axes, **given)


def score_and_update(
    method: str, family: str = "llama", sparsity: float = 0.3, axes: tuple[Axis, ...] = UNIT_AXES, **given
) -> tuple[Masks, WeightUpdate]:
    model = given.pop("model", None) or tiny_model(family)
    options = given.pop("options", None) or QUICK.get(method) or BASELINE_OPTIONS.get(method, RandomOptions)()
    check_request(MaskRequest(method, options, sparsity, axes), Topology.of(model.config))
    return score_baseline(method, problem_of(model, axes, target_sparsity=sparsity, **given), options)


def score(*args, **given) -> Masks:
    return score_and_update(*args, **given)[0]


def loss(model: PreTrainedModel, windows: Tensor = WINDOWS) -> Tensor:
    """Mean next-token cross-entropy by the model's own logits."""
    logits = model(input_ids=windows.long()).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].long().flatten())


def weight_gradients(model: PreTrainedModel, objective: Tensor) -> dict[str, Tensor]:
    """Plain autograd."""
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, torch.autograd.grad(objective, list(model.parameters())), strict=True))


def one_unit(topology: Topology, axes: tuple[Axis, ...]) -> float:
    """Parameters of the cheapest unit of the pruned axes in the dense model, with a norm that may go with it."""
    full = [torch.tensor(topology.hidden), *(torch.full((topology.layers,), topology.width(a)) for a in UNIT_AXES)]
    costs = unit_costs(topology, *full)
    return min(float(costs[axis].max()) for axis in axes) + topology.hidden


@pytest.mark.parametrize(("method", "axes"), CASES)
def test_every_method_meets_the_budget_to_one_unit(method: str, axes: tuple[Axis, ...]) -> None:
    topology = Topology.of(tiny_model("llama").config)
    masks, update = score_and_update(method, sparsity=0.15, axes=axes)
    budget = 0.85 * dense_decoder_parameters(topology)
    assert budget - one_unit(topology, axes) < kept_decoder_parameters(topology, masks.keep) <= budget
    for axis in AXES:
        assert masks.keep[axis].shape == topology.gate_shape(axis)
        assert masks.keep[axis].dtype == torch.bool
        assert masks.score[axis].dtype == update.scale[axis].dtype == torch.float32
        assert masks.score[axis].isfinite().all()
        assert torch.equal(masks.keep[axis], masks.score[axis] > 0)
        assert torch.equal(update.scale[axis], torch.ones(topology.gate_shape(axis)))
        if axis not in axes:
            assert masks.keep[axis].all()


@pytest.mark.parametrize("method", BASELINE_OPTIONS)
@pytest.mark.parametrize(("family", "sparsity"), [("llama_mqa", 0.0), ("qwen3", 0.55)])
def test_other_families_and_sparsities(method: str, family: str, sparsity: float) -> None:
    topology = Topology.of(tiny_model(family).config)
    masks = score(method, family, sparsity)
    budget = (1 - sparsity) * dense_decoder_parameters(topology)
    assert budget - one_unit(topology, UNIT_AXES) < kept_decoder_parameters(topology, masks.keep) <= budget + 1e-6


@pytest.mark.parametrize("method", BASELINE_OPTIONS)
def test_the_same_seed_gives_the_same_masks_and_leaves_the_model_alone(method: str) -> None:
    model = tiny_model("llama_tied")
    model.get_submodule("model.layers.0.mlp").requires_grad_(True)
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    first, second = (score(method, model=model, seed=5) for _ in range(2))
    for axis in AXES:
        assert torch.equal(first.keep[axis], second.keep[axis])
        assert torch.equal(first.score[axis], second.score[axis])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
        assert parameter.grad is None
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize("method", ["random", "bonsai", "loraprune"])
def test_another_seed_gives_other_masks(method: str) -> None:
    first, second = (score(method, seed=seed) for seed in (0, 1))
    assert not torch.equal(first.score["intermediate"], second.score["intermediate"])


@pytest.mark.parametrize("method", ["wanda_sp", "llm_pruner", "nirvana", "depth"])
def test_the_order_of_the_windows_does_not_matter(method: str) -> None:
    options = NirvanaOptions(candidates=1) if method == "nirvana" else None
    given, turned = (score(method, windows=windows, options=options) for windows in (WINDOWS, WINDOWS.flip(0)))
    for axis in AXES:
        assert torch.equal(given.keep[axis], turned.keep[axis])
        torch.testing.assert_close(given.score[axis], turned.score[axis])


def test_axes_and_methods_out_of_range_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"learn_masks\.axes.*wanda_sp prunes intermediate, kv_heads"):
        score("wanda_sp", axes=AXES)
    with pytest.raises(ValueError, match=r"learn_masks\.axes.*depth drops whole layers"):
        score("depth", axes=("intermediate",))
    with pytest.raises(ValueError, match=r"learn_masks\.axes"):
        score("random", axes=())
    with pytest.raises(TypeError, match=r"learn_masks\.method = 'tva' takes TvaOptions, found RandomOptions"):
        score("tva")
    with pytest.raises(ValueError, match="sparsity = 1"):
        score("random", sparsity=1.0)
    with pytest.raises(UnreachableSparsityError):
        score("magnitude", sparsity=0.9, axes=("intermediate",))
    with pytest.raises(ValueError, match="protects the first 2 and the last 1"):
        score("llm_pruner", options=LlmPrunerOptions(protect_first=2, protect_last=1))
    with pytest.raises(ValueError, match="candidates"):
        score("nirvana", options=NirvanaOptions(candidates=7))
    with pytest.raises(UnreachableSparsityError):
        score("bonsai", sparsity=0.9, axes=("intermediate",))
    with pytest.raises(ValueError, match="bias"):
        score("flap", "llama_bias", options=FlapOptions())
    with pytest.raises(ValueError, match="no windows"):
        score("depth", windows=WINDOWS[:0])
    with pytest.raises(ValueError, match="two or more"):
        score("flap", windows=WINDOWS[:1])
    with pytest.raises(TypeError, match=r"learn_masks\.method = 'flap' takes FlapOptions, found MagnitudeOptions"):
        score("flap", options=MagnitudeOptions())


@pytest.mark.parametrize("method", BASELINE_OPTIONS)
def test_options_are_described_and_validated_by_pydantic(method: str) -> None:
    adapter = TypeAdapter(BASELINE_OPTIONS[method])
    assert adapter.validate_python({}) == BASELINE_OPTIONS[method]()
    for name, field in adapter.json_schema().get("properties", {}).items():
        assert field["description"], name
        if field.get("type") in ("integer", "number"):
            with pytest.raises(ValidationError, match=name):
                adapter.validate_python({name: -1})
    with pytest.raises(ValidationError, match="unknown"):
        adapter.validate_python({"unknown": 1})


# ---- allocation


def test_uniform_keeps_the_same_share_everywhere() -> None:
    topology = Topology(layers=5, hidden=64, intermediate=200, kv_heads=4, group_size=2, head_dim=8)
    generator = torch.Generator().manual_seed(0)
    scores = {axis: torch.rand(topology.gate_shape(axis), generator=generator) for axis in AXES}
    for axes in (AXES, UNIT_AXES):
        masks = allocate_uniform(topology, {axis: scores[axis] for axis in axes}, 0.4)
        widths = masks.widths()
        shares = widths["intermediate"] / 200
        assert widths["kv_heads"].unique().numel() == 1
        assert int(widths["intermediate"].max() - widths["intermediate"].min()) <= 1
        assert abs(float(shares.mean()) - float(widths["kv_heads"][0]) / 4) <= 0.5 / 4 + 0.05
        for layer in range(5):
            expected = keep_best(scores["intermediate"][layer], int(widths["intermediate"][layer]))
            assert torch.equal(masks.keep["intermediate"][layer], expected)
        removed = 1 - kept_decoder_parameters(topology, masks.keep) / dense_decoder_parameters(topology)
        assert removed == pytest.approx(0.4, abs=0.001 if axes == UNIT_AXES else 0.02)


@pytest.mark.parametrize("allocate", [allocate_global, allocate_balanced, allocate_uniform])
def test_the_budget_is_met_within_a_tenth_of_a_point_though_heads_are_coarse(allocate: Any) -> None:
    topology = Topology(layers=30, hidden=576, intermediate=1536, kv_heads=3, group_size=3, head_dim=64)
    generator = torch.Generator().manual_seed(0)
    for axes in (AXES, UNIT_AXES):
        for sparsity in (0.2, 0.33, 0.5):
            scores = {axis: torch.randn(topology.gate_shape(axis), generator=generator) for axis in axes}
            masks = allocate(topology, scores, sparsity)
            removed = 1 - kept_decoder_parameters(topology, masks.keep) / dense_decoder_parameters(topology)
            assert sparsity - 1e-9 <= removed < sparsity + 2e-5


def test_protected_layers_stay_whole_and_the_others_pay() -> None:
    for method, options in (
        ("random", RandomOptions(protect_first=1, protect_last=1)),
        ("magnitude", MagnitudeOptions(protect_first=1, protect_last=1)),
        ("llm_pruner", LlmPrunerOptions(protect_first=1, protect_last=1)),
        ("loraprune", LoraPruneOptions(steps=4, prune_every=2, batch_size=1, protect_first=1, protect_last=1)),
    ):
        masks = score(method, sparsity=0.2, options=options)
        topology = Topology.of(tiny_model("llama").config)
        budget = 0.8 * dense_decoder_parameters(topology)
        for axis in UNIT_AXES:
            assert masks.keep[axis][[0, 2]].all()
        assert budget - one_unit(topology, UNIT_AXES) < kept_decoder_parameters(topology, masks.keep) <= budget


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        (lambda masks: replace(masks, keep=Masks.dense(Topology.of(tiny_model("llama").config)).keep), "the budget is"),
        (lambda masks: replace(masks, score={axis: -score for axis, score in masks.score.items()}), "whose score is"),
    ],
)
def test_masks_that_adaptation_would_read_otherwise_are_refused(
    change: Callable[[Masks], Masks], refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a new method's code could return them: over the budget, or with the polarity of the scores turned round."""
    given = []

    def wrong(problem: Problem, options: RandomOptions) -> Masks:
        given.append(len(problem.windows))
        return change(random(problem, options))

    monkeypatch.setitem(registry._METHODS, "random", wrong)
    with pytest.raises(ValueError, match=refused):
        score("random", options=RandomOptions(0, 0))
    assert given == [len(WINDOWS)]  # its options have no number of windows


def test_a_method_of_few_windows_gets_them_from_all_over_the_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def watched(problem: Problem, _: FlapOptions) -> Masks:
        given.append(problem.windows)
        return random(problem, RandomOptions(0, 0))

    monkeypatch.setitem(registry._METHODS, "flap", watched)
    score("flap", options=FlapOptions(windows=2))
    assert torch.equal(given[0], WINDOWS[[0, 3]])


def test_protection_is_checked_before_any_work() -> None:
    topology = Topology.of(tiny_model("llama").config)
    for first, last, refused in ((4, 2, "protects the first 4 and the last 2"), (1, 1, "sparsity = 0.4")):
        options = LlmPrunerOptions(protect_first=first, protect_last=last)
        with pytest.raises(ValueError, match=refused):
            check_request(MaskRequest("llm_pruner", options, 0.4, UNIT_AXES), topology)
    check_request(
        MaskRequest("llm_pruner", LlmPrunerOptions(protect_first=1, protect_last=1), 0.25, UNIT_AXES), topology
    )


def test_biases_where_the_model_has_some_are_refused_before_any_work() -> None:
    topology = Topology.of(tiny_model("llama_bias").config)
    with pytest.raises(ValueError, match=r"learn_masks\.flap\.bias = true: its biases would replace those of o_proj"):
        check_request(MaskRequest("flap", FlapOptions(), 0.3, UNIT_AXES), topology)
    check_request(MaskRequest("flap", FlapOptions(bias=False), 0.3, UNIT_AXES), topology)


def test_percentiles_give_ties_to_the_lower_index() -> None:
    assert percentiles(torch.tensor([1.0, 3.0, 1.0, 2.0])).tolist() == [0.375, 0.875, 0.125, 0.625]


def test_scores_that_match_the_mask_keep_their_ranking() -> None:
    values = torch.tensor([[0.5, -0.2, -0.1, 0.3, -0.4], [0.5, 0.1, 0.2, 0.4, 0.3]])
    keep = torch.tensor([[True, True, True, True, False], [True, False, False, True, False]])
    matched = make_scores_match_mask(dict.fromkeys(AXES, keep), {"intermediate": values}).score
    assert torch.equal(matched["intermediate"] > 0, keep)
    assert torch.equal(matched["intermediate"].argsort(), values.argsort())
    assert torch.equal(matched["kv_heads"], torch.ones(keep.shape))


def test_stages_never_bring_back_and_rank_by_when_dropped() -> None:
    topology = Topology(layers=3, hidden=16, intermediate=60, kv_heads=2, group_size=1, head_dim=4)
    generator = torch.Generator().manual_seed(0)
    stages = StagedPruning(topology, UNIT_AXES)
    dropped: list[Tensor] = []
    for sparsity in (0.2, 0.4, 0.6):
        before = stages.keep["intermediate"].clone()
        stages.prune({axis: torch.rand(topology.gate_shape(axis), generator=generator) for axis in UNIT_AXES}, sparsity)
        assert not (stages.keep["intermediate"] & ~before).any()
        dropped.append(before & ~stages.keep["intermediate"])
    scores = stages.masks().score["intermediate"]
    levels = [scores[units] for units in (*dropped, stages.keep["intermediate"])]
    for lower, higher in pairwise(levels):
        assert lower.max() < higher.min()


def test_units_of_an_earlier_stage_come_back_best_first() -> None:
    """Where a stage drops a head that is worth more units than the stage has left."""
    topology = Topology(layers=2, hidden=16, intermediate=12, kv_heads=2, group_size=4, head_dim=16)
    stages = StagedPruning(topology, UNIT_AXES)
    order = torch.tensor([3, 9, 1, 7, 5, 11, 0, 8, 2, 10, 4, 6])
    scores = {"intermediate": torch.stack([order, order + 0.5]) / 13, "kv_heads": torch.full((2, 2), 1.5)}
    stages.prune(scores, 0.05)
    dropped = ~stages.keep["intermediate"]
    assert stages.keep["kv_heads"].all()
    assert int(dropped.sum()) == 12
    scores["kv_heads"][0, 0] = 0
    scores["intermediate"] = scores["intermediate"] + 0.9
    stages.prune(scores, 0.25)
    assert not stages.keep["kv_heads"][0, 0]
    back = dropped & stages.keep["intermediate"]
    order = torch.stack([order, order + 0.5])
    assert 0 < int(back.sum()) < int(dropped.sum())
    assert order[back].min() > order[dropped & ~back].max()


# ---- scores from activations


def _inputs(model: PreTrainedModel, name: str) -> Tensor:
    """What enters a projection, all windows at once: float64 [tokens, inputs]."""
    return _inputs_by_window(model, name).flatten(0, 1)


def _inputs_by_window(model: PreTrainedModel, name: str) -> Tensor:
    """float64 [windows, tokens, inputs]."""
    caught: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    model(input_ids=WINDOWS.long())
    handle.remove()
    return caught[0].double()


def _fluctuation(windows: Tensor) -> Tensor:
    """FLAP's running update, window by window: [windows, tokens, inputs] to [inputs]."""
    out = torch.zeros(windows.shape[-1], dtype=windows.dtype)
    for index in range(1, len(windows)):
        mean = windows[: index + 1].flatten(0, 1).mean(0)
        around = ((windows[index] - mean) ** 2).sum(0)
        out = out * (index - 1) / index + around / (index + 1)
    return out


def _pool_heads(topology: Topology, per_input: Tensor) -> Tensor:
    """Sum over the query rows of each key-value head, by loops."""
    pooled = torch.zeros(topology.kv_heads, dtype=per_input.dtype)
    for head in range(topology.kv_heads * topology.group_size):
        for dim in range(topology.head_dim):
            pooled[head // topology.group_size] += per_input[head * topology.head_dim + dim]
    return pooled


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_wanda_and_flap_scores_by_their_formulas(family: str) -> None:
    model = tiny_model(family)
    topology = Topology.of(model.config)
    problem = problem_of(model)
    statistics = input_statistics(problem)
    wanda, flap = wanda_scores(problem, statistics), flap_scores(problem, statistics)
    for layer in range(topology.layers):
        for axis, name in (("kv_heads", "self_attn.o_proj"), ("intermediate", "mlp.down_proj")):
            path = f"model.layers.{layer}.{name}"
            x, w = _inputs(model, path), model.get_submodule(path).weight.double()
            reference = {"wanda": w.abs().sum(0) * x.norm(dim=0)}
            metric = _fluctuation(_inputs_by_window(model, path)) * w.square().sum(0)
            metric = metric**2 if axis == "kv_heads" else metric
            reference["flap"] = (metric - metric.mean()) / metric.std()
            if axis == "kv_heads":
                reference = {key: _pool_heads(topology, value) for key, value in reference.items()}
                reference["flap"] = reference["flap"] / topology.query_rows
            torch.testing.assert_close(wanda[axis][layer].double(), reference["wanda"], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(flap[axis][layer].double(), reference["flap"], rtol=1e-4, atol=1e-5)


def test_the_fluctuation_of_alike_windows_is_their_variance() -> None:
    """But for a factor: means and first window do not matter then."""
    windows = WINDOWS[:1].expand(3, -1)
    statistics = input_statistics(problem_of(tiny_model("llama"), windows=windows))["intermediate"]
    variance = statistics.squares / statistics.tokens - statistics.mean.square()
    ratio = statistics.fluctuation / variance
    torch.testing.assert_close(ratio, torch.full_like(ratio, float(ratio[0, 0])))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_wanda_scores_every_layer_behind_pruned_layers(family: str) -> None:
    """Against whole forwards of a model whose readers lose the dropped units' columns, layer by layer."""
    model = tiny_model(family)
    topology = Topology.of(model.config)
    sequential = score("wanda_sp", family, model=model)
    together = score("wanda_sp", family, model=model, options=WandaSpOptions(sequential=False))
    assert any(not torch.equal(sequential.keep[axis], together.keep[axis]) for axis in UNIT_AXES)
    for layer in range(topology.layers):
        readers = (("kv_heads", "self_attn.o_proj"), ("intermediate", "mlp.down_proj"))
        found = {name: _inputs(model, f"model.layers.{layer}.{name}") for _, name in readers}
        for axis, name in readers:
            w = model.get_submodule(f"model.layers.{layer}.{name}").weight
            reference = w.double().abs().sum(0) * found[name].norm(dim=0)
            if axis == "kv_heads":
                reference = _pool_heads(topology, reference)
            keep = sequential.keep[axis][layer]
            assert torch.equal(keep, keep_best(reference, int(keep.sum())))
            w.data *= keep.repeat_interleave(w.shape[1] // len(keep))


@pytest.mark.parametrize("family", ["llama", "llama_bias", "qwen3"])
def test_magnitude_of_a_unit_is_every_weight_it_owns(family: str) -> None:
    model = tiny_model(family)
    topology = Topology.of(model.config)
    squares = {name: parameter**2 for name, parameter in model.named_parameters()}
    reference = _vectors(topology, squares, signed=False)
    scores = magnitude_scores(model, topology, UNIT_AXES)
    for axis in UNIT_AXES:
        torch.testing.assert_close(scores[axis], reference[axis], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "llama_bias"])
def test_magnitude_of_a_residual_dimension_is_every_weight_it_owns(family: str) -> None:
    model = tiny_model(family)
    topology = Topology.of(model.config)
    scores = magnitude_scores(model, topology, ("hidden",))["hidden"]
    for unit in (0, 17, 63):
        total = model.model.embed_tokens.weight[:, unit].square().sum() + model.model.norm.weight[unit] ** 2
        if family != "llama_tied":
            total += model.lm_head.weight[:, unit].square().sum()
        for layer in model.model.layers:
            total += layer.input_layernorm.weight[unit] ** 2 + layer.post_attention_layernorm.weight[unit] ** 2
            attention, mlp = layer.self_attn, layer.mlp
            for read in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
                total += read.weight[:, unit].square().sum()
            for written in (attention.o_proj, mlp.down_proj):
                total += written.weight[unit].square().sum()
                if written.bias is not None:
                    total += written.bias[unit] ** 2
        torch.testing.assert_close(scores[unit], total, rtol=1e-5, atol=1e-5)


def test_the_bias_of_flap_keeps_the_mean_of_every_projection() -> None:
    model = tiny_model("llama")
    topology = Topology.of(model.config)
    masks, update = score_and_update("flap", model=model, sparsity=0.5, options=FlapOptions())
    assert set(update.mean_input) == {
        f"model.layers.{layer}.{name}" for layer in range(3) for name in ("self_attn.o_proj", "mlp.down_proj")
    }
    assert sum(int(not kept.all()) for axis in UNIT_AXES for kept in masks.keep[axis]) >= 3
    # Also under masks that adaptation changed.
    for cut_by in (masks, random_masks(topology, seed=5, empty_layer=1), Masks.dense(topology)):
        for layer in range(3):
            heads = cut_by.keep["kv_heads"][layer].repeat_interleave(topology.query_rows)
            for name, keep in (("self_attn.o_proj", heads), ("mlp.down_proj", cut_by.keep["intermediate"][layer])):
                path = f"model.layers.{layer}.{name}"
                x, w = _inputs(model, path), model.get_submodule(path).weight
                bias = update.bias(path, w, cut_by)
                masked = (x * keep) @ w.double().T + bias.double()
                torch.testing.assert_close(masked.mean(0), (x @ w.double().T).mean(0), rtol=1e-5, atol=1e-6)
                assert bias.dtype == torch.float32
                assert bool(bias.any()) != bool(keep.all())
    without, unchanged = score_and_update("flap", model=model, sparsity=0.5)
    assert unchanged.mean_input == {}
    assert torch.equal(without.keep["intermediate"], masks.keep["intermediate"])


def test_flap_has_one_threshold_over_layers_and_axes() -> None:
    model = tiny_model("llama")
    topology = Topology.of(model.config)
    masks = score("flap", model=model)
    scores = flap_scores(problem_of(model), input_statistics(problem_of(model)))
    kept = torch.cat([scores[axis][masks.keep[axis]] for axis in UNIT_AXES])
    dropped = torch.cat([scores[axis][~masks.keep[axis]] for axis in UNIT_AXES])
    # But for the units that filled what a head was too large for.
    assert int((dropped > kept.min()).sum()) <= topology.layers * topology.kv_heads
    assert masks.widths()["intermediate"].unique().numel() > 1


def least_squares(weight: Tensor, squares: Tensor, columns: Tensor) -> tuple[float, Tensor]:
    """The least ‖X·Wᵀ - X·W'ᵀ‖² / 2 over W' that reads these columns alone, and that W'; by lstsq on a root of H."""
    root = torch.linalg.cholesky(squares).T
    solved = torch.zeros_like(weight)
    solved[:, columns] = torch.linalg.lstsq(root[:, columns], root @ weight.T).solution.T
    return float((root @ (weight - solved).T).square().sum()) / 2, solved


@pytest.mark.parametrize("inputs", [1, 3])
def test_osscar_drops_one_by_one_what_costs_least_and_refits_the_rest(inputs: int) -> None:
    generator, units, kept = torch.Generator().manual_seed(inputs), 8, 5
    x = torch.randn(40, units * inputs, generator=generator, dtype=torch.float64)
    weight = torch.randn(6, units * inputs, generator=generator, dtype=torch.float64)
    damped = x.T @ x + 0.01 * (x.T @ x).diagonal().mean() * torch.eye(units * inputs)
    columns = torch.arange(units * inputs).view(units, inputs)
    left = list(range(units))
    while len(left) > kept:
        cost = {
            unit: least_squares(weight, damped, columns[[u for u in left if u != unit]].flatten())[0] for unit in left
        }
        left.remove(min(cost, key=cost.__getitem__))
    found = refit(weight, x.T @ x, units, kept, at_once=1, damping=0.01)
    assert found.keep.nonzero().flatten().tolist() == left
    base, solved = least_squares(weight, damped, columns[left].flatten())
    torch.testing.assert_close(found.weight, solved)
    for unit in left:
        without = least_squares(weight, damped, columns[[u for u in left if u != unit]].flatten())[0]
        assert float(found.error[unit]) == pytest.approx(without - base, rel=1e-4)
    assert found.error[found.keep].min() > found.error[~found.keep].max()


@pytest.mark.parametrize(
    ("units", "at_once", "rounds"), [(7, 3, [4, 3]), (8, 3, [4, 4]), (2, 5, [2]), (5, 1, [1] * 5), (0, 3, [])]
)
def test_the_rounds_of_osscar_are_alike_and_the_first_have_more(units: int, at_once: int, rounds: list[int]) -> None:
    assert _rounds(units, at_once) == rounds


def test_osscar_drops_dead_inputs_first_and_survives_them() -> None:
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    x[:, [1, 4]] = 0
    found = refit(torch.ones(3, 6), x.T @ x, 6, 4, at_once=10, damping=0.01)
    assert found.keep.tolist() == [True, False, True, True, False, True]
    torch.testing.assert_close(found.weight[:, [0, 2, 3, 5]], torch.ones(3, 4, dtype=torch.float64))
    nothing_left = refit(torch.ones(3, 6), x.T @ x, 6, 0, at_once=4, damping=0.01)
    assert not nothing_left.keep.any()
    assert not nothing_left.weight.any()


def test_osscar_solves_each_layer_for_what_comes_through_the_pruned_layers_before_it() -> None:
    """Its matrices bring the pruned model nearer to the dense one than its masks alone do."""
    model = tiny_model("llama")
    problem = problem_of(model)
    masks, update = osscar(problem, OsscarOptions(units_at_once=2))
    windows = WINDOWS.long()
    dense = model(input_ids=windows).logits
    distance = {}
    for name, used in {"masks": WeightUpdate.none(problem.topology), "matrices": update}.items():
        with replaced(model, used), GatedModel(model, problem.topology).inserted() as gated:
            gated.set(hard_gates(masks.keep), kept_hidden=problem.topology.hidden)
            distance[name] = float((model(input_ids=windows).logits - dense).square().mean())
    assert distance["matrices"] < 0.8 * distance["masks"]
    # The second layer's MLP, solved again from inputs that are collected here.
    seen: list[Tensor] = []
    first = {name: weight for name, weight in update.weight.items() if ".layers.0." in name}
    module = model.get_submodule("model.layers.1.mlp.down_proj")
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with replaced(model, WeightUpdate.none(problem.topology, weight=first)):
        model(input_ids=windows)
    handle.remove()
    squares = (seen[0].T @ seen[0]).double()
    again = refit(module.weight, squares, 96, int(masks.keep["intermediate"][1].sum()), at_once=2, damping=0.01)
    assert torch.equal(again.keep, masks.keep["intermediate"][1])
    torch.testing.assert_close(
        update.weight["model.layers.1.mlp.down_proj.weight"].double(), again.weight, rtol=1e-3, atol=1e-4
    )


# ---- scores from gradients


def _vectors(topology: Topology, products: dict[str, Tensor], signed: bool) -> dict[Axis, Tensor]:
    """Sum w·g into units from elementwise products, by the layout of Llama written out."""

    def total(values: Tensor) -> Tensor:
        """[units, elements] to [units]."""
        return values.sum(1).abs() if signed else values.abs().sum(1)

    def rows(path: str) -> Tensor:
        values = products[path + ".weight"]
        bias = products.get(path + ".bias")
        return total(values if bias is None else torch.cat([values, bias[:, None]], 1))

    out: dict[Axis, Tensor] = {axis: torch.zeros(topology.gate_shape(axis)) for axis in AXES}
    norms = ["model.norm"]
    for layer in range(topology.layers):
        mlp, attention = f"model.layers.{layer}.mlp", f"model.layers.{layer}.self_attn"
        down, o = products[f"{mlp}.down_proj.weight"], products[f"{attention}.o_proj.weight"]
        out["intermediate"][layer] = rows(f"{mlp}.gate_proj") + rows(f"{mlp}.up_proj") + total(down.T)
        query = rows(f"{attention}.q_proj") + total(o.T)
        keys = rows(f"{attention}.k_proj") + rows(f"{attention}.v_proj")
        for head in range(topology.kv_heads):
            out["kv_heads"][layer, head] = (
                query[head * topology.query_rows : (head + 1) * topology.query_rows].sum()
                + keys[head * topology.head_dim : (head + 1) * topology.head_dim].sum()
            )
        for read in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            out["hidden"] += total(products[f"model.layers.{layer}.{read}.weight"].T)
        out["hidden"] += rows(f"{attention}.o_proj") + rows(f"{mlp}.down_proj")
        norms += [f"model.layers.{layer}.{name}" for name in ("input_layernorm", "post_attention_layernorm")]
    for name in norms:
        out["hidden"] += products[f"{name}.weight"].abs()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in products:
            out["hidden"] += total(products[name].T)
    return out


FAMILIES = ["llama", "llama_tied", "llama_bias", "qwen3"]


@pytest.mark.parametrize("importance", ["param_first", "vectorize"])
@pytest.mark.parametrize("family", FAMILIES)
def test_llm_pruner_scores_equal_full_autograd(family: str, importance: str) -> None:
    model = tiny_model(family)
    topology = Topology.of(model.config)
    scores = llm_pruner_scores(problem_of(model, AXES), LlmPrunerOptions(importance=importance))
    model.requires_grad_(True)
    gradients = weight_gradients(model, loss(model))
    products = {name: (p * gradients[name]).detach() for name, p in model.named_parameters()}
    reference = _vectors(topology, products, signed=importance == "vectorize")
    for axis in AXES:
        torch.testing.assert_close(scores[axis], reference[axis], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("objective", ["loss", "logits"])
@pytest.mark.parametrize("family", FAMILIES)
def test_nirvana_scores_equal_full_autograd(family: str, objective: str) -> None:
    model = tiny_model(family)
    topology = Topology.of(model.config)
    problem = problem_of(model, AXES)
    scores = nirvana_scores(problem, NirvanaOptions(objective=objective))
    by_layer = nirvana_scores(problem, NirvanaOptions(objective=objective, layers_at_once=2))
    model.requires_grad_(True)
    outputs = {"loss": loss, "logits": lambda model: model(input_ids=WINDOWS.long()).logits.max(dim=1).values.mean()}
    gradients = weight_gradients(model, outputs[objective](model))
    products = {name: (p * gradients[name]).detach() for name, p in model.named_parameters()}
    reference = _vectors(topology, products, signed=False)
    for axis in AXES:
        torch.testing.assert_close(scores[axis], reference[axis], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(scores[axis], by_layer[axis])


def test_nirvana_drops_the_same_share_of_heads_and_units_and_empties_no_layer() -> None:
    model = tiny_model("llama_mha", layers=5)
    for ratio in (1.0, 3.0):
        options = NirvanaOptions(mlp_to_attention=ratio, candidates=1)
        masks = score("nirvana", model=model, sparsity=0.5, options=options)
        dropped = {axis: float((~masks.keep[axis]).float().mean()) for axis in UNIT_AXES}
        assert dropped["intermediate"] == pytest.approx(ratio * dropped["kv_heads"], abs=ratio * 0.05 + 0.05)
        assert all(bool((width > 0).all()) for width in (masks.widths()[axis] for axis in UNIT_AXES))


def test_nirvana_takes_the_candidate_nearest_to_the_dense_model() -> None:
    model = tiny_model("llama")
    topology = Topology.of(model.config)
    chosen = score("nirvana", model=model, options=NirvanaOptions(candidates=3, kl_windows=4))
    divergences = []
    for windows in WINDOWS.tensor_split(3):
        masks = score("nirvana", model=model, windows=windows, options=NirvanaOptions(candidates=1))
        with GatedModel(model, topology).inserted() as gated:
            dense = model(input_ids=WINDOWS.long()).logits[:, :-1].log_softmax(-1)
            gated.set(hard_gates(masks.keep), kept_hidden=topology.hidden)
            masked = model(input_ids=WINDOWS.long()).logits[:, :-1].log_softmax(-1)
        divergences.append((float((dense.exp() * (dense - masked)).sum(-1).mean()), masks))
        assert divergence(problem_of(model), masks) == pytest.approx(divergences[-1][0], rel=1e-3)
    best = min(divergences, key=lambda pair: pair[0])[1]
    assert torch.equal(chosen.keep["intermediate"], best.keep["intermediate"])
    assert torch.equal(chosen.keep["kv_heads"], best.keep["kv_heads"])


def test_the_importance_of_loraprune_by_full_autograd() -> None:
    model = tiny_model("llama")
    generator = torch.Generator().manual_seed(0)
    name = "model.layers.1.mlp.up_proj"
    module = model.get_submodule(name)
    adapter = Adapter(module, 4, 8.0, generator)
    with torch.no_grad():
        adapter.b.normal_(0, 0.1, generator=generator)
    handle = module.register_forward_hook(adapter)
    loss(model).backward()
    handle.remove()
    merged = (module.weight + 2.0 * adapter.b @ adapter.a).detach().requires_grad_()
    importance = adapter.importance()
    pooled = step_scores(problem_of(model, ("intermediate",)), {f"{name}.weight": adapter})["intermediate"]
    module.weight = torch.nn.Parameter(merged.detach())
    model.requires_grad_(True)
    gradient = weight_gradients(model, loss(model))[f"{name}.weight"]
    # W' = W + s·BA: ∂B = s·G·Aᵀ and ∂A = s·Bᵀ·G.
    on_a, on_b = 2.0 * adapter.b.T @ gradient, 2.0 * gradient @ adapter.a.T
    torch.testing.assert_close(adapter.b.grad, on_b, rtol=1e-3, atol=1e-6)
    expected = ((on_b @ adapter.a + adapter.b @ on_a - on_b @ on_a) * merged).abs()
    torch.testing.assert_close(importance, expected.detach(), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(pooled[1], F.normalize(expected.sum(1), dim=0).detach(), rtol=1e-3, atol=1e-6)
    assert not pooled[[0, 2]].any()


# ---- sub-models and layers


def _pairs(units: int, count: int, generator: torch.Generator) -> Tensor:
    """Random halves and their complements: bool [count, units]."""
    halves = [torch.randperm(units, generator=generator) < units // 2 for _ in range(count // 2)]
    return torch.stack([mask for half in halves for mask in (half, ~half)])


def test_the_regression_finds_the_units_that_matter_and_orders_all() -> None:
    generator = torch.Generator().manual_seed(0)
    kept = _pairs(40, 200, generator)
    weight = torch.linspace(-1, 1, 40)[torch.randperm(40, generator=generator)].double()
    noise = 0.2 * torch.randn(200, generator=generator, dtype=torch.float64)
    found = fit_coefficients(kept, kept.double() @ weight + noise, torch.Generator().manual_seed(1))
    assert float(torch.corrcoef(torch.stack([found.double(), weight]))[0, 1]) > 0.9
    # More units than sub-models: an order of all units, where a converged lasso has at most as many as sub-models.
    kept = _pairs(400, 60, generator)
    weight = torch.randn(400, generator=generator, dtype=torch.float64)
    found = fit_coefficients(kept, kept.double() @ weight, torch.Generator().manual_seed(1))
    predicted = kendall_tau(kept.double() @ found.double(), kept.double() @ weight)
    assert predicted > 0.5
    assert int((found != 0).sum()) > 390


def test_the_regression_is_repeatable_and_takes_equal_perplexities() -> None:
    kept = _pairs(12, 40, torch.Generator().manual_seed(0))
    utility = -kept[:, :3].sum(1).double()
    first, second = (fit_coefficients(kept, utility, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert set(first.argsort()[:3].tolist()) == {0, 1, 2}
    assert not fit_coefficients(kept, torch.full((40,), -1e8), torch.Generator().manual_seed(3)).any()
    with pytest.raises(ValueError, match="4 sub-models"):
        fit_coefficients(kept[:4], utility[:4], torch.Generator())


def test_kendall_tau_is_that_of_scipy() -> None:
    generator = torch.Generator().manual_seed(0)
    for levels in (2, 5, 100):
        first, second = (torch.randint(levels, (30,), generator=generator).float() for _ in range(2))
        assert kendall_tau(first, second) == pytest.approx(float(kendalltau(first, second).statistic), abs=1e-6)
    assert math.isnan(kendall_tau(first, torch.ones(30)))


def test_the_prior_of_bonsai_by_its_formula() -> None:
    model = tiny_model("llama")
    topology = Topology.of(model.config)
    prior = prior_scores(problem_of(model))
    for layer in range(topology.layers):
        for axis, name in (("intermediate", "mlp.down_proj"), ("kv_heads", "self_attn.o_proj")):
            path = f"model.layers.{layer}.{name}"
            w, x = model.get_submodule(path).weight.double(), _inputs(model, path).view(4, 20, -1)
            per_window = [w.abs().mean(0) * window.square().mean(0).sqrt() for window in x]
            expected = sum(per_window) / 4
            if axis == "kv_heads":
                expected = _pool_heads(topology, expected) / topology.query_rows
            torch.testing.assert_close(prior[axis][layer].double(), expected, rtol=1e-5, atol=1e-6)


def test_submodels_of_bonsai_drop_a_share_of_each_module_and_never_its_best_units() -> None:
    topology = Topology(layers=3, hidden=16, intermediate=60, kv_heads=40, group_size=1, head_dim=4)
    generator = torch.Generator().manual_seed(0)
    prior = {axis: torch.rand(topology.gate_shape(axis), generator=generator) for axis in UNIT_AXES}
    keep = Masks.dense(topology).keep
    keep["intermediate"][1, :20] = False
    modules = candidate_modules(prior, keep, 0.05)
    assert [module.axis for module in modules] == ["intermediate"] * 3 + ["kv_heads"] * 3
    assert [len(module.candidates) for module in modules] == [6, 4, 6, 4, 4, 4]
    assert [module.dropped for module in modules] == [4, 3, 4, 3, 3, 3]
    for _ in range(20):
        mask = draw_mask(modules, generator)
        changed, complement = (submodel(keep, modules, kept) for kept in (mask, ~mask))
        for axis in UNIT_AXES:
            assert not (changed[axis] & ~keep[axis]).any()
            assert torch.equal(changed[axis] | complement[axis], keep[axis])
            for layer in range(3):
                both = keep[axis][layer] & (changed[axis] ^ complement[axis])[layer]
                rest = keep[axis][layer] & ~both
                assert prior[axis][layer][both].max() < prior[axis][layer][rest].min()
    # The distance to the best of the module, over the sum.
    values = prior["intermediate"][1][modules[1].candidates - 60].double()
    below = prior["intermediate"][1, 20:].max().double() - values
    torch.testing.assert_close(modules[1].probability, below / below.sum())


def test_bonsai_pools_layers_with_so_few_heads_that_none_could_be_halved() -> None:
    topology = Topology(layers=30, hidden=16, intermediate=60, kv_heads=3, group_size=3, head_dim=4)
    prior = {"kv_heads": torch.rand(30, 3, generator=torch.Generator().manual_seed(0))}
    (module,) = candidate_modules(prior, Masks.dense(topology).keep, 0.05)
    assert len(module.candidates) == 9
    assert module.dropped == 5
    relative = (prior["kv_heads"].double() / prior["kv_heads"].double().mean(1, keepdim=True)).flatten()
    assert set(module.candidates.tolist()) == set(relative.argsort()[:9].tolist())
    (equal,) = candidate_modules({"kv_heads": torch.ones(30, 3)}, Masks.dense(topology).keep, 0.05)
    assert equal.probability.tolist() == pytest.approx([1 / 9] * 9)


def test_the_perplexity_of_bonsai_is_bounded() -> None:
    model = tiny_model("llama")
    assert perplexity(problem_of(model)) == pytest.approx(math.exp(float(loss(model))), rel=1e-5)
    model.lm_head.weight.mul_(1e4)
    assert perplexity(problem_of(model)) == 1e8
    model.lm_head.weight.fill_(math.nan)
    assert perplexity(problem_of(model)) == 1e8


def test_bonsai_runs_as_many_forwards_as_it_says_and_drops_dead_units_first() -> None:
    model = tiny_model("llama")
    dead = torch.arange(0, 96, 4)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight[:, dead] = 0
    forwards = []
    handle = model.model.register_forward_hook(lambda *_: forwards.append(1))
    options = BonsaiOptions(prune_frac=0.04, submodels=10, submodel_windows=2, prior_windows=3)
    masks = score("bonsai", model=model, sparsity=0.08, axes=("intermediate",), options=options)
    handle.remove()
    assert len(forwards) == 2 * (3 + 10 * 2)
    dropped = (~masks.keep["intermediate"]).nonzero()[:, 1]
    assert len(dropped) > 20
    assert set(dropped.tolist()) <= set(dead.tolist())


def submodels_of_bonsai(monkeypatch: pytest.MonkeyPatch, **given: Any) -> list[list[Tensor]]:
    """Which candidates the sub-models of each round keep."""
    drawn: list[Tensor] = []
    plain = bonsai.submodel

    def watched(keep: Any, modules: Any, mask: Tensor) -> Any:
        drawn.append(mask)
        return plain(keep, modules, mask)

    monkeypatch.setattr(bonsai, "submodel", watched)
    score("bonsai", **given)
    each = QUICK["bonsai"].submodels
    return [drawn[start : start + each] for start in range(0, len(drawn), each + 1)]  # and one without candidates


def test_every_second_submodel_of_bonsai_keeps_what_the_one_before_it_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    (masks,) = submodels_of_bonsai(monkeypatch, sparsity=0.1)
    assert all(torch.equal(one, ~other) for one, other in zip(masks[::2], masks[1::2], strict=True))


def test_a_round_of_bonsai_whose_candidates_own_too_little_is_followed_by_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Half of six heads are candidates, and own a little less than a fifth of the parameters."""
    assert len(submodels_of_bonsai(monkeypatch, axes=("kv_heads",), sparsity=0.2)) == 2


def test_loraprune_averages_the_importance_of_steps_with_the_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of six steps says the opposite of the five before it, twice as loud: 0.2 to 0.1 · (0.9 + ... + 0.9⁵)."""
    topology = Topology.of(tiny_model("llama").config)
    rising = {axis: torch.arange(float(topology.width(axis))).expand(topology.gate_shape(axis)) for axis in UNIT_AXES}
    steps = iter([*[rising] * 5, {axis: -2 * score for axis, score in rising.items()}])
    monkeypatch.setattr(loraprune, "step_scores", lambda *_: next(steps))
    options = LoraPruneOptions(steps=6, prune_every=10, batch_size=1, protect_first=0, protect_last=0)
    masks = score("loraprune", options=options)
    for axis in UNIT_AXES:
        for layer, width in enumerate(masks.widths()[axis].tolist()):
            assert torch.equal(masks.keep[axis][layer], keep_best(rising[axis][layer], width))


def test_loraprune_drops_the_same_share_of_every_open_layer_and_trains_to_the_end_of_the_ramp() -> None:
    model = tiny_model("llama", layers=5)
    forwards = []
    handle = model.model.register_forward_hook(lambda *_: forwards.append(1))
    options = LoraPruneOptions(steps=20, prune_every=5, batch_size=3, protect_first=1, protect_last=1)
    masks = score("loraprune", model=model, sparsity=0.25, options=options)
    handle.remove()
    assert len(forwards) == 18 * 3
    widths = masks.widths()
    assert widths["intermediate"][[0, 4]].tolist() == [96, 96]
    for axis in UNIT_AXES:
        assert int(widths[axis][1:4].max() - widths[axis][1:4].min()) <= 1
    assert [ramp_share(step, 100) for step in (1, 10, 90, 100)] == [0, 0, 1, 1]
    assert ramp_share(50, 100) == pytest.approx(1 - 0.5**3)


def test_stages_that_prune_alike_never_bring_back() -> None:
    topology = Topology(layers=3, hidden=16, intermediate=60, kv_heads=4, group_size=1, head_dim=4)
    generator = torch.Generator().manual_seed(0)
    stages = StagedPruning(topology, UNIT_AXES, 1, 0)
    widths = {"intermediate": torch.tensor([60, 31, 30]), "kv_heads": torch.tensor([4, 1, 1])}
    counts = []
    for share in (0.3, 0.6, 1.0):
        before = {axis: stages.keep[axis].clone() for axis in UNIT_AXES}
        scores = {axis: torch.rand(topology.gate_shape(axis), generator=generator) for axis in UNIT_AXES}
        stages.prune_alike(scores, widths, share)
        for axis in UNIT_AXES:
            assert not (stages.keep[axis] & ~before[axis]).any()
            for layer in range(3):
                expected = keep_best(
                    scores[axis][layer].where(before[axis][layer], -torch.inf), int(stages.keep[axis][layer].sum())
                )
                assert torch.equal(stages.keep[axis][layer], expected)
        counts.append([stages.keep[axis].sum(1).tolist() for axis in UNIT_AXES])
    assert counts == [[[60, 52, 51], [4, 4, 4]], [[60, 43, 42], [4, 3, 3]], [[60, 31, 30], [4, 1, 1]]]
    for axis in UNIT_AXES:
        assert torch.equal(stages.masks().score[axis] > 0, stages.keep[axis])


def _streams(model: PreTrainedModel) -> list[Tensor]:
    """The residual stream before each layer and after the last: [windows, seq, hidden] each."""
    caught: list[Tensor] = []
    handles = [layer.register_forward_pre_hook(lambda _, args: caught.append(args[0])) for layer in model.model.layers]
    handles.append(model.model.norm.register_forward_pre_hook(lambda _, args: caught.append(args[0])))
    model(input_ids=WINDOWS.long())
    for handle in handles:
        handle.remove()
    return caught


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("sparsity", [0.2, 0.4, 0.5, 0.75])
def test_depth_drops_the_most_similar_layers(contiguous: bool, sparsity: float) -> None:
    model = tiny_model("llama", layers=5)
    for index, scale in enumerate((1.0, 0.1, 0.8, 0.2, 0.3)):
        layer = model.model.layers[index]
        layer.self_attn.o_proj.weight.mul_(scale)
        layer.mlp.down_proj.weight.mul_(scale)
    topology = Topology.of(model.config)
    count = math.ceil(sparsity * 5)
    streams = _streams(model)
    influence, angles = similarities(problem_of(model, target_sparsity=sparsity), count)
    expected = []
    for index in range(5):
        cosines = [
            float(a @ b / (a.norm() * b.norm()))
            for a, b in zip(streams[index].flatten(0, 1), streams[index + 1].flatten(0, 1), strict=True)
        ]
        expected.append(1 - sum(cosines) / len(cosines))
    assert influence.tolist() == pytest.approx(expected, abs=1e-5)
    distances = [
        float(F.cosine_similarity(streams[i], streams[i + count], dim=-1).double().clamp(-1, 1).arccos().mean())
        / math.pi
        for i in range(6 - count)
    ]
    assert angles.tolist() == pytest.approx(distances, abs=1e-5)
    start = distances.index(min(distances))
    layers = range(start, start + count) if contiguous else sorted(range(5), key=lambda i: expected[i])[:count]
    last = max(layers, key=lambda i: expected[i])
    masks = depth(problem_of(model, target_sparsity=sparsity), DepthOptions(contiguous=contiguous))
    for index in range(5):
        for axis in UNIT_AXES:
            keep = masks.keep[axis][index]
            assert index == last or (not keep.any() if index in layers else keep.all())
    budget = (1 - sparsity) * dense_decoder_parameters(topology)
    assert budget - 3 * topology.hidden - topology.hidden < kept_decoder_parameters(topology, masks.keep) <= budget
    for axis in UNIT_AXES:
        assert torch.equal(masks.keep[axis], masks.score[axis] > 0)
    if masks.keep["kv_heads"][last].any():  # then all units are back, and have room beside one head less
        fewer = {axis: keep.clone() for axis, keep in masks.keep.items()}
        fewer["kv_heads"][last, masks.keep["kv_heads"][last].nonzero()[0]] = False
        fewer["intermediate"][last] = True
        assert kept_decoder_parameters(topology, fewer) <= budget
