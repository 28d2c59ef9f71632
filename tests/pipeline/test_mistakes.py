"""What a user's mistakes and a machine's limits end in: one clear line and an exit status other than 0."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline.tiny_inputs import write_inputs, write_small_params
from tests.pipeline.workspace import REPOSITORY, Workspace, environment, stages_run


@pytest.fixture
def fresh(scratch: None, tmp_path: Path) -> Workspace:
    """Committed, and nothing has run."""
    workspace = Workspace.create(tmp_path / "fresh")
    write_inputs(workspace.root / "inputs")
    write_small_params(workspace.root / "params.yaml")
    workspace.commit()
    return workspace


def failed(workspace: Workspace, setting: str) -> list[str]:
    """The lines that name the error of `dvc exp run -S SETTING`; DVC's own summary of a stage's failure is left out."""
    done = workspace.dvc("exp", "run", "-S", setting, check=False)
    subprocess.run(["git", "checkout", "--quiet", "params.yaml"], cwd=workspace.root, check=True)
    assert done.returncode != 0
    assert stages_run(done.stdout) <= {"check_params", "fetch_inputs"}
    lines = (done.stdout + done.stderr).splitlines()
    assert not any("Traceback" in line for line in lines)
    named = [line for line in lines if line.startswith(("error: ", "ERROR: "))]
    return [line for line in named if not line.startswith("ERROR: failed to reproduce")]


@pytest.mark.slow
def test_mistakes_in_an_experiment(fresh: Workspace) -> None:
    """A misspelt key, at the top and deep in a section; a bad value; an input that is not there."""
    for key in ("sparsty", "learn_masks.tva.stepz"):
        (line,) = failed(fresh, f"{key}=3")
        assert line == f"ERROR: Invalid `--set-param` value: Could not override '{key}'."
    (line,) = failed(fresh, "+learn_masks.tva.stepz=3")
    assert line.startswith("error: params.yaml: learn_masks.tva.stepz: unknown key; known keys are ablation, ")
    (line,) = failed(fresh, "sparsity=2")
    assert line == "error: params.yaml: sparsity = 2: Input should be less than 1"
    (line,) = failed(fresh, "fetch_inputs.model.path=inputs/none")
    assert line.startswith("error: ")
    assert "inputs/none" in line


@pytest.mark.parametrize(
    ("out", "line"),
    [
        ("/dev/full", "No space left on device; make room, then run it again"),
        ("pyproject.toml/params.ok", "pyproject.toml: File exists, and is not a directory"),
        ("/proc/none/params.ok", "/proc/none: No such file or directory"),
    ],
    ids=["full disk", "below a file", "where nothing can be made"],
)
def test_what_cannot_be_written(out: str, line: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "stages.check_params", "--out", out]
    environ = environment() | {"DVC_ROOT": str(tmp_path)}  # where the stage's lock is: these run side by side
    done = subprocess.run(command, cwd=REPOSITORY, env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {line}\n"


# A limit on a file's size is as much of a full disk as a process can have to itself: EFBIG in place of ENOSPC.
LIMITED = """
import resource, signal, sys
from pathlib import Path
import torch
from tvaprune.artifacts import write_artifact
from tvaprune.errors import clear_errors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
with clear_errors():
    write_artifact(Path(sys.argv[1]), "masks", {"score": torch.zeros(10_000)})
"""


def test_tensors_that_do_not_fit_on_the_disk(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "masks")]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "File too large" in line


def test_a_stage_runs_once_at_a_time_in_a_workspace(tmp_path: Path) -> None:
    """Also one that saves no state. The first waits, in its `main`, for parameters from a pipe."""
    pipe, environ = tmp_path / "pipe", environment() | {"DVC_ROOT": str(tmp_path)}
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "stages.check_params"]
    out = ["--out", str(tmp_path / "params.ok")]
    first = subprocess.Popen([*command, "--params", str(pipe)], cwd=REPOSITORY, env=environ)
    with first, pipe.open("w"):  # open from both sides: it holds the lock
        second = subprocess.run([*command, *out], cwd=REPOSITORY, env=environ, capture_output=True, text=True)
        asked = subprocess.run([*command, "--help"], cwd=REPOSITORY, env=environ, capture_output=True)
        other = {"DVC_ROOT": str(tmp_path / "other")}
        elsewhere = subprocess.run([*command, *out], cwd=REPOSITORY, env=environ | other, capture_output=True)
        first.kill()
    assert (second.returncode, second.stdout) == (1, "")
    (line,) = second.stderr.splitlines()
    assert line.startswith("error: check_params: another process is already making this output (lock ")
    assert line.endswith("Wait for it to end, or stop it, then run dvc repro again.")
    assert (asked.returncode, elsewhere.returncode) == (0, 0)
    assert subprocess.run([*command, *out], cwd=REPOSITORY, env=environ).returncode == 0  # a kill leaves no lock
