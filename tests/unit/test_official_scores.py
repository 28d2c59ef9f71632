"""Our scores, masks and biases against those of the methods' own code, recorded by tools/record_official_scores.py."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tools.official.record import MANY_HEADS, SEED, TOKENS, WIDE_HEADS, TinyLlama, fingerprint
from tools.record_official_scores import PUBLISHED, main
from tvaprune.architecture.parameter_counts import dense_decoder_parameters, kept_decoder_parameters
from tvaprune.architecture.topology import Topology
from tvaprune.baselines.activations import input_statistics
from tvaprune.baselines.flap import flap, flap_scores
from tvaprune.baselines.llm_pruner import llm_pruner, llm_pruner_scores
from tvaprune.baselines.magnitude import magnitude, magnitude_scores
from tvaprune.baselines.osscar import osscar
from tvaprune.baselines.problem import Problem
from tvaprune.baselines.wanda_sp import sequential_wanda_scores, wanda_sp
from tvaprune.masks.masks import Masks
from tvaprune.options.axes import UNIT_AXES, Axis
from tvaprune.options.baselines import (
    Allocation,
    FlapOptions,
    LlmPrunerOptions,
    MagnitudeOptions,
    OsscarOptions,
    WandaSpOptions,
)

OFFICIAL = Path(__file__).resolve().parents[1] / "official"
ALLOCATION: dict[str, Allocation] = {"AL-AM": "adaptive", "UL-UM": "uniform"}


def record(method: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((OFFICIAL / f"{method}.json").read_text())
    return content


def runs(method: str) -> list[Any]:
    return [pytest.param(run, id=f"{method}-{index}") for index, run in enumerate(record(method)["runs"])]


def official(run: dict[str, Any], name: str, axis: Axis) -> Tensor:
    return torch.tensor(run[name][axis], dtype=torch.bool if name == "keep" else torch.float32)


def problem_of(run: dict[str, Any], llama: TinyLlama = WIDE_HEADS) -> Problem:
    """The model and windows of the record; the target is what the published code kept, where it cut."""
    model = llama.model(**run["settings"].get("llama", {}))
    assert fingerprint(model) == run["weights"]
    topology, target = Topology.of(model.config), 0.2
    if "keep" in run:
        keep = {**Masks.dense(topology).keep, **{axis: official(run, "keep", axis) for axis in UNIT_AXES}}
        target = 1 - kept_decoder_parameters(topology, keep) / dense_decoder_parameters(topology)
    return Problem(model, topology, llama.token_windows(), target, UNIT_AXES, progress=False)


def assert_same_units_kept(masks: Masks, run: dict[str, Any]) -> None:
    for axis in UNIT_AXES:
        assert torch.equal(masks.keep[axis], official(run, "keep", axis)), axis


@pytest.mark.parametrize("method", PUBLISHED)
def test_a_record_names_repository_commit_and_source(method: str) -> None:
    content, published = record(method), PUBLISHED[method]
    assert content["repository"] == published.repository
    assert re.fullmatch(r"[0-9a-f]{40}", content["commit"])
    assert (content["llama"], content["seed"]) == (published.llama.config, SEED)
    assert content["windows"] == [published.llama.windows, TOKENS]
    assert content["runs"]
    for run in content["runs"]:
        assert re.match(r"[\w/]+\.py:\d+ \w+", run["source"])
        assert (run["source"], run["replaced"]) == (published.source, published.replaced)
        assert run["replaced"]
        assert run["settings"]


def test_the_recorder_takes_a_commit_without_changes_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A record that names a commit which it is not from would prove nothing."""

    def refused(method: str) -> str:
        with pytest.raises(SystemExit):
            main(method, tmp_path, tmp_path / "records")
        assert not (tmp_path / "records").exists()
        return capsys.readouterr().err

    assert "--method nothing" in refused("nothing")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert "HEAD" in refused("flap")
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "m"], check=True)
    (tmp_path / "changed.py").write_text("")
    assert "has changes that are in no commit" in refused("flap")


@pytest.mark.parametrize("run", runs("flap"))
def test_flap(run: dict[str, Any]) -> None:
    problem = problem_of(run)
    scores = flap_scores(problem, input_statistics(problem))
    if "scores" in run:
        # The published scores are of query heads; a group's is their mean.
        heads = official(run, "scores", "kv_heads").view(*scores["kv_heads"].shape, -1).mean(-1)
        torch.testing.assert_close(scores["kv_heads"], heads, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            scores["intermediate"], official(run, "scores", "intermediate"), rtol=1e-5, atol=1e-5
        )
    if "keep" in run:
        masks, update = flap(problem, FlapOptions(allocation=ALLOCATION[run["settings"]["structure"]]))
        assert_same_units_kept(masks, run)
        for name, values in run["bias"].items():
            # The record has a bias of 0 where nothing was dropped.
            found = update.bias(name, problem.model.get_submodule(name).weight, masks)
            torch.testing.assert_close(found, torch.tensor(values), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("run", runs("wanda_sp"))
def test_wanda_sp(run: dict[str, Any]) -> None:
    problem = problem_of(run)
    scores = sequential_wanda_scores(problem)
    # The published score is a mean over the rows of W, and of the squared norms of windows.
    factor = WIDE_HEADS.config["hidden_size"] * len(problem.windows) ** 0.5
    for axis in UNIT_AXES:
        torch.testing.assert_close(scores[axis] / factor, official(run, "scores", axis), rtol=1e-5, atol=1e-6)
    assert_same_units_kept(wanda_sp(problem, WandaSpOptions()), run)


@pytest.mark.parametrize("run", runs("llm_pruner"))
def test_llm_pruner(run: dict[str, Any]) -> None:
    problem = problem_of(run)
    options = LlmPrunerOptions(protect_first=1, protect_last=1, importance=run["settings"]["taylor"])
    scores = llm_pruner_scores(problem, options)
    for axis in UNIT_AXES:
        torch.testing.assert_close(scores[axis][1:-1], official(run, "scores", axis), rtol=1e-4, atol=1e-6)
    assert_same_units_kept(llm_pruner(problem, options), run)


@pytest.mark.parametrize("run", runs("magnitude"))
def test_magnitude(run: dict[str, Any]) -> None:
    problem = problem_of(run)
    scores = magnitude_scores(problem.model, problem.topology, UNIT_AXES)
    # The published score is the mean over q, k, v and o, and over gate, up and down.
    for axis, matrices in (("kv_heads", 4), ("intermediate", 3)):
        torch.testing.assert_close(scores[axis][1:-1] / matrices, official(run, "scores", axis), rtol=1e-5, atol=1e-6)
    assert_same_units_kept(magnitude(problem, MagnitudeOptions(protect_first=1, protect_last=1)), run)


@pytest.mark.parametrize("run", runs("osscar"))
def test_osscar_drops_and_refits(run: dict[str, Any]) -> None:
    problem, settings = problem_of(run, MANY_HEADS), run["settings"]
    masks, update = osscar(
        problem,
        OsscarOptions(len(problem.windows), settings["lambda2"], settings["update_iter"], settings["update_iter2"]),
    )
    assert_same_units_kept(masks, run)
    last = f"model.layers.{problem.topology.layers - 1}"
    for axis, name in {"kv_heads": "self_attn.o_proj", "intermediate": "mlp.down_proj"}.items():
        expected = torch.tensor(run["last_layer"][axis])
        found = update.weight[f"{last}.{name}.weight"][: len(expected)]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
