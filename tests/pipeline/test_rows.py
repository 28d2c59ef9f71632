"""Rows of docs/results.yaml run on the tiny pipeline, and params.yaml is as before."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.pipeline.workspace import Workspace, environment

DEFINITIONS = """
rows:
  twin: {set: {seed: 0}, target: eval_perplexity}
  broken: {set: {compact.max_rel_logit_diff: 1.0e-30, adapt_dimensions.multiple: 1}, target: compact}
  few: {set: {eval_zeroshot.limit: 2}, target: [eval_zeroshot]}
"""


def rows(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tools.run_rows", *arguments]


@pytest.mark.nightly
def test_rows_are_saved_from_their_own_stages_and_a_failure_stops_no_other(workspace: Workspace) -> None:
    root, params = workspace.root, (workspace.root / "params.yaml").read_bytes()
    (root / "docs/results.yaml").write_text(DEFINITIONS)
    (root / "metrics/speed.json").write_text("{}")
    done = subprocess.run(rows("--missing"), cwd=root, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert (root / "params.yaml").read_bytes() == params
    progress = [line for line in done.stderr.splitlines() if re.match(r"\[\d/3\]", line)]
    assert [line.split(",")[0] for line in progress] == [
        "[1/3] twin: saved",
        "[2/3] broken: dvc repro ended with 255",
        "[3/3] few: saved",
    ]
    assert sorted(path.name for path in (root / "metrics/results").iterdir()) == ["few.json", "twin.json"]
    twin, few = (json.loads((root / f"metrics/results/{name}.json").read_text()) for name in ("twin", "few"))
    assert {"perplexity", "zeroshot", "masks", "finetune"} <= set(twin["metrics"])
    assert "speed" not in twin["metrics"]
    assert (few["params"]["eval_zeroshot"]["limit"], few["metrics"]["zeroshot"]["limit"]) == (2, 2)
    assert (
        "twin"
        not in subprocess.run(
            rows("--missing", "--list"), cwd=root, env=environment(), capture_output=True, text=True
        ).stdout
    )


@pytest.mark.slow
def test_params_are_restored_when_the_runner_is_ended(workspace: Workspace) -> None:
    root, path = workspace.root, workspace.root / "params.yaml"
    params = path.read_bytes()
    (root / "docs/results.yaml").write_text("rows: {other: {set: {sparsity: 0.3}, target: eval_perplexity}}")
    with subprocess.Popen(rows("other"), cwd=root, env=environment(), stderr=subprocess.DEVNULL) as runner:
        while path.read_bytes() == params:
            time.sleep(0.01)
        runner.send_signal(signal.SIGTERM)
    assert runner.returncode == 128 + signal.SIGTERM
    assert path.read_bytes() == params
    assert not (root / "metrics/results").exists()
