"""The benchmark's files: medians, ratios and limits as metrics, and every round as CSV."""

import statistics
from pathlib import Path
from typing import Any

from tvaprune.artifacts import write_csv
from tvaprune.measures.latency import PhaseTimes


def speed_metrics(phases: dict[int, tuple[PhaseTimes, PhaseTimes]]) -> dict[str, Any]:
    """batch, prefill and decode of the first batch size; those of each further one under batch_N."""
    metrics: dict[str, Any] = {}
    for batch, (first, then) in phases.items():
        measured = {"batch": batch, "prefill": summarise(first, "flops"), "decode": summarise(then, "bytes_read")}
        metrics.update({f"batch_{batch}": measured} if metrics else measured)
    return metrics


def write_rounds(path: Path, phases: dict[int, tuple[PhaseTimes, PhaseTimes]], labels: dict[str, str]) -> None:
    """Every measurement that counts, one row each, as CSV; `labels` are further columns, the same in every row."""
    rows = (
        [repeat, batch, name, model, value, *labels.values()]
        for batch, measured in phases.items()
        for name, phase in zip(("prefill", "decode"), measured, strict=True)
        for model, values in phase.latency_ms.items()
        for repeat, value in enumerate(values)
    )
    write_csv(path, ["repeat", "batch", "phase", "model", "latency_ms", *labels], rows)


def summarise(phase: PhaseTimes, work_name: str) -> dict[str, Any]:
    """A phase's part of the metrics file: each model, and compact against dense; `work_name`: key for `phase.work`.

    speedup_paired: of each pruned model, the median over the rounds of dense / pruned latency in the same round.
    """
    median = {name: statistics.median(values) for name, values in phase.latency_ms.items()}
    metrics: dict[str, Any] = {}
    for name, values in phase.latency_ms.items():
        lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
        metrics[name] = {
            "latency_ms": median[name],
            "iqr_ms": upper - lower,
            "tokens_per_s": 1000 * phase.tokens / median[name],
            work_name: phase.work[name],
            f"{work_name}_per_s": 1000 * phase.work[name] / median[name],
        }
        if name != "dense":
            rounds = zip(phase.latency_ms["dense"], values, strict=True)
            metrics[name]["speedup_paired"] = statistics.median(dense / pruned for dense, pruned in rounds)
    speedup, limit = median["dense"] / median["compact"], phase.work["dense"] / phase.work["compact"]
    return {
        **metrics,
        "speedup": speedup,
        "limit": limit,
        "efficiency": speedup / limit,
    }
