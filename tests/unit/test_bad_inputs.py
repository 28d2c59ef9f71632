"""Every wrong input is refused in one line that names it, and docs/bad-inputs.md says what the stages say."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bad_inputs.cases import cases
from tests.bad_inputs.table import HEAD, PAGE, row, try_case
from tests.bad_inputs.workspace import REPOSITORY, Case, build, run

CASES = {case.what: case for case in cases()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("inputs") / "base")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_wrong_input_is_refused_and_named(case: Case, base: Path, tmp_path: Path) -> None:
    said = try_case(case, base, tmp_path / "work")
    assert said.exit_code == 1
    assert said.message.startswith("error: ")
    assert case.named in said.message
    assert "\n" not in said.message
    assert "secret" not in said.message
    assert row(case, said) in PAGE.read_text(), "run python -m tests.bad_inputs"


def test_the_page_has_these_cases_alone() -> None:
    page = PAGE.read_text()
    assert page.startswith(HEAD)
    assert [line.split(" | ")[0].removeprefix("| ") for line in page.removeprefix(HEAD).splitlines()] == list(CASES)
    assert len(CASES) == len(cases()) >= 60


def test_the_workspace_itself_is_right(base: Path) -> None:
    """Else the cases could be refused for another reason."""
    for module in ("stages.check_params", "stages.check_model", "stages.update_weights", "stages.adapt_dimensions"):
        assert run(base, module).exit_code == 0


@pytest.mark.parametrize("what", ["sparsity is NaN", "a pickle that runs a command"])
def test_a_process_of_its_own_says_the_same(what: str, base: Path, tmp_path: Path) -> None:
    case = CASES[what]
    said = try_case(case, base, tmp_path / "work")
    command = [sys.executable, "-m", *case.module.split(), *case.arguments]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=tmp_path / "work", env=environment, capture_output=True, text=True)
    assert done.returncode == said.exit_code
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == said.message
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "work" / "ran").exists()


def test_what_was_learned_stays_where_it_cannot_be_written(base: Path, tmp_path: Path) -> None:
    """A full disk after the last step, say: the next run goes on from the last saved state."""
    work = tmp_path / "work"
    shutil.copytree(base, work)
    (work / "in_the_way").write_text("")
    said = run(work, "stages.learn_masks", "--masks", "in_the_way")
    assert said.exit_code == 1
    assert "in_the_way" in said.message
    assert len(list(work.rglob("state.pt"))) == 1
    assert run(work, "stages.learn_masks").exit_code == 0
    assert not list(work.rglob("state.pt"))
