"""Bonsai, NIRVANA, LoRAPrune and GRASPrune against their own code, as tools/record_official_scores.py recorded it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.unit.test_official_scores import record
from tools.official.loraprune import factors
from tools.official.record import MANY_HEADS
from tvaprune.architecture.parameter_counts import (
    dense_decoder_parameters,
    dense_unit_costs,
    kept_decoder_parameters,
    sparsity,
)
from tvaprune.architecture.topology import Topology
from tvaprune.baselines.allocation import StagedPruning, allocate_balanced
from tvaprune.baselines.bonsai import (
    Module,
    candidate_modules,
    perplexity,
    prior_scores,
    scores_of_round,
    submodel,
)
from tvaprune.baselines.bonsai_fit import fit_coefficients
from tvaprune.baselines.loraprune import Adapter, ramp_share, step_scores
from tvaprune.baselines.nirvana import nirvana_scores
from tvaprune.baselines.problem import Problem, drop_units
from tvaprune.gates.grasprune import GraspruneGates
from tvaprune.gates.insertion import GatedModel
from tvaprune.gates.training import learn_gates
from tvaprune.masks.masks import Masks
from tvaprune.options.axes import UNIT_AXES, Axis
from tvaprune.options.baselines import NirvanaOptions
from tvaprune.options.gates import GraspruneOptions

BLOCKS: dict[Axis, str] = {"kv_heads": "self_attn", "intermediate": "mlp"}


def problem_of(run: dict[str, Any]) -> Problem:
    model = MANY_HEADS.model(**run["settings"].get("llama", {}))
    return Problem(model, Topology.of(model.config), MANY_HEADS.token_windows(), 0.5, UNIT_AXES, progress=False)


# ---- Bonsai: one round of the published code


BONSAI = record("bonsai")["runs"][0]


def bonsai_modules(problem: Problem) -> list[tuple[str, Module]]:
    """Ours by the published names, in the order of the record."""
    share = BONSAI["settings"]["prune_frac"]
    found = candidate_modules(prior_scores(problem), Masks.dense(problem.topology).keep, share)
    by_name = {}
    for module in found:
        layer = int(module.candidates[0]) // problem.topology.width(module.axis)
        by_name[f"{BLOCKS[module.axis]}.{layer}"] = module
    return [(name, by_name[name]) for name in BONSAI["modules"]]


def official_order(problem: Problem, name: str, module: Module) -> Tensor:
    """Where each of our candidates is among the published ones."""
    width = problem.topology.width(module.axis)
    published = BONSAI["modules"][name]["candidates"]
    return torch.tensor([published.index(int(unit) % width) for unit in module.candidates])


def bonsai_designs(problem: Problem) -> Tensor:
    """The published masks of all modules in a row, over our candidates: bool [submodels, candidates]."""
    parts = [
        torch.tensor(BONSAI["modules"][name]["masks"])[:, official_order(problem, name, module)].bool()
        for name, module in bonsai_modules(problem)
    ]
    return torch.cat(parts, 1)


def bonsai_coefficients(problem: Problem) -> Tensor:
    """The published coefficients over our candidates, float32."""
    modules = bonsai_modules(problem)
    published = torch.tensor(BONSAI["coefficients"]).split([len(module.candidates) for _, module in modules])
    parts = zip(modules, published, strict=True)
    return torch.cat([part[official_order(problem, name, module)] for (name, module), part in parts])


def test_the_prior_of_bonsai() -> None:
    problem = problem_of(BONSAI)
    prior = prior_scores(problem)
    for axis, block in BLOCKS.items():
        official = [BONSAI["modules"][f"{block}.{layer}"]["prior"] for layer in range(problem.topology.layers)]
        torch.testing.assert_close(prior[axis], torch.tensor(official), rtol=1e-5, atol=1e-7)


def test_the_candidates_of_bonsai_and_how_they_are_drawn() -> None:
    problem = problem_of(BONSAI)
    for name, module in bonsai_modules(problem):
        published = BONSAI["modules"][name]
        order = official_order(problem, name, module)
        assert sorted(order.tolist()) == list(range(len(published["candidates"])))
        official = torch.tensor(published["probability"], dtype=torch.float64)[order]
        torch.testing.assert_close(module.probability, official, rtol=1e-4, atol=1e-6)
        for index, mask in enumerate(published["masks"]):
            dropped = len(mask) - sum(mask)
            assert dropped == (len(mask) - module.dropped if index % 2 else module.dropped)


def test_the_utilities_of_bonsai_are_those_of_the_published_submodels() -> None:
    problem = problem_of(BONSAI)
    modules = [module for _, module in bonsai_modules(problem)]
    keep = Masks.dense(problem.topology).keep
    found = []
    with GatedModel(problem.model, problem.topology).inserted() as gated:
        for design in bonsai_designs(problem):
            drop_units(gated, submodel(keep, modules, design))
            found.append(-perplexity(problem))
    assert found == pytest.approx(BONSAI["utilities"], rel=1e-4)


def test_the_regression_of_bonsai() -> None:
    problem = problem_of(BONSAI)
    utilities = torch.tensor(BONSAI["utilities"], dtype=torch.float64)
    found = fit_coefficients(bonsai_designs(problem), utilities, torch.Generator().manual_seed(0))
    official = bonsai_coefficients(problem)
    torch.testing.assert_close(found, official, rtol=1e-4, atol=1e-7)


def test_bonsai_drops_the_published_units_and_what_else_the_budget_takes() -> None:
    problem = problem_of(BONSAI)
    topology, share = problem.topology, BONSAI["settings"]["prune_frac"]
    modules = [module for _, module in bonsai_modules(problem)]
    stages = StagedPruning(topology, UNIT_AXES)
    stages.prune(scores_of_round(prior_scores(problem), modules, bonsai_coefficients(problem)), share)
    official = {
        axis: torch.tensor([BONSAI["keep"][f"model.layers.{layer}.{block}"] for layer in range(topology.layers)]).bool()
        for axis, block in BLOCKS.items()
    }
    # The published code stops before the unit that crosses the budget, and drops no other in its place.
    dropped = {axis: official[axis] & ~stages.keep[axis] for axis in UNIT_AXES}
    assert sum(int(units.sum()) for units in dropped.values()) <= 1
    for axis in UNIT_AXES:
        assert not (stages.keep[axis] & ~official[axis]).any()
    kept = kept_decoder_parameters(topology, stages.keep) / dense_decoder_parameters(topology)
    assert kept == pytest.approx(1 - share, abs=0.004)


# ---- NIRVANA


@pytest.mark.parametrize("index", range(3))
def test_the_scores_and_thresholds_of_nirvana(index: int) -> None:
    run = record("nirvana")["runs"][index]
    problem = problem_of(run)
    topology, gamma = problem.topology, run["settings"]["gamma"]
    scores = nirvana_scores(problem, NirvanaOptions())
    for axis in UNIT_AXES:
        torch.testing.assert_close(scores[axis], torch.tensor(run["scores"][axis]), rtol=1e-4, atol=1e-6)
        # As many units lie at or below the published threshold as it prunes.
        assert int((scores[axis] <= run["thresholds"][axis] * (1 + 1e-5)).sum()) == run["pruned"][axis]
    shares = {axis: run["pruned"][axis] / scores[axis].numel() for axis in UNIT_AXES}
    masks = allocate_balanced(topology, scores, run["settings"]["sparsity"], gamma)
    for axis in UNIT_AXES:
        share = float((~masks.keep[axis]).float().mean())
        # Both solve for the same budget; the published counts are rounded down, and the units of an emptied layer that
        # stay are not made up for.
        assert share == pytest.approx(shares[axis], abs=2 / topology.layers / topology.kv_heads)
        for layer in range(topology.layers):
            best = torch.sort(scores[axis][layer], descending=True).indices
            count = int(masks.keep[axis][layer].sum())
            assert count > 0
            assert masks.keep[axis][layer][best[:count]].all()


# ---- LoRAPrune


def test_the_importance_and_the_schedule_of_loraprune() -> None:
    run = record("loraprune")["runs"][0]
    problem = problem_of(run)
    rank, alpha = run["settings"]["lora_r"], run["settings"]["lora_alpha"]
    modules = [item for item in problem.model.model.layers.named_modules() if isinstance(item[1], nn.Linear)]
    for index, (name, module) in enumerate(modules):
        adapter = Adapter(module, rank, alpha, torch.Generator())
        adapter.a, adapter.b, adapter.a.grad, adapter.b.grad = factors(module, rank, index)
        axis: Axis = "kv_heads" if "self_attn" in name else "intermediate"
        found = step_scores(problem, {f"model.layers.{name}.weight": adapter})[axis][int(name.split(".")[0])]
        official = torch.tensor(run["scores"][f"model.layers.{name}"])
        torch.testing.assert_close(found, official, rtol=1e-5, atol=1e-7)
    for step, ratio in zip(run["schedule"]["steps"], run["schedule"]["ratios"], strict=True):
        assert run["settings"]["ratio"] * ramp_share(step, 100) == pytest.approx(ratio, abs=1e-9)


# ---- GRASPrune: its two phases of training


def grasprune_gates(run: dict[str, Any]) -> tuple[PreTrainedModel, GraspruneGates]:
    """A model of the record, and gates with the published settings that start at the record's scores."""
    settings, windows = run["settings"], len(MANY_HEADS.token_windows())
    assert settings["lr"] == settings["rescale_lr"]
    model = MANY_HEADS.model(**settings["llama"])
    topology = Topology.of(model.config)
    options = GraspruneOptions(
        settings["epochs"] * windows, settings["rescale_epochs"] * windows, 1, settings["tau"], settings["lr"],
        settings["rescale_alpha"],
    )  # fmt: skip
    # The published share is of the parameters that units own.
    costs = dense_unit_costs(topology)
    owned = sum(float((costs[axis] * topology.width(axis)).sum()) for axis in UNIT_AXES)
    removed = (1 - settings["keep_ratio"]) * owned / dense_decoder_parameters(topology)
    gates = GraspruneGates(topology, options, removed, UNIT_AXES, torch.device("cpu"))
    for axis in UNIT_AXES:
        gates.score[axis].copy_(torch.tensor(run["first_scores"][axis]))
    return model, gates


@pytest.mark.parametrize("index", range(2))
def test_the_scores_masks_and_scales_of_grasprune(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scales are compared on the published masks; ours pay for the units that a layer keeps in any case."""
    run = record("grasprune")["runs"][index]
    model, gates = grasprune_gates(run)
    official = {axis: torch.tensor(run["keep"][axis]).bool() for axis in UNIT_AXES}
    dense = Masks.dense(gates.topology)
    published = replace(dense, keep={**dense.keep, **official})
    first, own_masks = gates.select(), gates.final_masks
    monkeypatch.setattr(gates, "final_masks", lambda: published)
    learn_gates(model, MANY_HEADS.token_windows(), gates, progress=False)
    last, ours = gates.select(), own_masks()
    assert not torch.equal(first["intermediate"], last["intermediate"]), "training changed no mask"
    for axis in UNIT_AXES:
        assert torch.equal(first[axis], torch.tensor(run["first_keep"][axis]).bool())
        assert torch.equal(last[axis], official[axis])
        torch.testing.assert_close(gates.score[axis], torch.tensor(run["scores"][axis]), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(gates.raw_scale[axis], torch.tensor(run["rescale"][axis]), rtol=1e-4, atol=1e-4)
    unpaid = 1 - sparsity(gates.topology, published.widths()) > 1 - gates.target_sparsity
    assert unpaid == (index == 1), "the second run has a head that nobody paid for"
    assert sparsity(gates.topology, ours.widths()) == pytest.approx(gates.target_sparsity, abs=0.002)
    for axis in UNIT_AXES:
        assert bool(ours.keep[axis].any(-1).all())
        # Where the published ranking stops at a unit that does not fit, ours takes smaller ones after it.
        if not unpaid:
            assert not (official[axis] & ~ours.keep[axis]).any()
