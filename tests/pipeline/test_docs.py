"""The documentation: every block is run or says why not, and pages that are generated or quote the code are current."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline.documents import PAGES, blocks, commands, missing_lines, outputs, run_commands, run_python
from tests.pipeline.workspace import REPOSITORY, Workspace, environment
from tools.parameters_page import PAGE, page

DOCS = REPOSITORY / "docs"
# Pages whose commands a test below, or test_readme.py for the README, runs from top to bottom.
IN_CI, NIGHTLY = ("docs/experiments.md", "docs/sharing.md"), ("docs/own-model.md", "docs/paper-8b.md", "docs/start.md")
# In CI the cheapest stages stand for all, without the queue, which test_readme.py runs; nightly all runs as it is.
CHEAP = {
    "dvc exp run --queue -S 'sparsity=0.3,0.5'": "dvc exp list",
    "dvc queue start": "dvc exp list",
    "sparsity=0.6": "eval_zeroshot.limit=2",
}


def test_every_block_is_run_or_says_why_not() -> None:
    run = {"README.md", *IN_CI, *NIGHTLY}
    elsewhere = {line for name in run for line in commands(name)}
    for name in set(PAGES) - run:
        assert set(commands(name)) <= elsewhere, f"{name}: no test runs {set(commands(name)) - elsewhere}"
    snippets = {block.text for name in ("README.md", "docs/serving.md") for block in blocks(name, "python")}
    for name in PAGES:
        for block in blocks(name, "python"):
            assert block.reason or block.text in snippets, f"{name}: no test runs\n{block.text}"


def test_a_reason_stands_right_before_its_block() -> None:
    for name in PAGES:
        marked = [block for language in ("bash", "python") for block in blocks(name, language) if block.reason]
        assert (REPOSITORY / name).read_text().count("<!-- not run") == len(marked), name


def test_outputs_are_those_of_commands_that_a_test_runs() -> None:
    """The test of docs/experiments.md as it is compares them with what the commands print."""
    shown = {name: outputs(name) for name in PAGES if outputs(name)}
    assert set(shown) == {"docs/experiments.md"}
    assert set(shown["docs/experiments.md"]) <= set(commands("docs/experiments.md"))


def test_a_shown_line_that_was_not_printed_is_found() -> None:
    shown = "Path  Metric  HEAD\na.json  speedup  1.5\n"
    assert missing_lines(shown, "Path Metric HEAD\nb.json other 2\na.json speedup 0.9\n") == []
    assert missing_lines(shown, "Path Metric HEAD\na.json speed 0.9\n") == [["a.json", "speedup", "#"]]


def prepared(workspace: Workspace, tmp_path: Path) -> dict[str, str]:
    """The git and DVC remotes that the pages assume, and the replacements for their addresses."""
    origin = tmp_path / "origin.git"
    for command in (["init", "-q", "--bare", str(origin)], ["remote", "add", "origin", str(origin)]):
        subprocess.run(["git", *command], cwd=workspace.root, env=environment(), check=True)
    return {"/mnt/team/tvaprune": str(tmp_path / "remote"), "/shared/dvc-cache": str(tmp_path / "cache")}


@pytest.mark.nightly
def test_the_commands_of_experiments_run(workspace: Workspace, tmp_path: Path) -> None:
    changes = prepared(workspace, tmp_path)
    workspace.dvc("remote", "add", "-d", "team", str(tmp_path / "remote"))
    workspace.commit()
    printed = run_commands("docs/experiments.md", workspace, changes | CHEAP)
    assert "sixty" in printed["dvc exp list --all-commits origin"]
    drawn = (workspace.root / "dvc_plots" / "index.html").read_text()
    assert "vegaEmbed" in drawn
    assert not re.search(r"<(?:script|link)[^>]*(?:src|href)=", drawn)


@pytest.mark.warm
@pytest.mark.slow
def test_the_commands_of_sharing_run(workspace: Workspace, tmp_path: Path) -> None:
    run_commands("docs/sharing.md", workspace, prepared(workspace, tmp_path))
    assert any((tmp_path / "remote").rglob("*"))


@pytest.mark.nightly
@pytest.mark.parametrize("name", NIGHTLY)
def test_the_commands_of_other_pages_run(workspace: Workspace, name: str) -> None:
    run_commands(name, workspace, {})


@pytest.mark.nightly
@pytest.mark.timeout(2 * 3600)
def test_the_commands_of_experiments_run_as_they_are(workspace: Workspace, tmp_path: Path) -> None:
    workspace.dvc("remote", "add", "-d", "team", str(tmp_path / "remote"))
    workspace.commit()
    printed = run_commands("docs/experiments.md", workspace, prepared(workspace, tmp_path))
    for command, text in outputs("docs/experiments.md").items():
        assert missing_lines(text, printed[command]) == [], (command, printed[command])


@pytest.mark.slow
def test_the_python_of_serving_runs(finished: Workspace, tmp_path: Path) -> None:
    (snippet,) = (block for block in blocks("docs/serving.md", "python") if block.reason is None)
    path = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
    assert run_python(path + snippet.text, finished.root, tmp_path).strip()


def test_the_parameters_page_is_what_the_classes_say() -> None:
    assert (REPOSITORY / PAGE).read_text() == page(REPOSITORY / "params.yaml")


def test_troubleshooting_quotes_messages_that_the_code_has() -> None:
    folders = ("tvaprune", "stages")
    code = [ast.parse(path.read_text()) for name in folders for path in (REPOSITORY / name).rglob("*.py")]
    texts = {
        node.value
        for tree in code
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    quoted = re.findall(r"^## (.+)$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(quoted) > 10
    assert [text for text in quoted if not any(text in found for found in texts)] == []


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Unknown links, anchors and pages outside of the contents are warnings, and warnings are errors."""
    command = ["sphinx", "-b", "html", "--fail-on-warning", "--nitpicky", "--keep-going", "-q"]
    done = subprocess.run(
        [sys.executable, "-m", *command, "-d", str(tmp_path / "trees"), str(DOCS), str(tmp_path / "site")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "parameters.html").is_file()


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_of_pages_outside_of_the_site_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", (REPOSITORY / name).read_text()):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        file = REPOSITORY / (path or name)
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, (
                target
            )
