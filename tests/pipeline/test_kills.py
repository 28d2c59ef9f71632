"""SIGKILL in the middle of a stage, then `dvc repro`: the same hashes as an undisturbed run."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pipeline.workspace import Workspace

Reached = Callable[[Path], bool]


def saved_state(stage: str) -> Reached:
    return lambda root: any((root / ".resume").glob(f"{stage}-*/state.pt"))


def exists(path: str) -> Reached:
    return lambda root: (root / path).exists()


LEARN, RECOVER = saved_state("learn_masks"), saved_state("finetune_lora")
SAMPLED = exists("artifacts/calibration")
slow, nightly = pytest.mark.slow, pytest.mark.nightly


@pytest.mark.parametrize(
    ("stage", "reached", "dvc_too"),
    [
        pytest.param("learn_masks", LEARN, True, id="learn_masks, and DVC"),
        pytest.param("learn_masks", LEARN, False, id="learn_masks", marks=nightly),
        pytest.param("finetune_lora", RECOVER, True, id="finetune_lora, and DVC", marks=slow),
        pytest.param("finetune_lora", RECOVER, False, id="finetune_lora", marks=nightly),
        pytest.param("fetch_inputs", exists("data/heldout"), True, id="fetch_inputs", marks=nightly),
        pytest.param("sample_calibration", SAMPLED, True, id="sample_calibration", marks=nightly),
        pytest.param("adapt_dimensions", exists("artifacts/adapted"), True, id="adapt_dimensions", marks=nightly),
        pytest.param("update_weights", exists("artifacts/update"), True, id="update_weights", marks=nightly),
        pytest.param("compact", exists("artifacts/compact"), True, id="compact", marks=slow),
    ],
)
def test_a_killed_stage_ends_as_an_undisturbed_one(
    workspace: Workspace, stage: str, reached: Reached, dvc_too: bool
) -> None:
    undisturbed = workspace.hashes()
    workspace.forget(stage)
    assert workspace.hashes() != undisturbed
    workspace.kill_during(stage, reached, dvc_too=dvc_too)
    assert workspace.hashes() != undisturbed
    interrupted = reached(workspace.root)
    assert workspace.repro() >= {stage}
    assert interrupted
    assert workspace.hashes() == undisturbed
    assert list((workspace.root / ".resume").glob("*/state.pt")) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "reached"),
    [
        pytest.param("learn_masks", LEARN, id="learn_masks", marks=pytest.mark.nightly),
        pytest.param("compact", exists("artifacts/compact"), id="compact"),  # which saves no state
    ],
)
def test_a_second_writer_is_refused_while_the_first_lives(workspace: Workspace, stage: str, reached: Reached) -> None:
    """A SIGTERM to DVC alone leaves its stage running; the next `dvc repro` must not write beside it."""
    undisturbed = workspace.hashes()
    workspace.forget(stage)
    with workspace.running(stage, reached) as orphan:
        done = workspace.dvc("repro", stage, check=False)
        assert done.returncode != 0
        assert f"error: {stage}: another process is already making this output" in done.stderr
        assert "Traceback" not in done.stderr
        assert orphan.is_running()
    workspace.repro()
    assert workspace.hashes() == undisturbed
