"""The parity certificate: a model directory's proof that it computes what the masked model computes.

`parity.json` holds what was compared, the prompts, the versions, the differences, and the SHA-256 of every other file.
`parity.tensors` holds the prompts and the reference's logits at their last positions, so that anyone can repeat
the proof without the dense model: `python -m tvaprune verify DIR`.
"""

import hashlib
import json
import platform
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import tvaprune
from tvaprune.artifacts import write_json
from tvaprune.progress import SHOWN_AFTER_S, Progress

# The reference is a safetensors file by another name, because loaders take *.safetensors for weights.
CERTIFICATE, REFERENCE, GGUF = "parity.json", "parity.tensors", "model.gguf"
SCHEMA = 2
STORED_POSITIONS = 4  # a vocabulary of 128 thousand in float32 is half a megabyte a position
PROMPTS = {
    "city": "The history of the city begins with a small settlement by the river, where traders met in the spring.",
    "water": "Water boils at a lower temperature on a mountain because the pressure of the air is lower there.",
    "code": "def area(radius):\n    return 3.14159 * radius ** 2\n\n# The area of a circle grows with the square of",
}


class DamagedDirectoryError(ValueError):
    """A directory is not as its certificate says."""


@dataclass(frozen=True)
class Reference:
    """What a directory is compared with."""

    name: str  # of the model that computed the logits
    input_ids: Tensor  # int64 [prompts, tokens]
    logits: Tensor  # float32 [prompts, positions, vocab], at the prompts' last positions


@dataclass(frozen=True)
class Check:
    """One comparison."""

    name: str  # in words
    passed: bool | None  # the figures are within their bounds; None = not run
    figures: dict[str, Any]  # what was measured; or `skipped`, why not
    bounds: dict[str, float]  # of the figures that decide: upper bounds of differences, lower bounds of agreements

    def __str__(self) -> str:
        if self.passed is None:
            return f"{self.name}: not run, {self.figures['skipped']}"
        bounds = {name: f" of {bound:g}" for name, bound in self.bounds.items()}
        figures = ", ".join(f"{name} {value:.12g}{bounds.get(name, '')}" for name, value in self.figures.items())
        return f"{self.name}: {'passed' if self.passed else 'FAILED'} ({figures})"


def prompt_ids(tokenizer: Any, tokens: int) -> Tensor:
    """PROMPTS, repeated and cut to at most `tokens` tokens each: int64 [prompts, tokens]."""
    rows = [tokenizer(text * 8, add_special_tokens=False)["input_ids"] for text in PROMPTS.values()]
    shortest = min(tokens, *map(len, rows))
    return torch.tensor([row[:shortest] for row in rows])


def write_certificate(
    directory: Path, reference: Reference, checks: list[Check], bound: float, *, trust_remote_code: bool
) -> None:
    """Write parity.tensors, then parity.json, which must be the last file that is written."""
    stored = {"input_ids": reference.input_ids, "logits": reference.logits[:, -STORED_POSITIONS:].contiguous()}
    save_file(stored, directory / REFERENCE)
    content = {
        "schema": SCHEMA,
        "reference": reference.name,
        "trust_remote_code": trust_remote_code,
        "bound": bound,
        "prompts": dict.fromkeys(PROMPTS, reference.input_ids.shape[1]),
        "versions": _versions(),
        "checks": {
            each.name: {"passed": each.passed, "figures": each.figures, "bounds": each.bounds} for each in checks
        },
        "files": hashes(directory),
    }
    write_json(directory / CERTIFICATE, content)


@dataclass(frozen=True)
class Certificate:
    """What verification needs of a certificate; `bound` is of the logit difference as a share of the largest logit."""

    bound: float
    trust_remote_code: bool
    reference: Reference


def read_certificate(directory: Path) -> Certificate:
    """Read the certificate, and check all files of the directory against it.

    Raises:
        FileNotFoundError: there is no certificate.
        DamagedDirectoryError: names the first file that is absent, changed, or not in the certificate.
    """
    path = directory / CERTIFICATE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {directory} is not a directory that tvaprune exported")
    try:
        content = json.loads(path.read_text())
        if content["schema"] != SCHEMA:
            raise DamagedDirectoryError(f"{path}: schema {content['schema']!r}, this version reads {SCHEMA}")
        expected = dict[str, str](content["files"])
        name, bound, trust = str(content["reference"]), float(content["bound"]), bool(content["trust_remote_code"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise DamagedDirectoryError(f"{path}: damaged certificate ({error}); get the directory again") from error
    check_files(directory, expected, hashes(directory))
    try:
        stored = load_file(directory / REFERENCE)
        return Certificate(bound, trust, Reference(name, stored["input_ids"], stored["logits"]))
    except (FileNotFoundError, SafetensorError, KeyError) as error:
        raise DamagedDirectoryError(f"{directory / REFERENCE}: holds no reference ({error})") from error


def check_files(directory: Path, expected: dict[str, str], found: dict[str, str]) -> None:
    """Compare SHA-256 by file name with a certificate's; DamagedDirectoryError names the first file that differs."""
    for file in sorted(expected.keys() | found.keys()):
        if found.get(file) != expected.get(file):
            what = "changed since the certificate was written (SHA-256)"
            if file not in found:
                what = "absent, but the certificate names it"
            elif file not in expected:
                what = "not in the certificate; remove it, or do not trust it"
            raise DamagedDirectoryError(f"{directory / file}: {what}")


def hashes(directory: Path) -> dict[str, str]:
    """SHA-256 by file name, without the certificate itself, caches and hidden files."""
    found = {}
    for path in Progress(sorted(directory.rglob("*")), desc=f"hash {directory.name}", unit="file", delay=SHOWN_AFTER_S):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name != CERTIFICATE and not name.startswith(".") and "__pycache__" not in path.parts:
            with path.open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _versions() -> dict[str, str]:
    packages = [package for package in ("torch", "transformers", "xllamacpp") if find_spec(package)]
    own = {"python": platform.python_version(), "tvaprune": tvaprune.__version__}
    return own | {package: version(package) for package in packages}
