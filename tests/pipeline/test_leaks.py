"""Evaluation text in the calibration text stops the run before it learns; other evaluation text reruns little."""

import json
from pathlib import Path

import pytest

from tests.pipeline.workspace import Workspace, stages_run


def plant(workspace: Workspace) -> None:
    """A held-out story inside every calibration letter, where the comparison of whole texts does not see it."""
    inputs = workspace.root / "inputs"
    story = (inputs / "stories" / "00.txt").read_text()
    for letter in (inputs / "letters").iterdir():
        letter.write_text(f"{letter.read_text()} {story} {letter.stem}")


@pytest.mark.warm
def test_a_planted_overlap_stops_the_run_before_the_learning(workspace: Workspace) -> None:
    plant(workspace)
    workspace.dvc("repro", "-f", "-s", "fetch_inputs")
    done = workspace.dvc("repro", check=False)
    assert done.returncode != 0
    assert stages_run(done.stdout) == {"sample_calibration", "check_leaks"}
    assert "Traceback" not in done.stderr
    assert "check_leaks.max_overlap = 0.001 is exceeded" in done.stderr
    found = json.loads((workspace.root / "metrics" / "leaks.json").read_text())
    stories = found["sets"]["heldout_stories"]
    for learned in ("calibration", "finetuning"):
        share = stories[f"in_{learned}"]["ngram_share"]
        assert share > 0.001
        assert f"heldout_stories: {share:.4f} of its 13-grams are in the {learned} windows" in done.stderr
    assert "(00)" in done.stderr
    assert "take that text out of fetch_inputs.calibration" in done.stderr
    assert not (workspace.root / "artifacts" / "leaks.ok").exists()


def test_an_unplanted_run_shares_nothing_and_declares_its_text(finished: Workspace) -> None:
    found = json.loads((finished.root / "metrics" / "leaks.json").read_text())
    assert found["largest_overlap"] == 0
    assert found["sets"]["heldout_stories"]["ngrams"] > 0
    windows = found["finetuning"]["windows"]
    assert set(windows) == {"letters", "notes"}
    assert sum(windows.values()) == 16 + 2
    assert found["finetuning"]["same_kind"] == {"stories": 0, "more_letters": 1}


@pytest.mark.warm
@pytest.mark.slow
def test_other_evaluation_text_is_checked_and_measured_and_relearns_nothing(workspace: Workspace) -> None:
    path: Path = workspace.root / "inputs" / "zeroshot" / "piqa.jsonl"
    path.write_text(path.read_text().replace("wait", "rest"))
    workspace.dvc("repro", "-f", "-s", "fetch_inputs")
    assert workspace.repro() == {"check_leaks", "eval_dense_zeroshot", "eval_zeroshot", "report"}
