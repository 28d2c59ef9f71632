"""The recipes are sound shell and YAML, and name only what exists."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "configs" / "recipes"
SKYPILOT = YAML(typ="safe").load(FOLDER / "skypilot.yaml")
RECIPES = sorted(FOLDER.iterdir())
SHELL = {path.name: path.read_text() for path in RECIPES if path.suffix not in (".yaml", ".yml")}
ACTIONS = YAML(typ="safe").load(FOLDER / "github-actions.yml")["jobs"]["pipeline"]["steps"]
SHELL |= {f"actions {step['name']}": f"#!/usr/bin/env bash\n{step['run']}" for step in ACTIONS if "run" in step}
SHELL |= {f"skypilot {part}": f"#!/usr/bin/env bash\n{SKYPILOT[part]}" for part in ("setup", "run")}


def test_all_recipes_are_known() -> None:
    assert [path.name for path in RECIPES] == [
        "github-actions.yml",
        "several-gpus.sh",
        "skypilot.yaml",
        "slurm.sbatch",
    ]
    assert set(SKYPILOT) <= {"name", "resources", "envs", "setup", "run"}


@pytest.mark.parametrize("name", SHELL)
def test_bash_and_shellcheck_find_nothing(name: str, tmp_path: Path) -> None:
    path = tmp_path / "script"
    path.write_text(SHELL[name])
    subprocess.run(["bash", "-n", str(path)], check=True)
    # Its package has no wheel for Linux on ARM, where it comes from the system.
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert shellcheck, "install shellcheck"
    # SC1091: an environment that is made elsewhere. SC2164: `cd` under `set -e`.
    options = ["--shell=bash", "--exclude=SC1091,SC2164"]
    done = subprocess.run([shellcheck, *options, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_name_exists(path: Path) -> None:
    text = path.read_text()
    code = "".join(file.read_text() for file in (REPOSITORY / "tvaprune").glob("*.py"))
    for variable in set(re.findall(r"TVAPRUNE_[A-Z]+", text)):
        assert f'"{variable}"' in code, variable
    for file in set(re.findall(r"configs/[\w./-]+", text)):
        assert (REPOSITORY / file).is_file(), file
    for stage in set(re.findall(r"(?:stages\.|repro -s )(\w+)", text)):
        assert (REPOSITORY / "stages" / f"{stage}.py").is_file(), stage
    for target in set(re.findall(r"\bmake ([\w./-]+)", text)):
        subprocess.run(["make", "-n", target], cwd=REPOSITORY, check=True, capture_output=True)
    for command in set(re.findall(r"\bdvc ((?:exp|cache|remote) \w+|repro)", text)):
        dvc = Path(sys.executable).parent / "dvc"
        subprocess.run([str(dvc), *command.split(), "--help"], check=True, capture_output=True)


def test_the_container_sets_up_with_make() -> None:
    container = json.loads((REPOSITORY / ".devcontainer" / "devcontainer.json").read_text())
    assert re.fullmatch(r"make [a-z]+", container["postCreateCommand"])
    planned = subprocess.run(
        ["make", "-n", "-W", "requirements.lock", *container["postCreateCommand"].split()[1:]],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert re.search(r"--require-hashes .*-r requirements-dev\.lock", planned)
    assert container["image"].endswith(":3.11")
    assert container["remoteEnv"]["PATH"].startswith("${containerWorkspaceFolder}/.venv/bin:")


def test_nothing_installs_a_lock_but_the_makefile() -> None:
    """Another way would have to repeat its options, or would check no hash. The environment with vLLM is its own."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    paths = [path for name in names.split("\0") if name and (path := REPOSITORY / name).is_file()]
    documents = [path for path in paths if path.suffix in (".md", ".yml", ".yaml", ".sh", ".sbatch", ".json", "")]
    found = [
        (path.relative_to(REPOSITORY).as_posix(), line)
        for path in documents
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"-r requirements(?!-vllm)[a-z-]*\.lock", line) and not line.startswith("-r ")
    ]
    assert found == []
