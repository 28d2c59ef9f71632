"""The parity certificate: a model directory's proof that it computes what the masked model computes.

`parity.json` says what was compared, on which prompts, with which versions, how large the differences were, and the
SHA-256 of every other file. `parity.safetensors` holds the prompts and the reference's logits at their last positions,
so that whoever is given the directory can repeat the proof without the dense model: `python -m tvaprune.verify DIR`.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tvaprune
from tvaprune.artifacts import write_json
from tvaprune.checkpoint import gguf_runtime, reload_script
from tvaprune.checkpoint.parity import Parity, compare, same_choices

CERTIFICATE, REFERENCE, GGUF = "parity.json", "parity.safetensors", "model.gguf"
SCHEMA = 1
STORED_POSITIONS = 4  # a vocabulary of 128 thousand in float32 is half a megabyte a position
NEW_TOKENS = 32
# A rounded file answers a little differently, a wrong one (a rotary permutation, a norm) by many nats.
ROUNDED_BOUND = 0.5
PROMPTS = {
    "city": "The history of the city begins with a small settlement by the river, where traders met in the spring.",
    "water": "Water boils at a lower temperature on a mountain because the pressure of the air is lower there.",
    "code": "def area(radius):\n    return 3.14159 * radius ** 2\n\n# The area of a circle grows with the square of",
}


class DamagedDirectoryError(ValueError):
    """A directory is not what its certificate says."""


@dataclass(frozen=True)
class Reference:
    """What a directory is held against.

    Attributes:
        name: what computed the logits.
        input_ids: int64 [prompts, tokens].
        logits: float32 [prompts, positions, vocab], at the prompts' last positions.
    """

    name: str
    input_ids: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Check:
    """One comparison: its figures, whether they are within bounds (None = not run), and in words."""

    name: str
    passed: bool | None
    figures: dict[str, Any]

    def __str__(self) -> str:
        if self.passed is None:
            return f"{self.name}: not run, {self.figures['skipped']}"
        figures = ", ".join(f"{name} {value:g}" for name, value in self.figures.items())
        return f"{self.name}: {'passed' if self.passed else 'FAILED'} ({figures})"


def prompt_ids(tokenizer: Any, tokens: int) -> Tensor:
    """PROMPTS, repeated and cut to at most `tokens` tokens each: int64 [prompts, tokens]."""
    rows = [tokenizer(text * 8, add_special_tokens=False)["input_ids"][:tokens] for text in PROMPTS.values()]
    shortest = min(map(len, rows))
    return torch.tensor([row[:shortest] for row in rows])


def against_reference(name: str, reference: Reference, logits: Tensor, bound: float) -> Check:
    """Logits [prompts, tokens, vocab] against the reference's, at its positions."""
    parity = compare(reference.logits, logits[:, -reference.logits.shape[1] :], tie=bound)
    passed = parity.max_abs_logit_diff <= bound and parity.argmax_agreement == 1
    return Check(name, passed, _rounded(parity))


def fresh_checks(directory: Path, reference: Reference, bound: float, *, trust_remote_code: bool) -> list[Check]:
    """The directory in processes of their own: reloaded, generating with a cache and without, and in llama.cpp.

    Args:
        directory: with config, weights, and perhaps model.gguf; it may have been moved.
        bound: of the absolute logit difference.
        trust_remote_code: the directory brings the modeling file that computes it.

    Raises:
        DamagedDirectoryError: transformers does not load it; its error is quoted.
    """
    positions = json.loads((directory / "config.json").read_text()).get("max_position_embeddings")
    room = (positions or sys.maxsize) - reference.input_ids.shape[1]
    tokens = max(1, min(NEW_TOKENS, room))
    found = _reload(directory, reference.input_ids, tokens, trust_remote_code)
    checks = [
        against_reference("reloaded in a fresh process", reference, found["logits"], bound),
        _cache_check(found, bound),
    ]
    if (directory / GGUF).is_file():
        checks.append(_gguf_check(directory / GGUF, reference.input_ids, found, bound))
    return checks


def _cache_check(found: dict[str, Tensor], bound: float) -> Check:
    cached, uncached = found["tokens"], found["tokens_uncached"]
    same = same_choices(found["step_logits_uncached"], uncached, cached, bound)
    # A step's logits compare while all tokens before it are the same.
    comparable = torch.ones_like(cached, dtype=torch.bool)
    comparable[:, 1:] = (cached == uncached).cumprod(1)[:, :-1].bool()
    difference = (found["step_logits"] - found["step_logits_uncached"]).abs().amax(-1)[comparable].max()
    figures = {
        "tokens": cached.shape[1],
        "token_agreement": same,
        "max_abs_logit_diff": _digits(float(difference)),
    }
    return Check("generation with cache = without", same == 1 and float(difference) <= bound, figures)


def _reload(directory: Path, input_ids: Tensor, tokens: int, trust_remote_code: bool) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as temporary:
        prompts, results = Path(temporary, "prompts.safetensors"), Path(temporary, "results.safetensors")
        save_file({"input_ids": input_ids}, prompts)
        # The modeling file is copied to a cache of remote code: a new one, so that no older copy is run.
        environment = os.environ | {"HF_MODULES_CACHE": str(Path(temporary, "modules")), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-P", reload_script.__file__, str(directory.resolve()), str(prompts), str(results)]
        command += [str(tokens), str(int(trust_remote_code))]
        done = subprocess.run(command, env=environment, cwd=temporary, capture_output=True, text=True, check=False)
        if done.returncode:
            cause = (done.stderr.strip().splitlines() or ["killed"])[-1]
            raise DamagedDirectoryError(f"{directory}: a fresh process does not load it: {cause}")
        return load_file(results)


def _gguf_check(file: Path, input_ids: Tensor, found: dict[str, Tensor], bound: float) -> Check:
    """Greedy tokens of llama.cpp against transformers'.

    Files that hold the weights as float32 have to give the same tokens, and logits within ten times the bound, because
    llama.cpp's kernels round otherwise. In rounded ones the first token's log-probability is held to ROUNDED_BOUND.
    """
    name = "llama.cpp from model.gguf"
    if find_spec("xllamacpp") is None:
        return Check(name, None, {"skipped": "xllamacpp is not installed (pip install 'tvaprune[gguf]')"})
    exact = _holds_float32(file)
    prompts, tokens = input_ids.tolist(), found["tokens"].shape[1]
    # llama.cpp ends the process at a failed assertion, so it gets one of its own.
    program = (
        f"import json, sys; from {gguf_runtime.__name__} import greedy_steps; from pathlib import Path\n"
        "steps = greedy_steps(Path(sys.argv[1]), *json.load(sys.stdin))\n"
        "print(json.dumps([[[s.token, s.logprobs[s.token]] for s in one] for one in steps]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(file.resolve())],
        input=json.dumps([prompts, tokens if exact else 1]),
        cwd=Path(tvaprune.__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        cause = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise DamagedDirectoryError(f"{file}: llama.cpp does not run it: {cause}")
    steps = torch.tensor(json.loads(done.stdout.splitlines()[-1]), dtype=torch.float64)
    chosen = steps[..., 0].long()
    expected = found["step_logits"][:, : chosen.shape[1]]
    first = expected[:, 0].double().log_softmax(-1).gather(1, chosen[:, :1]).squeeze(1)
    difference = float((first - steps[:, 0, 1]).abs().max())
    figures: dict[str, Any] = {"tokens": chosen.shape[1], "max_abs_logprob_diff": _digits(difference)}
    if not exact:
        return Check(name, difference <= ROUNDED_BOUND, figures)
    same = same_choices(expected, found["tokens"], chosen, 10 * bound)
    return Check(name, same == 1 and difference <= 10 * bound, figures | {"token_agreement": same})


def _holds_float32(file: Path) -> bool:
    from gguf import GGMLQuantizationType, GGUFReader

    return all(tensor.tensor_type == GGMLQuantizationType.F32 for tensor in GGUFReader(file).tensors)


def seal(directory: Path, reference: Reference, checks: list[Check], bound: float, *, trust_remote_code: bool) -> None:
    """Write parity.safetensors and, last of all files, parity.json."""
    stored = {"input_ids": reference.input_ids, "logits": reference.logits[:, -STORED_POSITIONS:].contiguous()}
    save_file(stored, directory / REFERENCE)
    write_json(
        directory / CERTIFICATE,
        {
            "schema": SCHEMA,
            "reference": reference.name,
            "trust_remote_code": trust_remote_code,
            "bounds": {"max_abs_logit_diff": bound, "argmax_agreement": 1},
            "prompts": dict.fromkeys(PROMPTS, reference.input_ids.shape[1]),
            "versions": _versions(),
            "checks": {check.name: check.figures | {"passed": check.passed} for check in checks},
            "files": hashes(directory),
        },
    )


def read_certificate(directory: Path) -> tuple[dict[str, Any], Reference]:
    """The certificate of a directory and the reference it stores, files checked against their hashes.

    Raises:
        FileNotFoundError: there is no certificate.
        DamagedDirectoryError: names the first file that is absent, changed, or not the certificate's.
    """
    path = directory / CERTIFICATE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {directory} is not a directory that tvaprune exported")
    try:
        certificate = json.loads(path.read_text())
        expected: dict[str, str] = certificate["files"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DamagedDirectoryError(f"{path}: damaged certificate ({error}); get the directory again") from error
    if certificate.get("schema") != SCHEMA:
        raise DamagedDirectoryError(f"{path}: schema {certificate.get('schema')!r}, this version reads {SCHEMA}")
    found = hashes(directory)
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise DamagedDirectoryError(f"{directory / name}: absent, but the certificate names it")
        if name not in expected:
            raise DamagedDirectoryError(f"{directory / name}: not in the certificate; remove it, or do not trust it")
        if found[name] != expected[name]:
            raise DamagedDirectoryError(f"{directory / name}: changed since the certificate was written (SHA-256)")
    stored = load_file(directory / REFERENCE)
    return certificate, Reference(certificate["reference"], stored["input_ids"], stored["logits"])


def hashes(directory: Path) -> dict[str, str]:
    """SHA-256 by name of all files but the certificate, caches and hidden ones."""
    found = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name != CERTIFICATE and not name.startswith(".") and "__pycache__" not in path.parts:
            with path.open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "tvaprune": tvaprune.__version__}
    for package in ("torch", "transformers", "xllamacpp"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _rounded(parity: Parity) -> dict[str, float]:
    return {name: _digits(value) for name, value in parity._asdict().items()}


def _digits(value: float) -> float:
    """Two significant digits: the rest changes with the number of threads."""
    return float(f"{value:.1e}") if value != 1 else 1.0
