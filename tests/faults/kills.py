"""Kill stages at random moments, run `dvc repro` again, and compare with an undisturbed run.

    python -m tests.faults.kills DIRECTORY --kills 200

Each kill adds a line to DIRECTORY/kills.jsonl, so that an interrupted run goes on; docs/faults.md is written from it.
"""

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import typer
from ruamel.yaml import YAML

from tests.faults.warm import Warm, warm_programs
from tests.pipeline.tiny_inputs import write_inputs, write_small_params
from tests.pipeline.workspace import REPOSITORY, Workspace
from tools.mend_dvc import mend

Target = Literal["stage", "dvc", "group"]
TARGETS: tuple[Target, ...] = ("stage", "dvc", "group")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
STAGES = tuple(YAML(typ="safe").load(REPOSITORY / "dvc.yaml")["stages"])
REPORT = REPOSITORY / "docs" / "faults.md"
PATIENCE_S = 3600  # on a busy machine the first run takes longer than a test may


@dataclass(frozen=True)
class Kill:
    """One kill, and what the next `dvc repro` made of it.

    Attributes:
        moment: when it was sent, as a share of the undisturbed run's time.
        came: False where the run ended as if there had been no signal.
        different: files of data/ and artifacts/ that differ from the undisturbed run's afterwards.
        mended: what `tools.mend_dvc` did to a dvc.lock or rwlock of DVC's own that was cut off.
    """

    stage: str
    signal: str
    target: Target
    moment: float
    came: bool
    different: list[str]
    mended: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Undisturbed:
    """A finished workspace and what it holds."""

    workspace: Workspace
    contents: dict[str, str]


def contents(workspace: Workspace) -> dict[str, str]:
    """SHA-256 of each file in data/ and artifacts/, by name."""
    found = {}
    for folder in ("data", "artifacts"):
        for path in sorted((workspace.root / folder).rglob("*")):
            if path.is_file() and "report" not in path.parts:  # which holds timings
                found[str(path.relative_to(workspace.root))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def different(workspace: Workspace, undisturbed: Undisturbed) -> list[str]:
    """What is not as in the undisturbed run: files, hashes in dvc.lock, metrics that are no JSON."""
    found, expected = contents(workspace), undisturbed.contents
    names = {name for name in found | expected if found.get(name) != expected.get(name)}
    locked, right = workspace.hashes(), undisturbed.workspace.hashes()
    timed = {"metrics/speed.csv", "metrics/profile.csv"}
    names |= {f"dvc.lock: {name}" for name in (locked | right).keys() - timed if locked.get(name) != right.get(name)}
    for path in sorted((undisturbed.workspace.root / "metrics").glob("*.json")):
        try:
            json.loads((workspace.root / "metrics" / path.name).read_text())
        except (OSError, ValueError):
            names.add(f"metrics/{path.name}")
    return sorted(names)


def prepare(root: Path, variables: dict[str, str] | None = None) -> Workspace:
    """The pipeline run once on tiny inputs."""
    workspace = Workspace.create(root)
    write_inputs(root / "inputs")
    write_small_params(root / "params.yaml")
    workspace.commit()
    replace(workspace, variables=variables or {}, timeout_s=PATIENCE_S).repro()
    workspace.commit()
    return workspace


def forget(workspace: Workspace, stage: str) -> None:
    """As if the stage had never run: also without its objects in the cache."""
    locked = YAML(typ="safe").load(workspace.root / "dvc.lock")["stages"]
    objects = {
        name: {o for out in entry["outs"] for o in _objects(workspace.root, out)} for name, entry in locked.items()
    }
    others = set().union(*(found for name, found in objects.items() if name != stage))
    workspace.forget(stage)
    for path in objects[stage] - others:
        path.unlink(missing_ok=True)


def _objects(root: Path, out: dict[str, str]) -> Iterator[Path]:
    """The files of DVC's cache that hold an output."""
    hashed = [out["md5"]]
    listing = root / ".dvc/cache/files/md5" / hashed[0][:2] / hashed[0][2:]
    if hashed[0].endswith(".dir") and listing.is_file():
        hashed += [entry["md5"] for entry in json.loads(listing.read_text())]
    for one in hashed:
        yield root / ".dvc/cache/files/md5" / one[:2] / one[2:]


class Killer:
    """Kills in one workspace, which is made anew where a kill left something different."""

    def __init__(self, undisturbed: Undisturbed, warm: Warm, root: Path) -> None:
        self.undisturbed, self.warm, self.root = undisturbed, warm, root
        self._seconds: dict[tuple[str, bool], float] = {}
        self.workspace = self._fresh()

    def _fresh(self) -> Workspace:
        shutil.rmtree(self.root, ignore_errors=True)
        return replace(
            self.undisturbed.workspace.copy(self.root), variables=self.warm.variables(), timeout_s=PATIENCE_S
        )

    def kill(self, stage: str, number: signal.Signals, target: Target, moment: float) -> Kill:
        """Start the stage through DVC, send the signal at this share of its time, and repair by `dvc repro`."""
        seconds = self._time(stage, of_stage=target == "stage")
        forget(self.workspace, stage)
        with self._started(stage) as dvc:
            victim = self._process_id(stage if target == "stage" else "dvc", dvc)
            time.sleep(moment * seconds)
            running = dvc.poll() is None
            with suppress(ProcessLookupError):
                if target == "group":
                    os.killpg(dvc.pid, number)
                else:
                    os.kill(victim, number)
            came = dvc.wait(PATIENCE_S) != 0 and running
            self._wait_for_end("dvc")  # of which a signal to the group ends the client first
            mended = self._repair()
            self._wait_for_end(stage)
        found = different(self.workspace, self.undisturbed)
        if found:
            self.workspace = self._fresh()
        return Kill(stage, number.name, target, round(moment, 3), came, found, mended)

    def _time(self, stage: str, of_stage: bool) -> float:
        """Seconds that the stage, or DVC with the stage, takes undisturbed."""
        if (stage, of_stage) not in self._seconds:
            forget(self.workspace, stage)
            with self._started(stage) as dvc:
                started = time.monotonic()
                own = self._process_id(stage, dvc)
                own_start = time.monotonic()
                while _alive(own):
                    time.sleep(0.002)
                self._seconds[stage, True] = time.monotonic() - own_start
                assert dvc.wait(PATIENCE_S) == 0, (self.root / "started.log").read_text()
                self._seconds[stage, False] = time.monotonic() - started
        return self._seconds[stage, of_stage]

    def _process_id(self, name: str, dvc: subprocess.Popen[bytes]) -> int:
        while (found := self.warm.process_id(name)) is None:
            assert dvc.poll() is None, (self.root / "started.log").read_text()
            time.sleep(0.001)
        return found

    def _repair(self) -> list[str]:
        """What `make repro` runs, again while it is refused because the killed DVC's stage still runs.

        Returns what had to be mended of DVC's own files.
        """
        mended: list[str] = []
        for _ in range(200):
            mended += mend(self.workspace.root)
            done = self.workspace.dvc("repro", check=False)
            if done.returncode == 0:
                return mended
            if "another process is already making this output" not in done.stderr:
                break
            time.sleep(0.2)
        raise AssertionError(done.stdout + done.stderr)

    def _wait_for_end(self, name: str) -> None:
        if (left := self.warm.process_id(name)) is not None:
            while _alive(left):
                time.sleep(0.01)

    @contextmanager
    def _started(self, stage: str) -> Iterator[subprocess.Popen[bytes]]:
        for name in ("dvc", stage):
            self.warm.forget(name)
        with self.workspace.started(stage) as dvc:
            yield dvc


def _alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


def cases(seed: int) -> Iterator[tuple[str, signal.Signals, Target, float]]:
    """Every stage with every signal and target, in a random order, again and again, each at a random moment."""
    chance = random.Random(seed)
    every = list(itertools.product(STAGES, SIGNALS, TARGETS))
    while True:
        chance.shuffle(every)
        for case in every:
            yield *case, chance.random()


def read_kills(directory: Path) -> list[Kill]:
    path = directory / "kills.jsonl"
    return [Kill(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def run(directory: Path, kills: int, seed: int = 0) -> list[Kill]:
    """Kill until `kills` signals came in time, those of an interrupted run in the same directory included."""
    os.environ.setdefault("TVAPRUNE_TEST_SCRATCH", str(directory / "scratch"))
    root, making = directory / "finished", directory / "making"
    if not root.exists():
        shutil.rmtree(making, ignore_errors=True)
        prepare(making, {"PYTHONHASHSEED": "0"})
        command = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
        (directory / "commit").write_text(commit)
        making.rename(root)
    workspace = Workspace(root)
    undisturbed = Undisturbed(workspace, contents(workspace))
    done = read_kills(directory)
    with warm_programs(directory / "warm") as warm, (directory / "kills.jsonl").open("a") as log:
        killer = Killer(undisturbed, warm, directory / "killed")
        for case in itertools.islice(cases(seed), len(done), None):
            if sum(kill.came for kill in done) >= kills:
                break
            done.append(killer.kill(*case))
            log.write(json.dumps(asdict(done[-1])) + "\n")
            log.flush()
    return done


def report(done: list[Kill], commit: str) -> str:
    """docs/faults.md: kills by stage and signal, and how many left something different."""
    came = [kill for kill in done if kill.came]
    rows = []
    for stage in (*STAGES, "all"):
        own = [kill for kill in came if stage in (kill.stage, "all")]
        counts = [sum(kill.signal == one.name for kill in own) for one in SIGNALS]
        counts += [sum(kill.target == one for kill in own) for one in TARGETS]
        counts += [len(own), sum(bool(kill.mended) for kill in own), sum(bool(kill.different) for kill in own)]
        rows.append([stage, *map(str, counts)])
    columns = ["stage", *(one.name for one in SIGNALS), *TARGETS, "kills", "mended", "different"]
    lines = ["| " + " | ".join(row) + " |" for row in [columns, ["---", *["--:"] * (len(columns) - 1)], *rows]]
    return HEADING.format(commit=commit) + "\n".join(lines) + "\n"


HEADING = """# Faults

Written by `python -m tests.faults.kills DIRECTORY --kills N --write`: the pipeline on a tiny model, with a signal at a
random moment of each stage, sent to the stage, to DVC, or to their process group. After each, `dvc repro` runs until
nothing is left to do. `different` counts the kills after which a file in data/ or artifacts/, or a hash in dvc.lock,
was not that of the undisturbed run. `mended` counts those that cut off DVC's own dvc.lock or
.dvc/tmp/rwlock, which `make repro` then mends (tools/mend_dvc.py). Signals that came after the end of a run are not
counted. Processes are forked from one that has imported the libraries (tests/faults/warm.py), except those of the
undisturbed run, which is of commit {commit}. A series that is interrupted continues at a later commit.

"""


def main(
    directory: Annotated[Path, typer.Argument(help="Workspaces and kills.jsonl; an interrupted run goes on here.")],
    kills: Annotated[int, typer.Option(help="How many signals are to come in time.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the order and the moments.")] = 0,
    write: Annotated[bool, typer.Option("--write", help="Write docs/faults.md.")] = False,
) -> None:
    """Kill stages at random moments; exit status 1 where something was different afterwards."""
    done = run(directory, kills, seed)
    written = report(done, (directory / "commit").read_text().strip())
    if write:
        REPORT.write_text(written)
    typer.echo(written)
    raise typer.Exit(any(kill.different for kill in done))


if __name__ == "__main__":
    typer.run(main)
