"""A small workspace in which every stage's inputs lie, and one stage run in it, in this process."""

import contextlib
import importlib
import io
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from stages._command import application
from tests.pipeline.tiny_inputs import write_inputs, write_small_params
from tests.tiny_models import random_masks, random_update, write_published
from tvaprune import commands
from tvaprune.architecture.topology import Topology
from tvaprune.artifacts import write_artifact
from tvaprune.checkpoint.config import load_config
from tvaprune.checkpoint.cut import compact
from tvaprune.errors import clear_errors
from tvaprune.masks.adapt import adapt
from tvaprune.masks.masks import write_masks
from tvaprune.masks.update import write_update
from tvaprune.params.loading import read_yaml
from tvaprune.proof.certificate import Reference, write_certificate

REPOSITORY = Path(__file__).resolve().parents[2]
# What is neither an input nor an output: the state to resume from.
_IGNORED = ".resume"


@dataclass(frozen=True)
class Said:
    """How a stage ended."""

    exit_code: int
    message: str  # what it wrote to stderr, without the progress of libraries


@dataclass(frozen=True)
class Case:
    """One wrong input."""

    what: str  # in words; unique
    module: str  # that reads it: stages.NAME, or `tvaprune VERB`
    spoil: Callable[[Path], object]  # makes it, in a copy of the workspace
    named: str  # what the message must name: the parameter or the file
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] | None = None
    leaves: tuple[str, ...] = ()  # outputs that the stage writes although it fails, by design


def build(root: Path) -> Path:
    """Inputs, parameters and the artifacts of every stage, of a random model of three layers."""
    root.mkdir(parents=True)
    write_inputs(root / "inputs")
    shutil.copyfile(REPOSITORY / "params.yaml", root / "params.yaml")
    write_small_params(root / "params.yaml")
    (root / "params.yaml").write_text(json.dumps(read_yaml(root / "params.yaml"), indent=1))  # which is YAML
    for stage in ("stages.fetch_inputs", "stages.sample_calibration"):
        done = run(root, stage)
        assert done.exit_code == 0, done.message
    model, artifacts = root / "data/model", root / "artifacts"
    topology = Topology.of(load_config(model))
    masks, update = random_masks(topology, seed=1), random_update(topology, seed=2)
    meta: dict[str, Any] = {"made_with": {}, "validation_ppl": {}}
    write_masks(artifacts / "masks", masks, **meta)
    adapted = adapt(topology, masks, 0.2, "nearest", 16, 16)
    write_masks(artifacts / "adapted", adapted, **meta)
    write_update(artifacts / "means", update, **meta)
    write_update(artifacts / "update", update, **meta)
    write_artifact(artifacts / "profile", "profile", {}, enabled=False)
    compact(model, adapted, update, artifacts / "compact")
    reference = Reference("masked dense model", torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, 320))
    write_certificate(artifacts / "compact", reference, [], 1e-4, trust_remote_code=True)
    write_published(root / "masks.pkl", masks, update)
    return root


def run(root: Path, module: str, *arguments: str, environment: dict[str, str] | None = None) -> Said:
    """Run a command line in `root`, as `python -m MODULE ARGUMENTS` does. Raises what it does not catch."""
    if verb := module.partition(" ")[2]:
        app, arguments = commands.app, (verb, *arguments)
    else:
        app = application(importlib.import_module(module).main)
    with contextlib.chdir(root), _variables(environment or {}):
        done = CliRunner().invoke(app, list(arguments))
    said, code = done.stderr, done.exit_code
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        # The verbs' own `main` is outside of the application, so it is done here.
        with contextlib.redirect_stderr(io.StringIO()) as stream, contextlib.suppress(SystemExit), clear_errors():
            raise done.exception
        said = said + stream.getvalue()
    lines = [line for line in said.replace("\r", "\n").splitlines() if line.strip()]
    start = next((number for number, line in enumerate(lines) if line.startswith("error: ")), 0)
    return Said(code, "\n".join(lines[start:]))


@contextlib.contextmanager
def _variables(variables: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def contents(root: Path) -> dict[str, bytes]:
    """Every file by name, without the state of killed runs."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    names = {path.relative_to(root).as_posix(): path for path in files}
    return {name: path.read_bytes() for name, path in names.items() if not name.startswith(_IGNORED)}


def set_param(root: Path, key: str, value: Any) -> None:
    """Set a parameter, or remove it where the value is `...`."""
    path = root / "params.yaml"
    content = place = json.loads(path.read_text())
    *sections, name = key.split(".")
    for section in sections:
        place = place[int(section) if section.isdigit() else section]
    if value is ...:
        del place[name]
    else:
        place[name] = value
    path.write_text(json.dumps(content))


def param(key: str, value: Any) -> Callable[[Path], None]:
    return lambda root: set_param(root, key, value)


def set_json(path: str, **changed: Any) -> Callable[[Path], None]:
    """Change keys of a JSON file, or remove them where the value is `...`."""

    def spoil(root: Path) -> None:
        content = json.loads((root / path).read_text()) | changed
        (root / path).write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    return spoil


def write(path: str, content: bytes | str) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def remove(*paths: str) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        for path in paths:
            shutil.rmtree(root / path) if (root / path).is_dir() else (root / path).unlink()

    return spoil


def cut_short(path: str, bytes_left: int) -> Callable[[Path], None]:
    return lambda root: (root / path).write_bytes((root / path).read_bytes()[:bytes_left])


def change_tensors(path: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Change the tensors of a safetensors file; its description beside it stays as it was."""

    def spoil(root: Path) -> None:
        tensors = load_file(root / path)
        change(tensors)
        save_file(tensors, root / path, metadata={"format": "pt"})

    return spoil


def header(path: str, tensors: dict[str, Any] | bytes, data: bytes = b"") -> Callable[[Path], None]:
    """Write a safetensors file with this header, true or not."""
    encoded = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    return write(path, struct.pack("<Q", len(encoded)) + encoded + data)


def both(*spoils: Callable[[Path], object]) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        for one in spoils:
            one(root)

    return spoil
