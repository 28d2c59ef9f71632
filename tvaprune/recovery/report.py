"""What fine-tuning reports: the losses by step, and how much of the quality that pruning lost came back."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tvaprune.artifacts import write_csv


class CurveRow(NamedTuple):
    """One step, after its update; None where not measured. Losses in nats a token, fp32 means."""

    step: int
    tokens: int
    learning_rate: float | None
    loss: float | None
    ce: float | None
    distillation: float | None
    validation_ce: float | None


def write_curve(path: Path, curve: Sequence[CurveRow]) -> None:
    """As CSV; a value that was not measured is blank."""
    write_csv(path, CurveRow._fields, curve)


def quality_metrics(curve: Sequence[CurveRow], nll_best: float, nll_teacher: float, seconds: float) -> dict[str, Any]:
    """Validation losses, in nats a token, and the share of the lost quality that training recovered.

    `seconds` includes validation. The share is given only where the student starts worse than its teacher.
    """
    measured = [row.validation_ce for row in curve if row.validation_ce is not None]
    start, tokens = measured[0], curve[-1].tokens
    values = {"nll_start": start, "nll_end": measured[-1], "nll_best": nll_best, "nll_teacher": nll_teacher}
    metrics: dict[str, Any] = {"validation": values}
    if start > nll_teacher:
        share = (start - nll_best) / (start - nll_teacher)
        metrics["recovered"] = {
            "share": share,
            "share_per_million_tokens": share / (tokens / 1e6),
            "share_per_minute": share / (seconds / 60),
        }
    return metrics
