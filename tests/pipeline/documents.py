"""The code blocks of the README and of docs/, and how tests run their commands on the tiny pipeline."""

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.pipeline.workspace import REPOSITORY, Workspace, environment
from tests.tiny_models import random_masks, random_update, write_published
from tvaprune.architecture.topology import Topology
from tvaprune.checkpoint.config import load_config

PAGES = ("README.md", *(f"docs/{path.name}" for path in sorted((REPOSITORY / "docs").glob("*.md"))))
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n)?^```(?P<language>bash|python)\n(?P<text>.*?)^```$", re.M | re.S
)
# "`COMMAND` prints" or "ends with", then what it printed in a real run, or lines of that.
OUTPUT = re.compile(r"`(?P<command>[^`\n]+)` (?:prints|ends with)[^`\n]*\n\n```text\n(?P<text>.*?)^```$", re.M | re.S)
# Words that differ from run to run: figures, hashes and the names that DVC invents.
OF_A_RUN = re.compile(r"-?\d.*|[0-9a-f]{7}|'[a-z]+-[a-z]+'|-+|\|-[-|]*")
# Set-up: `.ci/run` and the tests themselves come from it.
MAKE = re.compile(r"make ([a-z-]+)")
PUBLISHED = "tvaprune-mistral-mask.pkl"


@dataclass(frozen=True)
class Block:
    """One fenced block. A comment `<!-- not run: REASON -->` on the line before it keeps tests from running it."""

    language: str  # bash or python
    text: str
    reason: str | None  # why it is not run


def blocks(page: str, language: str) -> list[Block]:
    found = BLOCK.finditer((REPOSITORY / page).read_text())
    return [Block(each["language"], each["text"], each["reason"]) for each in found if each["language"] == language]


def commands(page: str) -> list[str]:
    """The lines of the bash blocks that are run, without comments."""
    text = "\n".join(block.text for block in blocks(page, "bash") if block.reason is None)
    lines = [line.split("  #")[0].split(" # ")[0].strip() for line in text.splitlines()]
    return [line for line in lines if line and line != "source .venv/bin/activate"]


def outputs(page: str) -> dict[str, str]:
    """What a page says that its commands print, by command."""
    return {each["command"]: each["text"] for each in OUTPUT.finditer((REPOSITORY / page).read_text())}


def missing_lines(shown: str, printed: str) -> list[list[str]]:
    """Lines that a page shows and a command did not print, but for what differs from run to run."""
    found = _words(printed)
    return [line for line in _words(shown) if line not in found]


def _words(printed: str) -> list[list[str]]:
    """The words of each line that has any, `#` in place of those that differ from run to run."""
    return [
        ["#" if OF_A_RUN.fullmatch(word) else word for word in line.split()]
        for line in printed.splitlines()
        if line.strip()
    ]


def run_commands(page: str, workspace: Workspace, changes: dict[str, str]) -> dict[str, str]:
    """Run a page's commands in their order; command -> what it printed. Each part in `changes` is replaced first."""
    printed = {}
    for line in commands(page):
        if MAKE.match(line):
            continue
        changed = line
        for part, smaller in changes.items():
            changed = changed.replace(part, smaller)
        program, *arguments = shlex.split(changed)
        if PUBLISHED in arguments:
            _write_published(workspace)
        if changed == "dvc queue start":
            workspace.run_queue()
            printed[line] = ""
        elif program == "dvc":
            printed[line] = workspace.dvc(*arguments).stdout
        else:
            assert program in ("python", "git"), f"no test knows how to run {line!r}"
            command = [sys.executable if program == "python" else program, *arguments]
            done = subprocess.run(command, cwd=workspace.root, env=environment(), capture_output=True, text=True)
            assert done.returncode == 0, f"{line}:\n{done.stdout}\n{done.stderr}"
            printed[line] = done.stdout
    return printed


def run_python(snippet: str, root: Path, home: Path) -> str:
    variables = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-P", "-c", snippet], cwd=root, env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _write_published(workspace: Workspace) -> None:
    topology = Topology.of(load_config(workspace.root / "data/model"))
    masks, update = random_masks(topology, seed=0), random_update(topology, seed=0)
    write_published(workspace.root / PUBLISHED, masks, update)
