"""docs/bad-inputs.md: what each case says."""

import shutil
import tempfile
from pathlib import Path

from tests.bad_inputs.cases import cases
from tests.bad_inputs.workspace import REPOSITORY, Case, Said, build, contents, run

PAGE = REPOSITORY / "docs" / "bad-inputs.md"
_LONGEST = 400  # characters of a message in the table

HEAD = """\
# Wrong input, and what the stages say

Each row is a test (`tests/unit/test_bad_inputs.py`): the stage runs with this input, ends with this exit code and this
message, shows no traceback, and leaves no output. `python -m tests.bad_inputs` writes this page.

| input | read by | message | exit code |
|---|---|---|---|
"""


def try_case(case: Case, base: Path, root: Path) -> Said:
    """Run a case in a copy of the workspace. Raises AssertionError where it left something."""
    shutil.copytree(base, root)
    case.spoil(root)
    before = contents(root)
    said = run(root, case.module, *case.arguments, environment=case.environment)
    after = contents(root)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed <= set(case.leaves), f"{case.what}: wrote {sorted(changed)}"
    return said


def run_all() -> list[tuple[Case, Said]]:
    with tempfile.TemporaryDirectory() as work:
        base = build(Path(work, "base"))
        return [(case, try_case(case, base, Path(work, str(number)))) for number, case in enumerate(cases())]


def table(found: list[tuple[Case, Said]]) -> str:
    return HEAD + "".join(row(case, said) for case, said in found)


def row(case: Case, said: Said) -> str:
    message = " ".join(said.message.removeprefix("error: ").split()).replace("|", "\\|")
    message = message if len(message) <= _LONGEST else message[:_LONGEST] + " ..."
    return f"| {case.what} | {case.module.rpartition('.')[2]} | {message} | {said.exit_code} |\n"
