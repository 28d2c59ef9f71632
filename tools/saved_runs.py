"""A run's metrics with their provenance, in one file in git: metrics/results/NAME.json.

Only metrics of stages that are up to date are saved, so that a file that an earlier run left behind never gets into a
table. A stage is up to date if its entry in dvc.lock has the current code, parameters, inputs and metrics, and so has
every stage that it takes data from.
"""

import csv
import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML

from tvaprune.artifacts import write_json
from tvaprune.device import pick_device, pick_dtype
from tvaprune.measures.columns import value_at
from tvaprune.measures.machine import machine_name
from tvaprune.results import WORKSPACE

SAVED = Path("metrics/results")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
# What a run's figures depend on beside its parameters.
CODE = ("stages", "tvaprune", "dvc.yaml", "requirements.lock")


def check_name(name: str) -> None:
    """Raises ValueError unless the name can be a file's and is not that of the workspace's run."""
    if not NAME.fullmatch(name) or name == WORKSPACE:
        raise ValueError(f"{name!r}: a name has letters, digits, '_', '.' and '-', and is not {WORKSPACE!r}")


def saved_path(name: str) -> Path:
    return SAVED / f"{name}.json"


def read_saved(folder: Path) -> dict[str, dict[str, Any]]:
    """All saved runs by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def git(*arguments: str) -> str:
    """The output of a git command. Raises ValueError with git's message if it fails."""
    done = subprocess.run(["git", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def experiment_refs() -> list[str]:
    """Where `dvc exp` keeps runs: refs/exps/<the commit it started from, after two digits a slash>/NAME."""
    return [ref for ref in git("for-each-ref", "--format=%(refname)", "refs/exps").split() if ref.count("/") == 4]


@dataclass(frozen=True)
class Run:
    """The files of a run, and the commit that it was made from.

    Attributes:
        read: a path's content, or None where there is no such file.
        commit: 40 digits.
        dirty: whether the code differed from that commit.
        experiment: whether it is of `dvc exp`, which may have run on another machine.
    """

    read: Callable[[str], bytes | None]
    commit: str
    dirty: bool
    experiment: bool = False

    @classmethod
    def of_workspace(cls) -> "Run":
        def read(path: str) -> bytes | None:
            return Path(path).read_bytes() if Path(path).is_file() else None

        return cls(read, git("rev-parse", "HEAD").strip(), bool(git("status", "--porcelain", "--", *CODE)))

    @classmethod
    def of_experiment(cls, name: str) -> "Run":
        """The run that `dvc exp` keeps under a name, which has to be one experiment's."""
        found = [ref for ref in experiment_refs() if ref.rpartition("/")[2] == name]
        if len(found) != 1:
            raise ValueError(f"{name}: {len(found)} experiments have this name; `dvc exp show` lists them")
        return cls.of_ref(found[0])

    @classmethod
    def of_ref(cls, ref: str) -> "Run":
        """The run of an experiment's ref."""
        commit = "".join(ref.split("/")[2:4])
        files = set(git("ls-tree", "-r", "--name-only", ref).splitlines())

        def read(path: str) -> bytes | None:
            command = ["git", "show", f"{ref}:{path}"]
            return subprocess.run(command, capture_output=True, check=True).stdout if path in files else None

        return cls(read, commit, bool(git("diff", "--name-only", commit, ref, "--", *CODE)), experiment=True)

    def code(self) -> dict[str, Any]:
        """The commit, as a file of figures names it, and whether the code differed from it."""
        return {"commit": self.commit, **({"dirty": True} if self.dirty else {})}

    def yaml(self, path: str) -> dict[str, Any]:
        content = self.read(path)
        if content is None:
            raise FileNotFoundError(f"{path}: no such file; run `dvc repro` first")
        return YAML(typ="safe", pure=True).load(content)


class Pipeline:
    """The stages of a run, and which of them are up to date."""

    def __init__(self, run: Run) -> None:
        self.run, self.params = run, run.yaml("params.yaml")
        self.stages, self.locked = run.yaml("dvc.yaml")["stages"], run.yaml("dvc.lock")["stages"]
        self.producers = {out: stage for stage, entry in self.stages.items() for out in outputs(entry)}
        self._reasons: dict[str, str | None] = {}

    def metrics(self) -> Iterator[tuple[str, str]]:
        """Each metrics file with the stage that writes it."""
        for stage, entry in self.stages.items():
            for path in map(_path, entry.get("metrics", [])):
                yield path, stage

    def stale(self, stage: str) -> str | None:
        """Why a stage is not up to date; None if it is."""
        if stage not in self._reasons:
            self._reasons[stage] = next(self._differences(stage), None)
        return self._reasons[stage]

    def sources(self, stage: str) -> set[str]:
        """The stages that it takes data from, directly. Checks that let it start (.ok) give it no data."""
        paths = [path for path in self.stages[stage].get("deps", []) if not path.endswith(".ok")]
        return {producer for path in paths if (producer := self._producer(path))}

    def ancestors(self, stage: str) -> set[str]:
        """The stage and all that it takes data from."""
        return {stage}.union(*map(self.ancestors, self.sources(stage)))

    def declared(self, stage: str) -> list[str]:
        """The keys of params.yaml that the stage reads, with `${key}` replaced by the key's value."""
        keys = self.stages[stage].get("params", [])
        return [re.sub(r"\$\{([\w.]+)\}", lambda key: str(value_at(self.params, key[1])), each) for each in keys]

    def _producer(self, path: str) -> str | None:
        return producer(self.producers, path)

    def _differences(self, stage: str) -> Iterator[str]:
        entry, locked = self.stages[stage], self.locked.get(stage)
        if locked is None:
            yield f"{stage} has not run"
            return
        seen = locked.get("params", {}).get("params.yaml", {})
        if locked["cmd"] != entry["cmd"] or seen != {key: value_at(self.params, key) for key in self.declared(stage)}:
            yield f"{stage} ran with other parameters"
        hashes = {dep["path"]: dep["md5"] for dep in locked.get("deps", [])}
        for path in entry.get("deps", []):
            if path.endswith(".ok"):
                continue
            producer = self._producer(path)
            if producer and (reason := self.stale(producer)):
                yield reason
            elif producer and path in self.producers:
                if hashes.get(path) != self._made(producer).get(path):
                    yield f"{stage} ran with another {path}"
            elif not producer and hashes.get(path) != _md5(self.run.read(path)):
                yield f"{stage} ran with another {path}"
        for path in map(_path, entry.get("metrics", [])):
            if self._made(stage).get(path) != _md5(self.run.read(path)):
                yield f"{path} is not what {stage} wrote"

    def _made(self, stage: str) -> dict[str, str]:
        return {out["path"]: out["md5"] for out in self.locked[stage].get("outs", [])}


def record(name: str, run: Run, measured: Iterable[str] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """What is saved of a run, and why metrics were left out, by their file.

    Raises:
        ValueError: no metrics are left, or those of a stage in `measured` would be left out.
    """
    pipeline = Pipeline(run)
    metrics, stages, left_out = {}, set(), {}
    for path, stage in pipeline.metrics():
        if reason := pipeline.stale(stage):
            left_out[path] = reason
        else:
            metrics[Path(path).stem] = json.loads(run.read(path) or b"null")
            stages |= pipeline.ancestors(stage)
    if lacking := [reason for stage in measured if (reason := pipeline.stale(stage))]:
        raise ValueError(f"{name}: {', '.join(lacking)}")
    if not metrics:
        raise ValueError(f"{name}: no stage that measures is up to date: {', '.join(sorted(set(left_out.values())))}")
    keys = {key for stage in stages for key in pipeline.declared(stage)}
    params = _without_places(_selected(pipeline.params, keys - {"seed"}))
    content = {"name": name, **run.code()}
    content["machine"] = machine() | (_benchmarked_on(run, metrics.get("speed")) if run.experiment else {})
    return content | {"seed": pipeline.params["seed"], "params": params, "metrics": metrics}, left_out


def save(name: str, run: Run, measured: Iterable[str] = ()) -> tuple[Path, dict[str, str]]:
    """Write metrics/results/NAME.json; the path, and why metrics were left out, by their file. Raises as `record`."""
    check_name(name)
    content, left_out = record(name, run, measured)
    write_json(saved_path(name), content)
    return saved_path(name), left_out


def machine() -> dict[str, Any]:
    """What this process, and so a stage that starts with its environment, computes on."""
    device = pick_device()
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "processor": machine_name(device),
        "device": device.type,
        "logical_cores": allowed,
        "threads": torch.get_num_threads(),
        "dtype": str(pick_dtype(device)).removeprefix("torch."),
        "torch": version("torch").split("+")[0],
        "transformers": version("transformers"),
        "python": platform.python_version(),
    }


def _benchmarked_on(run: Run, speed: dict[str, Any] | None) -> dict[str, Any]:
    """What the files of an up-to-date benchmark say of its machine; nothing without them."""
    rounds = run.read("metrics/speed.csv")
    if speed is None or rounds is None:
        return {}
    row = next(csv.DictReader(rounds.decode().splitlines()), {})
    found = {"processor": row.get("machine"), "threads": speed.get("threads"), "dtype": row.get("dtype")}
    return {key: value for key, value in found.items() if value is not None}


def _selected(params: dict[str, Any], keys: set[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in sorted(keys):  # a section before its own keys
        *sections, name = key.split(".")
        place = found
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value_at(params, key)
    return found


def _without_places(value: Any) -> Any:
    """Absolute paths become their last part."""
    if isinstance(value, dict):
        return {name: _without_places(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_without_places(each) for each in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def producer(producers: dict[str, str], path: str) -> str | None:
    """The stage that writes a path or a directory above it, of the stages by their outputs."""
    return next((producers[str(each)] for each in (path, *Path(path).parents) if str(each) in producers), None)


def outputs(entry: dict[str, Any]) -> list[str]:
    """The paths that a stage of dvc.yaml writes."""
    return [_path(out) for kind in ("outs", "metrics", "plots") for out in entry.get(kind, [])]


def _path(out: Any) -> str:
    return next(iter(out)) if isinstance(out, dict) else out


def _md5(content: bytes | None) -> str | None:
    return None if content is None else hashlib.md5(content).hexdigest()
