"""The contract between stages: a directory with tensors.safetensors and meta.json.

Its hash decides what reruns, so it holds nothing that differs between equal runs: no times, hosts or absolute paths.
"""

import csv
import gzip
import json
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SCHEMA_VERSION = 1
_LONGEST_HEADER = 100_000_000  # bytes of a safetensors header, the library's own limit
SOURCE_FILE = "tvaprune_source.json"  # in a model's directory: where the dense model comes from


class ArtifactError(ValueError):
    """An artifact is absent, damaged, or of another kind than expected."""


class _Named(dict[str, Any]):
    """A part of an artifact; a key that it lacks is an ArtifactError, which names the file."""

    def __init__(self, content: dict[str, Any], path: Path) -> None:
        super().__init__(content)
        self._path = path

    def __missing__(self, key: str) -> Any:
        raise ArtifactError(f"{self._path}: has no {key!r}; remove {self._path.parent} and run dvc repro")


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
        meta = json.loads(meta_path.read_text(encoding="utf-8"))
        check_header(directory / "tensors.safetensors")
        with safe_open(directory / "tensors.safetensors", framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        absent = error.filename or directory / "tensors.safetensors"  # safetensors leaves the name out
        raise ArtifactError(f"{absent}: no such file; is {directory} a {kind} artifact?") from None
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise ArtifactError(f"{directory}: damaged {kind} artifact ({error}); remove it and run dvc repro") from error
    if not isinstance(meta, dict) or not isinstance(meta.get("tensors"), dict):
        raise ArtifactError(f"{meta_path}: does not describe tensors; remove {directory} and run dvc repro")
    if meta.get("kind") != kind or meta.get("schema") != SCHEMA_VERSION:
        raise ArtifactError(
            f"{meta_path}: expected kind {kind!r} schema {SCHEMA_VERSION}, "
            f"found {meta.get('kind')!r} schema {meta.get('schema')!r}"
        )
    for name, expected in meta["tensors"].items():
        if name not in tensors or _describe(tensors[name]) != expected:
            raise ArtifactError(f"{directory}: tensor {name!r} is absent or not {expected}")
    return _Named(tensors, directory / "tensors.safetensors"), _Named(meta, meta_path)


def check_header(path: Path) -> None:
    """Refuse a safetensors header that names a tensor twice, of which the library would take the last.

    The library itself refuses offsets beyond the file, overlaps, gaps, and shapes that do not fit the offsets, before
    it allocates anything. Raises SafetensorError.
    """
    with path.open("rb") as file:
        length, size = file.read(8), path.stat().st_size
        announced = struct.unpack("<Q", length)[0] if len(length) == 8 else size
        if announced > min(size - 8, _LONGEST_HEADER):
            raise SafetensorError(f"a header of {announced:,} bytes in a file of {size:,}")
        header = file.read(announced)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(names := dict(pairs)) < len(pairs):
            twice = next(name for name in names if sum(name == each for each, _ in pairs) > 1)
            raise SafetensorError(f"the header names {twice!r} twice")
        return names

    try:
        json.loads(header, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise SafetensorError(f"the header is not JSON: {error}") from error


def read_windows(directory: Path, vocabulary: int, *names: str) -> dict[str, Tensor]:
    """Sets of token windows of a calibration artifact, int32 [windows, tokens] each.

    Raises ArtifactError if the artifact is damaged, has no such set, or has tokens beyond the model's vocabulary.
    """
    tensors, _ = read_artifact(directory, "calibration")
    found = {name: tensors[name] for name in names}
    for name, ids in found.items():
        if ids.dim() != 2 or ids.dtype != torch.int32 or not ids.numel():
            raise ArtifactError(f"{directory}: {name} is {_describe(ids)}, not int32 [windows, tokens]")
        if not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise ArtifactError(
                f"{directory}: {name} has tokens from {int(ids.min())} to {int(ids.max())}, and the model a vocabulary "
                f"of {vocabulary}; the windows are of another tokenizer, run dvc repro sample_calibration"
            )
    return found


def _describe(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON that any reader accepts: NaN and infinity are refused. As `_whole_file`."""
    try:
        text = json.dumps(content, indent=2, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path}: a figure is not finite: {error}") from error
    with _whole_file(path) as unfinished:
        unfinished.write_text(text + "\n")


def write_csv(path: Path, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write CSV with a header; None is blank, which plots skip. As `_whole_file`."""
    with _whole_file(path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


@contextmanager
def _whole_file(path: Path) -> Iterator[Path]:
    """What to write in place of `path`, which replaces it at the end: a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    yield unfinished
    unfinished.replace(path)


def read_json_lines(path: Path) -> Iterator[Any]:
    """The values of a .jsonl or .jsonl.gz file, one a line; empty lines and a byte order mark are skipped.

    Raises ArtifactError with the line that is not JSON.
    """
    number = 0
    with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as lines:
        try:
            for line in lines:
                number += 1
                if text := line.decode("utf-8-sig" if number == 1 else "utf-8").strip():
                    yield json.loads(text)
        except json.JSONDecodeError as error:
            raise ArtifactError(f"{path}, line {number}: not valid JSON: {error}") from error
        except UnicodeDecodeError as error:
            raise ArtifactError(f"{path}, line {number}: not UTF-8 ({error.reason}); convert the file") from error
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ArtifactError(f"{path}, after line {number}: damaged gzip file: {error}") from error
