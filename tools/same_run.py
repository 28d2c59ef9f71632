"""Compare two runs: hashes of data/ and artifacts/ in dvc.lock, and metrics but for time, memory and speed.

python -m tools.same_run A B, two directories with dvc.lock and metrics/.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from ruamel.yaml import YAML
from typer import Argument, Exit, echo

from stages._command import command

# What differs between equal runs: measurements of the machine, and what no stage writes (serving.json).
MEASURED_FILES = {"speed.json", "profile.json", "serving.json"}
MEASURED_OUTPUTS = {"artifacts/profile", "artifacts/report"}
MEASURED_KEY = re.compile(r"(^|_)(seconds|ms|memory_bytes|load_s|threads)$|_per_s$|_per_minute$")


def differences(one: Path, other: Path) -> list[str]:
    """What differs, a line each. Raises FileNotFoundError where a directory holds no dvc.lock."""
    left, right = ({**_hashes(root), **_metrics(root)} for root in (one, other))
    absent = object()
    return [
        f"{name}: {left.get(name, 'absent')} and {right.get(name, 'absent')}"
        for name in sorted(left.keys() | right.keys())
        if left.get(name, absent) != right.get(name, absent)
    ]


def _hashes(root: Path) -> dict[str, Any]:
    stages = YAML(typ="safe", pure=True).load(root / "dvc.lock")["stages"]
    outs = [out for stage in stages.values() for out in stage.get("outs", [])]
    return {
        out["path"]: out["md5"]
        for out in outs
        if out["path"].startswith(("data/", "artifacts/")) and out["path"] not in MEASURED_OUTPUTS
    }


def _metrics(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted((root / "metrics").glob("*.json")):
        if path.name not in MEASURED_FILES:
            found.update(_leaves(json.loads(path.read_text()), f"metrics/{path.name}"))
    return found


def _leaves(content: Any, name: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(content, dict):
        yield name, content
        return
    for key, value in content.items():
        if not MEASURED_KEY.search(key):
            yield from _leaves(value, f"{name}:{key}" if name.endswith(".json") else f"{name}.{key}")


@command
def main(
    one: Annotated[Path, Argument(help="Directory with dvc.lock and metrics/.")],
    other: Annotated[Path, Argument(help="Another.")],
) -> None:
    """Say what differs between two runs; exit status 1 where anything does."""
    found = differences(one, other)
    for line in found:
        echo(line)
    echo(f"{len(found)} differences, {len(_hashes(one))} hashes and {len(_metrics(one))} figures compared")
    raise Exit(bool(found))
