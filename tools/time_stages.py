"""Run every stage anew, one after the other, and note the seconds, the memory and the disk that they take.

    python -m tools.time_stages

The times include DVC's own for each stage. Run it on an otherwise idle machine. The packages of the set-up are counted
on disk, not in the times. The file is what the table `stages` of docs/results.md is made from.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from typer import Option, echo

from stages._command import command
from tools.measured_process import run_measured
from tools.saved_runs import Run, machine, outputs, producer
from tvaprune.artifacts import write_json
from tvaprune.measures import markdown
from tvaprune.params.loading import read_yaml

MEASURED = Path("docs/default_run.json")
PIPELINE = Path("dvc.yaml")
# What a run leaves in a clone, and the packages.
WRITTEN, PACKAGES = (Path("data"), Path("artifacts"), Path(".dvc/cache")), Path(sys.prefix)


def ordered(stages: dict[str, Any]) -> list[str]:
    """The stages, each after those whose outputs it reads."""
    producers = {path: name for name, stage in stages.items() for path in outputs(stage)}
    found: list[str] = []

    def add(name: str) -> None:
        if name not in found:
            for path in stages[name].get("deps", []):
                if source := producer(producers, path):
                    add(source)
            found.append(name)

    for name in stages:
        add(name)
    return found


def disk_bytes(paths: Iterable[Path]) -> int:
    """What files and directories take on the disk, a file with several names once; links are not followed."""
    seen: dict[tuple[int, int], int] = {}
    for path in paths:
        for file in path.rglob("*"):
            status = file.lstat()
            seen[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(seen.values())


def table(figures: dict[str, Any]) -> str:
    """The stages with their minutes and memory, and a line about the machine and the disk."""
    stages, on = figures["stages"], figures["machine"]
    rows = [[name, *_cells(each["seconds"], each["host_memory_bytes"])] for name, each in stages.items()]
    seconds = sum(each["seconds"] for each in stages.values())
    rows.append(["all", *_cells(seconds, max(each["host_memory_bytes"] for each in stages.values()))])
    disk = figures["disk_bytes"]
    note = (
        f"{on['processor']}, {on['threads']} threads, {on['dtype']}, torch {on['torch']}. Memory is the largest "
        f"resident set of a stage's process. On disk the packages take {disk['packages'] / 1e9:.1f} GB and what the "
        f"run leaves {disk['run'] / 1e9:.1f} GB."
    )
    return markdown.table(["stage", "minutes", "memory, GB"], rows) + "\n\n" + note


def _cells(seconds: float, memory: int) -> tuple[str, str]:
    return f"{seconds / 60:.1f}", f"{memory / 1e9:.1f}"


@command
def main(out: Annotated[Path, Option(help="File of the figures.")] = MEASURED) -> None:
    """Runs every stage of dvc.yaml anew, and writes docs/default_run.json."""
    figures = {**Run.of_workspace().code(), "machine": machine()}
    measured = {}
    for stage in ordered(read_yaml(PIPELINE)["stages"]):
        anew = [sys.executable, "-m", "dvc", "repro", "--single-item", "--force", stage]
        status, measured[stage] = run_measured(anew, Path.cwd())
        if status:
            raise RuntimeError(f"{stage} ended with status {status}; its messages are above")
    disk = {"packages": disk_bytes([PACKAGES]), "run": disk_bytes(WRITTEN)}
    figures |= {"stages": measured, "disk_bytes": disk}
    write_json(out, figures)
    echo(table(figures))
