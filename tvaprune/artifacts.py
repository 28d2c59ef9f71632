"""The contract between stages: a directory with tensors.safetensors and meta.json.

Its hash decides what reruns, so it holds nothing that differs between equal runs: no times, hosts or absolute paths.
"""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SCHEMA_VERSION = 1
SOURCE_FILE = "tvaprune_source.json"  # in a model's directory: where the dense model comes from


class ArtifactError(ValueError):
    """An artifact is absent, damaged, or of another kind than expected."""


def write_artifact(directory: Path, kind: str, tensors: dict[str, Tensor], **meta: Any) -> None:
    """Write tensors and their description; `meta`, JSON values, must be the same for the same inputs."""
    directory.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    save_file(stored, directory / "tensors.safetensors")
    contents = {name: _describe(tensor) for name, tensor in stored.items()}
    write_json(directory / "meta.json", {"schema": SCHEMA_VERSION, "kind": kind, **meta, "tensors": contents})


def read_artifact(directory: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_artifact` wrote. Raises ArtifactError, which names the file, if it is not as described."""
    meta_path = directory / "meta.json"
    try:
        meta = json.loads(meta_path.read_text())
        with safe_open(directory / "tensors.safetensors", framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        absent = error.filename or directory / "tensors.safetensors"  # safetensors leaves the name out
        raise ArtifactError(f"{absent}: no such file; is {directory} a {kind} artifact?") from None
    except (json.JSONDecodeError, SafetensorError) as error:
        raise ArtifactError(f"{directory}: damaged {kind} artifact ({error}); remove it and run dvc repro") from error
    if meta.get("kind") != kind or meta.get("schema") != SCHEMA_VERSION:
        raise ArtifactError(
            f"{meta_path}: expected kind {kind!r} schema {SCHEMA_VERSION}, "
            f"found {meta.get('kind')!r} schema {meta.get('schema')!r}"
        )
    for name, expected in meta["tensors"].items():
        if name not in tensors or _describe(tensors[name]) != expected:
            raise ArtifactError(f"{directory}: tensor {name!r} is absent or not {expected}")
    return tensors, meta


def _describe(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON that any reader accepts: NaN and infinity are refused. A kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    unfinished.replace(path)


def read_json_lines(path: Path) -> Iterator[Any]:
    """The values of a .jsonl or .jsonl.gz file, one a line. Raises ArtifactError with the line that is not JSON."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ArtifactError(f"{path}, line {number}: not valid JSON: {error}") from error
