"""Every command of the README runs, in its order, on the tiny pipeline."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline.documents import MAKE, blocks, commands, run_commands, run_python
from tests.pipeline.workspace import REPOSITORY, Workspace

README = "README.md"
# What the tiny model and the tiny tasks have no room for, and what would take long.
SMALLER = {
    "adapt_dimensions.multiple=64": "adapt_dimensions.multiple=8",
    "eval_zeroshot.limit=500": "eval_zeroshot.limit=2",
    "learn_masks.method=tva,flap,wanda_sp": "learn_masks.method=flap",
    "sparsity=0.2,0.5": "sparsity=0.3",
    " -S compact.gguf=q8_0": "",  # llama.cpp does not know the tiny model's tokenizer
}


def test_make_has_the_targets_the_readme_names() -> None:
    named = {match[1] for line in commands(README) if (match := MAKE.match(line))}
    assert {"repro", "test"} <= named
    for target in named:
        subprocess.run(["make", "-n", target], cwd=REPOSITORY, check=True, capture_output=True)


@pytest.mark.warm
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_command_runs(workspace: Workspace, tmp_path: Path) -> None:
    assert any("exp run" in line for line in commands(README))
    run_commands(README, workspace, {**SMALLER, "s3://bucket/tvaprune": str(tmp_path / "remote")})
    assert any((tmp_path / "remote").rglob("*"))


def test_the_pruned_model_is_used_as_the_readme_shows(finished: Workspace, tmp_path: Path) -> None:
    three_lines, _ = blocks(README, "python")
    assert run_python(three_lines.text, finished.root, tmp_path).strip()


def test_a_model_is_pruned_in_python_as_the_readme_shows(finished: Workspace, tmp_path: Path) -> None:
    """In a folder of the user's own, with the tiny model, few windows and few steps."""
    snippet = blocks(README, "python")[1].text
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
