"""Every command of the README runs, in its order, on the tiny pipeline."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.pipeline.workspace import REPOSITORY, Workspace
from tests.tiny_models import random_masks, random_update, write_published
from tvaprune.architecture.topology import Topology
from tvaprune.checkpoint.loading import load_config

README = (REPOSITORY / "README.md").read_text()
# Set-up: `.ci/run` and the tests themselves come from it; here it is shown that make knows the targets.
MAKE = re.compile(r"make ([a-z-]+)")
# What the tiny model and the tiny tasks have no room for, and what would take long.
SMALLER = {
    "adapt_dimensions.multiple=64": "adapt_dimensions.multiple=8",
    "eval_zeroshot.limit=500": "eval_zeroshot.limit=2",
    "learn_masks.method=tva,flap,wanda_sp": "learn_masks.method=flap",
    "sparsity=0.2,0.5": "sparsity=0.3",
    " -S compact.gguf=q8_0": "",  # llama.cpp does not know the tiny model's tokenizer
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    lines = [line.split("  #")[0].split(" # ")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line and line != "source .venv/bin/activate"]


def test_make_has_the_targets_the_readme_names() -> None:
    named = {match[1] for line in commands() if (match := MAKE.match(line))}
    assert {"repro", "test"} <= named
    for target in named:
        subprocess.run(["make", "-n", target], cwd=REPOSITORY, check=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_command_runs(workspace: Workspace, tmp_path: Path) -> None:
    run = [line for line in commands() if not MAKE.match(line)]
    assert any("exp run" in line for line in run)
    for line in run:
        program, *_ = line.split()
        assert program in ("dvc", "python"), f"no test knows how to run {line!r}"
        for whole, smaller in SMALLER.items():
            line = line.replace(whole, smaller)
        arguments = [part.strip("'") for part in line.split()[1:]]
        arguments = [part.replace("s3://bucket/tvaprune", str(tmp_path / "remote")) for part in arguments]
        if program == "python":
            topology = Topology.of(load_config(workspace.root / "data/model"))
            masks, update = random_masks(topology, seed=0), random_update(topology, seed=0)
            write_published(workspace.root / "tvaprune-mistral-mask.pkl", masks, update)
            subprocess.run([sys.executable, *arguments], cwd=workspace.root, check=True)
            continue
        workspace.dvc(*arguments)
        if line == "dvc queue start":
            _wait_for_the_queue(workspace)
    assert any((tmp_path / "remote").rglob("*"))


def _wait_for_the_queue(workspace: Workspace) -> None:
    deadline = time.monotonic() + 900
    while time.monotonic() < deadline:
        status = workspace.dvc("queue", "status").stdout
        assert "Failed" not in status, status
        if "Running" not in status and "Queued" not in status:
            assert status.count("Success") == 1, status
            return
        time.sleep(2)
    pytest.fail("the queue did not end")


def run_python(snippet: str, root: Path, home: Path) -> str:
    environment = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-P", "-c", snippet], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_pruned_model_is_used_as_the_readme_shows(finished: Workspace, tmp_path: Path) -> None:
    three_lines, _ = blocks("python")
    assert run_python(three_lines, finished.root, tmp_path).strip()


def test_a_model_is_pruned_in_python_as_the_readme_shows(finished: Workspace, tmp_path: Path) -> None:
    """In a folder of the user's own, with the tiny model, few windows and few steps."""
    _, snippet = blocks("python")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "model").symlink_to(finished.root / "data" / "model")
    (tmp_path / "texts.txt").write_text(
        "\n\n".join("The river runs past the mill and on to the sea. " * 40 for _ in range(40))
    )
    assert "sparsity=0.2" in snippet
    options = "options=TvaOptions(steps=2, curvature_windows=2)"
    snippet = snippet.replace("sparsity=0.2", f"sparsity=0.2, windows=4, {options}")
    path = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); from tvaprune.options.gates import TvaOptions\n"
    run_python(f"{path}{snippet}\nprint(small.num_parameters())", tmp_path, tmp_path)
    assert (tmp_path / "pruned" / "config.json").is_file()


def test_the_papers_preset_is_valid() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stages.check_params", "--params", "configs/paper.yaml", "--out", "/dev/null"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
