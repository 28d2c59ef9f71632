"""The last step of every export: proof, provenance and card into the directory."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from tvaprune.checkpoint.card import PROVENANCE, Base, read_provenance, write_card, write_provenance
from tvaprune.checkpoint.certificate import (
    CERTIFICATE,
    GGUF,
    REFERENCE,
    Check,
    Reference,
    fresh_checks,
    read_certificate,
    seal,
)
from tvaprune.checkpoint.compact import MODELING_FILE
from tvaprune.checkpoint.gguf import write_gguf
from tvaprune.checkpoint.parity import model_logits

# Files that speak of the weights beside them, or hold them once more; whatever else has weights needs its own.
OWN_FILES = (CERTIFICATE, REFERENCE, PROVENANCE, GGUF, "README.md")


def certify(
    directory: Path,
    reference: Reference,
    bound: float,
    base: Base,
    made_with: dict[str, Any],
    figures: dict[str, float],
    checks: list[Check],
) -> list[Check]:
    """Check a complete model directory in fresh processes; write tvaprune.json, README.md and the certificate.

    Args:
        reference: logits at all positions of its prompts.
        bound: of the absolute logit difference.
        made_with: parameters by stage.
        figures: for the card, see `write_card`.
        checks: those already made in this process.

    Returns:
        All checks. The files are written whether they passed or not; `require` decides.
    """
    own_code = (directory / MODELING_FILE.name).is_file()
    checks = [*checks, *fresh_checks(directory, reference, bound, trust_remote_code=own_code)]
    write_provenance(directory, base, made_with, figures)
    write_card(directory, base, made_with, figures, checks)
    seal(directory, reference, checks, bound, trust_remote_code=own_code)
    return checks


def certify_retrained(directory: Path, model: PreTrainedModel, original: Path, used: dict[str, Any]) -> list[Check]:
    """Certify a model that differs from a certified one in the weights' values; with a GGUF file where that has one.

    Args:
        directory: the model, saved.
        model: what was saved, as it is in memory; consumed.
        original: the directory that it was trained from.
        used: parameters of the training, by stage.

    Raises:
        ValueError, FileNotFoundError: the original is not as its certificate says.
    """
    certificate, stored = read_certificate(original)
    base, made_with, figures = read_provenance(original)
    if made_with["compact"]["gguf"]:
        write_gguf(directory, directory / GGUF, made_with["compact"]["gguf"])
    logits = model_logits(model.float(), stored.input_ids)
    reference = Reference("the model in memory", stored.input_ids, logits)
    return certify(
        directory, reference, certificate["bounds"]["max_abs_logit_diff"], base, made_with | used, figures, []
    )


def require(directory: Path, checks: list[Check]) -> None:
    """Raise ValueError where a check failed, naming it."""
    failed = [str(check) for check in checks if check.passed is False]
    if failed:
        raise ValueError(f"{directory} is not the model that it should be, do not use it: {'; '.join(failed)}")
