"""`TVAPRUNE_NPROC=2 dvc repro`: the same commands, two processes, the same result; one of them killed."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.warm import Warm
from tests.pipeline.workspace import Workspace
from tvaprune.artifacts import read_artifact

STAGES = ("learn_masks", "finetune_lora", "eval_perplexity", "eval_zeroshot")


def figures(workspace: Workspace) -> dict[str, Any]:
    names = ("masks", "finetune", "perplexity", "zeroshot")
    return {name: json.loads((workspace.root / "metrics" / f"{name}.json").read_text()) for name in names}


@pytest.fixture(scope="module")
def one_process(finished: Workspace, warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """After a `dvc repro` on one process, two windows a step."""
    copy = finished.copy(tmp_path_factory.mktemp("processes") / "finished")
    workspace = replace(copy, variables=warm.variables())
    workspace.set_param("learn_masks.tva.batch_size", 2)
    workspace.set_param("finetune_lora.batch_size", 2)
    workspace.repro()
    return workspace


@pytest.fixture
def paired(one_process: Workspace, tmp_path: Path) -> Workspace:
    return one_process.copy(tmp_path / "workspace")


@pytest.mark.slow
def test_two_processes_find_what_one_finds(paired: Workspace) -> None:
    """With the models' layers split over them. (The kills below run with whole layers.)"""
    one, one_masks = figures(paired), read_artifact(paired.root / "artifacts/masks", "masks")[0]
    for stage in STAGES:
        paired.forget(stage)
    paired.set_param("finetune_lora.teacher", "cached")  # which changes no number
    two_processes = replace(paired, variables={"TVAPRUNE_NPROC": "2", "TVAPRUNE_SHARD": "1"})
    assert two_processes.repro() >= set(STAGES)
    two, two_masks = figures(paired), read_artifact(paired.root / "artifacts/masks", "masks")[0]
    for name, expected in one_masks.items():
        if name.endswith(".keep"):
            assert torch.equal(two_masks[name], expected), name
        else:
            torch.testing.assert_close(two_masks[name], expected, rtol=0, atol=1e-4)
    for model in ("dense", "compact", "finetuned"):
        for name, texts in one["perplexity"]["tokens"].items():
            for text in texts:
                found, expected = (each["perplexity"][model][name][text]["ppl"] for each in (two, one))
                assert found == pytest.approx(expected, rel=1e-3)
    assert two["zeroshot"]["dense"] == one["zeroshot"]["dense"]
    assert two["finetune"]["tokens"] == one["finetune"]["tokens"]
    assert two["finetune"]["validation"] == pytest.approx(one["finetune"]["validation"], rel=1e-3)
    # The commands did not change, so for DVC there is nothing left to do, on however many processes.
    assert paired.repro() == set()


@pytest.mark.slow
def test_a_baseline_computes_in_one_of_two_processes(paired: Workspace) -> None:
    paired.set_param("learn_masks.method", "wanda_sp")
    paired.set_param("learn_masks.axes", ["intermediate"])
    two_processes = replace(paired, variables={"TVAPRUNE_NPROC": "2", "TVAPRUNE_SHARD": "1"})
    assert "learn_masks" in two_processes.repro("learn_masks")
    assert (
        read_artifact(paired.root / "artifacts/masks", "masks")[1]["made_with"]["learn_masks"]["method"] == "wanda_sp"
    )


@pytest.mark.parametrize(
    "stage",
    [pytest.param("learn_masks", marks=pytest.mark.nightly), pytest.param("finetune_lora", marks=pytest.mark.slow)],
)
def test_a_killed_process_stops_all_within_a_minute_and_the_stage_goes_on(paired: Workspace, stage: str) -> None:
    two_processes = replace(paired, variables={"TVAPRUNE_NPROC": "2"})
    paired.forget(stage)
    two_processes.repro(stage)
    undisturbed = paired.hashes()
    paired.forget(stage)
    started = time.monotonic()
    said = two_processes.kill_rank(stage, lambda root: any((root / ".resume").glob(f"{stage}-*/state.pt")), rank=1)
    assert time.monotonic() - started < 120  # of which up to 60 to stop
    assert f"error: stages.{stage}: process 1 of 2 was killed by signal 9" in said
    assert "it goes on from its last saved state" in said
    written = {"learn_masks": "artifacts/masks", "finetune_lora": "artifacts/finetuned"}[stage]
    assert not list((paired.root / written).glob("*.safetensors"))
    assert any((paired.root / ".resume").glob(f"{stage}-*/state.pt"))
    assert two_processes.repro(stage) == {stage}
    assert paired.hashes() == undisturbed


def test_windows_that_cannot_be_shared_are_refused_with_the_parameter(workspace: Workspace) -> None:
    """The default learns on one window a step."""
    workspace.forget("learn_masks")
    done = replace(workspace, variables={"TVAPRUNE_NPROC": "2"}).dvc("repro", "learn_masks", check=False)
    assert done.returncode != 0
    assert "learn_masks.tva.batch_size = 1: 2 processes cannot share it equally" in done.stderr
    assert "Traceback" not in done.stderr
