"""The last step of every export: checks, provenance, model card and certificate."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tvaprune.checkpoint.cut import MODELING_FILE
from tvaprune.export.card import PROVENANCE, Provenance, write_card
from tvaprune.export.gguf import write_gguf
from tvaprune.proof.certificate import (
    CERTIFICATE,
    GGUF,
    REFERENCE,
    Check,
    Reference,
    read_certificate,
    write_certificate,
)
from tvaprune.proof.checks import fresh_checks

# Files that describe the weights beside them, or hold a copy; they are not to be copied to other weights.
OWN_FILES = (CERTIFICATE, REFERENCE, PROVENANCE, GGUF, "README.md")


def certify(
    directory: Path, reference: Reference, bound: float, made: Provenance, checks: list[Check] | None = None
) -> list[Check]:
    """Check a complete model directory in fresh processes; write tvaprune.json, README.md and the certificate.

    The reference has logits at all positions of its prompts, `bound` is a share of the largest logit, and `checks` were
    already made in this process. Returns all checks. The files are written whether they passed or not; `require`
    decides.
    """
    own_code = (directory / MODELING_FILE.name).is_file()
    checks = [*(checks or []), *fresh_checks(directory, reference, bound, trust_remote_code=own_code)]
    made.write(directory)
    write_card(directory, made, checks)
    write_certificate(directory, reference, checks, bound, trust_remote_code=own_code)
    return checks


def certify_retrained(
    directory: Path,
    logits: Float[Tensor, "prompts tokens vocab"],
    original: Path,
    used: dict[str, Any],
    nll: dict[str, float],
) -> list[Check]:
    """Certify a model that was trained from a certified one; with a GGUF file where that has one.

    Args:
        logits: of the model in float32, as it was in memory, on the prompts of the original's certificate.
        used: parameters of the training, by stage.
        nll: nats per token for the card: nll_start, nll_best and nll_teacher.

    Raises:
        ValueError, FileNotFoundError: the original is not as its certificate says.
    """
    certificate, made = read_certificate(original), Provenance.read(original)
    if made.made_with["compact"]["gguf"]:
        write_gguf(directory, directory / GGUF, made.made_with["compact"]["gguf"])
    reference = Reference("the model in memory", certificate.reference.input_ids, logits)
    figures = made.figures | {f"finetuned_{name}": value for name, value in nll.items()}
    made = replace(made, made_with=made.made_with | used, figures=figures)
    return certify(directory, reference, certificate.bound, made)


def require(directory: Path, checks: list[Check]) -> None:
    """Raise ValueError where a check failed, naming it."""
    failed = [str(check) for check in checks if check.passed is False]
    if failed:
        raise ValueError(f"{directory} failed its checks, do not use it: {'; '.join(failed)}")
