"""What a user's mistakes and a machine's limits end in: one clear line and an exit status other than 0."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline.workspace import REPOSITORY, Workspace, environment, stages_run


def ended(workspace: Workspace, *settings: str) -> str:
    """What `dvc exp run -S ...` says when it fails."""
    done = workspace.dvc("exp", "run", *(word for each in settings for word in ("-S", each)), check=False)
    assert done.returncode != 0
    assert stages_run(done.stdout) <= {"check_params", "fetch_inputs"}
    said = done.stdout + done.stderr
    assert "Traceback" not in said
    return said


@pytest.mark.slow
def test_mistakes_in_an_experiment(workspace: Workspace) -> None:
    """A misspelt key, also deep in a section; a bad value; an input that is not there."""
    assert "ERROR: unexpected error - Could not override 'sparsty'" in ended(workspace, "sparsty=0.6")
    assert "Could not override 'learn_masks.tva.stepz'" in ended(workspace, "learn_masks.tva.stepz=3")
    (line,) = errors(ended(workspace, "sparsity=2"))
    assert line.startswith("error: params.yaml: sparsity = 2: ")
    (line,) = errors(ended(workspace, "+learn_masks.tva.stepz=3"))
    assert line.startswith("error: params.yaml: learn_masks.tva.stepz: unknown key")
    (line,) = errors(ended(workspace, "fetch_inputs.model.path=inputs/none"))
    assert "inputs/none" in line


def errors(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize(
    ("out", "line"),
    [
        ("/dev/full", "No space left on device; make room, then run it again"),
        ("pyproject.toml/params.ok", "pyproject.toml: File exists, and is not a directory"),
        ("/proc/none/params.ok", "/proc/none: No such file or directory"),
    ],
    ids=["full disk", "below a file", "where nothing can be made"],
)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_what_cannot_be_written(out: str, line: str) -> None:
    command = [sys.executable, "-m", "stages.check_params", "--out", out]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {line}\n"


# A limit on the size of a file is what a process can have of a full disk without being root: EFBIG in place of ENOSPC.
LIMITED = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
sys.argv[0] = "-m"
sys.argv = ["stages.update_weights", *sys.argv[1:]]
runpy.run_module("stages.update_weights", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_an_artifact_that_does_not_fit(workspace: Workspace, tmp_path: Path) -> None:
    command = [sys.executable, "-c", LIMITED, "--update", str(tmp_path / "update")]
    done = subprocess.run(command, cwd=workspace.root, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = errors(done.stderr)
    assert "File too large" in line
    assert "Traceback" not in done.stderr
