"""Figures and tables of the masks that were found."""

import csv
import math
from pathlib import Path
from typing import Any

from tvaprune.gates.run import Found
from tvaprune.model.sparsity import dense_decoder_parameters, kept_decoder_parameters, shared_parameters
from tvaprune.model.topology import Topology
from tvaprune.widths.masks import Masks


def masks_metrics(found: Found, config: Any, target_sparsity: float) -> dict[str, Any]:
    """metrics/masks.json: sparsities as shares, parameters as counts, times in seconds, perplexities on validation."""
    topology = Topology.of(config)
    decoder = dense_decoder_parameters(topology)
    decoder_kept = kept_decoder_parameters(topology, found.masks.keep)
    hidden = int(found.masks.keep["hidden"].sum())
    outside = [
        shared_parameters(topology, width, config.vocab_size, config.tie_word_embeddings)
        for width in (topology.hidden, hidden)
    ]
    ratio = found.step_seconds / found.bare_step_seconds if found.bare_step_seconds else 0.0
    return {
        "target_sparsity": target_sparsity,
        "sparsity_decoder": 1 - decoder_kept / decoder,
        "sparsity_model": 1 - (decoder_kept + outside[1]) / (decoder + outside[0]),
        "params_dense": decoder + outside[0],
        "params_kept": decoder_kept + outside[1],
        "hidden_kept": hidden,
        "steps": len(found.curve),
        "seconds": found.seconds,
        "step_seconds": found.step_seconds,
        "bare_step_seconds": found.bare_step_seconds,
        "step_ratio": ratio,
        "teacher_seconds": found.teacher_seconds,
        "peak_memory_bytes": found.peak_memory_bytes,
        "validation_ppl": {name: math.exp(min(nll, 50.0)) for name, nll in found.validation_nll.items()},
    }


def write_curve(path: Path, curve: list[dict[str, float | int]]) -> None:
    """The training curve as CSV, one row a step."""
    columns = ["step", "loss", "ce", "distillation", "sparsity", "target", "hidden_kept", "gradient_norm"]
    _write_csv(path, columns, [[row[column] for column in columns] for row in curve])


def write_widths(path: Path, masks: Masks) -> None:
    """Kept widths by layer as CSV."""
    rows = zip(masks.keep["intermediate"].sum(-1).tolist(), masks.keep["kv_heads"].sum(-1).tolist(), strict=True)
    _write_csv(path, ["layer", "intermediate_kept", "kv_heads_kept"], [[i, *row] for i, row in enumerate(rows)])


def _write_csv(path: Path, columns: list[str], rows: list[list[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
