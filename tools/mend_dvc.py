"""Mend two files that a killed DVC may leave cut off: `.dvc/tmp/rwlock` and `dvc.lock`.

    python -m tools.mend_dvc && dvc repro

DVC writes both in place. After a kill at that moment, or on a full disk, it cannot read them, and every later command
ends with an error. `rwlock` lists running commands and matters only while they run: it is removed. Of `dvc.lock` the
stages before the cut are kept; `dvc repro` takes the others from its cache. DVC writes these files only under the locks
`rwlock.lock` and `lock` of the same directory, which this takes as well.
"""

import fcntl
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dvc.schema import COMPILED_LOCKFILE_SCHEMA
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from typer import echo
from voluptuous import Invalid

from stages._command import command

STAGE = re.compile(r"^  \S+:$", re.MULTILINE)  # in dvc.lock, the first line of a stage


def mend(root: Path) -> list[str]:
    """Mend the repository at `root`; returns what was done to which file, in words."""
    locks = root / ".dvc" / "tmp"
    if not locks.is_dir():
        return []
    listed = _mended(locks / "rwlock", locks / "rwlock.lock", _readable_list)
    locked = _mended(root / "dvc.lock", locks / "lock", _whole_stages)
    return [said for said in (listed, locked) if said]


def _mended(path: Path, guard: Path, readable: Callable[[str], str | None]) -> str:
    """Replace a file's text by what of it is readable; without any, remove the file."""
    with _held(guard):
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""
        if (right := readable(text)) == text:
            return ""
        if right is None:
            path.unlink()
            return f"{path.name} was cut off: removed"
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(right, encoding="utf-8")
        unfinished.replace(path)
        return f"{path.name} was cut off: {len(STAGE.findall(right))} stages kept"


@contextmanager
def _held(path: Path) -> Iterator[None]:
    with path.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _readable_list(text: str) -> str | None:
    try:
        json.loads(text)
    except ValueError:
        return None
    return text


def _whole_stages(text: str) -> str | None:
    """dvc.lock up to the last stage that DVC can read; a text that it cannot read loses one stage at a time."""
    yaml = YAML(typ="safe")
    for end in (len(text), *(match.start() for match in reversed(list(STAGE.finditer(text))))):
        try:
            COMPILED_LOCKFILE_SCHEMA(yaml.load(text[:end]))
        except (YAMLError, Invalid):
            continue
        return text[:end]
    return None


@command
def main() -> None:
    """Mend the repository in the current directory."""
    for done in mend(Path.cwd()):
        echo(done)
