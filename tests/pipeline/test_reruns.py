"""A changed parameter reruns what depends on it and nothing else. check_params reads them all, so it always runs."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.pipeline.workspace import Workspace, stages_run
from tvaprune.artifacts import read_artifact

MEASURES = {"benchmark_speed", "eval_perplexity", "eval_zeroshot", "quantize", "report"}
FROM_ADAPT = {"check_model", "adapt_dimensions", "compact", "finetune_lora", *MEASURES}
slow = pytest.mark.slow


@pytest.mark.warm
@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("eval_zeroshot.limit", 2, {"eval_dense_zeroshot", "eval_zeroshot", "report"}),
        ("report.prompts", [], {"report"}),
        ("learn_masks.flap.windows", 32, {"check_model"}),  # another method's option
        pytest.param("finetune_lora.learning_rate", 5e-3, {"finetune_lora", *MEASURES}, marks=pytest.mark.nightly),
        # The same change as in the experiment below.
        pytest.param("adapt_dimensions.multiple", 8, {"profile_hardware", *FROM_ADAPT}, marks=pytest.mark.nightly),
        pytest.param("sparsity", 0.4, {"learn_masks", "update_weights", *FROM_ADAPT}, marks=pytest.mark.nightly),
    ],
)
def test_a_change_reruns_exactly_what_it_must(workspace: Workspace, key: str, value: Any, expected: set[str]) -> None:
    workspace.set_param(key, value)
    assert workspace.repro() == expected | {"check_params"}
    assert workspace.repro() == set()


@pytest.mark.warm
def test_a_changed_comment_in_params_reruns_nothing(workspace: Workspace) -> None:
    path = workspace.root / "params.yaml"
    path.write_text(path.read_text() + "# a note\n")
    assert workspace.repro() == set()


@pytest.mark.warm
@pytest.mark.nightly
def test_a_latency_budget_times_learns_and_cuts_to_widths_that_were_timed(workspace: Workspace) -> None:
    """And measured widths alone, which also need a table, learn nothing anew."""
    workspace.set_param("adapt_dimensions.multiple", "measured")
    workspace.set_param("profile_hardware.intermediate_step", 16)
    workspace.set_param("profile_hardware.hidden_step", 16)
    assert workspace.repro() == {"check_params", "profile_hardware", *FROM_ADAPT}
    workspace.set_param("adapt_dimensions.multiple", 16)
    workspace.set_param("learn_masks.budget", "latency")
    workspace.set_param("learn_masks.latency", {"phase": "decode", "ratio": 0.8})
    learned = {"profile_hardware", "learn_masks", "update_weights", *FROM_ADAPT, "check_params"}
    assert workspace.repro() == learned
    assert workspace.repro() == set()
    folder = workspace.root / "metrics"
    masks, adapt = (json.loads((folder / f"{name}.json").read_text()) for name in ("masks", "adapt"))
    assert masks["decode"]["predicted_share"] <= 0.8
    assert adapt["decode"]["predicted_share"] == masks["decode"]["predicted_share"]
    assert adapt["sparsity_decoder"] == masks["sparsity_decoder"] > 0
    widths, _ = read_artifact(workspace.root / "artifacts/adapted", "masks")
    assert all(int(units.sum()) % 16 == 0 for units in widths["intermediate.keep"])
    # Another ratio is learned by the same table.
    workspace.set_param("learn_masks.latency.ratio", 0.9)
    assert "profile_hardware" not in workspace.repro()


@pytest.mark.warm
@pytest.mark.slow
def test_without_finetuning_the_pipeline_ends_and_compares_two_models(workspace: Workspace) -> None:
    workspace.set_param("finetune_lora.enabled", False)
    assert workspace.repro() == {"check_params", "finetune_lora", *MEASURES}
    folder = workspace.root / "metrics"
    assert json.loads((folder / "finetune.json").read_text()) == {"enabled": 0}
    for name in ("perplexity", "zeroshot"):
        content = json.loads((folder / f"{name}.json").read_text())
        assert "compact" in content
        assert "finetuned" not in content


@pytest.mark.nightly
def test_an_experiment_in_a_copy_reruns_the_same_and_leaves_the_workspace_alone(workspace: Workspace) -> None:
    """`dvc exp run --temp` works in a copy of the workspace, which has the committed and changed files only."""
    before = workspace.hashes()
    done = workspace.dvc("exp", "run", "--temp", "-n", "finer", "-S", "adapt_dimensions.multiple=8")
    assert stages_run(done.stdout) == {"profile_hardware", *FROM_ADAPT} | {"check_params"}
    assert workspace.hashes() == before
    assert workspace.dvc("status", "--json").stdout.strip() == "{}"
    workspace.dvc("exp", "apply", "finer")
    after = workspace.hashes()
    changed = {path for path in before if before[path] != after[path]}
    assert {"artifacts/adapted", "artifacts/compact", "artifacts/finetuned"} <= changed
    assert "artifacts/masks" not in changed
    assert workspace.repro() == set()


@pytest.mark.parametrize(
    "stage",
    [
        "sample_calibration",
        *(pytest.param(each, marks=pytest.mark.nightly) for each in ("fetch_inputs", "learn_masks", "compact")),
    ],
)
def test_the_seed_of_pythons_hashes_changes_nothing(workspace: Workspace, stage: str) -> None:
    """The order of a set follows it."""
    undisturbed = workspace.hashes()
    for seed in ("1", "2"):
        workspace.forget(stage)
        assert replace(workspace, variables={"PYTHONHASHSEED": seed}).repro(stage) == {stage}
        assert workspace.hashes() == undisturbed


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_two_threads_learn_the_masks_of_one(workspace: Workspace) -> None:
    """Not the bits: two threads add the elements of a whole tensor in another order (docs/design.md)."""
    before, _ = read_artifact(workspace.root / "artifacts/masks", "masks")
    same = {
        path: md5 for path, md5 in workspace.hashes().items() if path.startswith(("data/", "artifacts/calibration"))
    }
    for stage in ("fetch_inputs", "sample_calibration", "learn_masks"):
        workspace.forget(stage)
    two = replace(workspace, variables={"OMP_NUM_THREADS": "2"})
    assert two.repro("learn_masks") >= {"fetch_inputs", "sample_calibration", "learn_masks"}
    after, _ = read_artifact(workspace.root / "artifacts/masks", "masks")
    assert same.items() <= workspace.hashes().items()
    for name, expected in before.items():
        if name.endswith(".keep"):
            assert torch.equal(after[name], expected), name
        else:
            torch.testing.assert_close(after[name], expected, rtol=0, atol=1e-4)
