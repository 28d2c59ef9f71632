"""Recipes that are run: the SLURM one's body, with sbatch's variables given, and the check of the users' own CI."""

import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.pipeline.workspace import REPOSITORY, Workspace, environment, git


@pytest.mark.nightly
def test_a_slurm_job_pushes_an_experiment_that_another_clone_pulls(workspace: Workspace, tmp_path: Path) -> None:
    workspace.dvc("remote", "add", "--default", "team", str(tmp_path / "remote"))
    workspace.commit()
    git(tmp_path, "clone", "-q", "--bare", str(workspace.root), "origin.git")
    venv, shared = tmp_path / "venv", tmp_path / "shared"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "activate").write_text(f'PATH="{Path(sys.executable).parent}:$PATH"\n')
    # What another job has computed is in the cache that all share.
    (workspace.root / ".dvc" / "cache").rename(tmp_path / "cache")
    shared.mkdir()
    (tmp_path / "cache").rename(shared / "cache")

    done = subprocess.run(
        ["bash", str(REPOSITORY / "configs" / "recipes" / "slurm.sbatch"), "-S", "eval_zeroshot.limit=2"],
        cwd=tmp_path,
        env=environment()
        | {"REPOSITORY": str(tmp_path / "origin.git"), "VENV": str(venv), "SHARED": str(shared), "SLURM_JOB_ID": "7"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in shared.iterdir()) == ["cache"]
    git(tmp_path, "clone", "-q", str(tmp_path / "origin.git"), "clone")
    clone = Workspace(tmp_path / "clone")
    assert "slurm-7" in clone.dvc("exp", "list", "origin", "--all-commits").stdout
    clone.dvc("exp", "pull", "origin", "slurm-7")
    clone.dvc("exp", "apply", "slurm-7")
    assert "limit: 2" in (clone.root / "params.yaml").read_text()
    name = "artifacts/compact/model.safetensors"
    assert (clone.root / name).read_bytes() == (workspace.root / name).read_bytes()


@pytest.mark.slow
def test_the_users_ci_fails_only_where_the_lock_file_is_out_of_date(workspace: Workspace, tmp_path: Path) -> None:
    recipe = YAML(typ="safe").load(REPOSITORY / "configs" / "recipes" / "github-actions.yml")
    (check,) = [step["run"] for step in recipe["jobs"]["pipeline"]["steps"] if "dvc repro" in step.get("run", "")]
    git(tmp_path, "clone", "-q", str(workspace.root), "clone")
    clone = Workspace(tmp_path / "clone")
    (clone.root / ".venv" / "bin").mkdir(parents=True)
    (clone.root / ".venv" / "bin" / "activate").touch()

    def run() -> subprocess.CompletedProcess[str]:
        command = ["bash", "-eo", "pipefail", "-c", check]
        return subprocess.run(command, cwd=clone.root, env=environment(), capture_output=True, text=True)

    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    clone.set_param("sparsity", 0.3)
    done = run()
    assert done.returncode == 1
    assert "::error::dvc.lock is out of date" in done.stdout
