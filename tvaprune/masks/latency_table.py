"""The latency table of one machine: the time of each block of a decoder layer at each width."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tvaprune.architecture.topology import LayerWidths, Topology
from tvaprune.artifacts import ArtifactError, read_artifact, write_artifact, write_csv
from tvaprune.masks.masks import Masks
from tvaprune.options.axes import AXES
from tvaprune.options.choices import Latency

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
LATENCIES: tuple[Latency, ...] = ("prefill", "decode", "request")
Block = Literal["rest", "attention", "mlp"]
BLOCKS: tuple[Block, ...] = ("rest", "attention", "mlp")
Times = dict[Block, dict[Phase, Tensor]]
# Predictions are right to a few percent, and a latency target is a ceiling: aim at this share of it.
AIM = 0.95


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds by width.

    Attributes:
        hidden, intermediate, kv_heads: the widths that were timed, ascending. The dense width is last; 0, a layer
            without the block, is first for the latter two.
        ms: float64, by block and phase.
            rest [hidden]: embedding, rotary angles, final norm, vocabulary product, argmax.
            attention [hidden, kv_heads]: a layer's norm, projections, attention, cache and residual.
            mlp [hidden, intermediate]: a layer's norm, projections, activation and residual.
    """

    hidden: list[int]
    intermediate: list[int]
    kv_heads: list[int]
    ms: Times
    iqr_ms: Times  # interquartile ranges
    made_on: dict[str, Any]  # device, dtype, threads, versions and lengths

    def parts(self, of: Latency) -> tuple[Tensor, Tensor, Tensor]:
        """rest [hidden], attention [hidden, kv_heads] and mlp [hidden, intermediate] of a phase or a request."""
        by_block = [self.ms[block] for block in BLOCKS]
        if of != "request":
            return by_block[0][of], by_block[1][of], by_block[2][of]
        steps = self.made_on["decode_tokens"]
        rest, attention, mlp = (by["prefill"] + steps * by["decode"] for by in by_block)
        return rest, attention, mlp

    def predict(self, of: Latency, hidden: int, intermediate: list[int], kv_heads: list[int]) -> float:
        """Latency of a model in ms, interpolated linearly between the widths of the table."""
        rest, attention, mlp = (part.numpy() for part in self.parts(of))

        def blocks(table: np.ndarray, widths: list[int], chosen: list[int]) -> np.ndarray:
            return np.array([np.interp(chosen, widths, row).sum() for row in table])

        by_hidden = rest + blocks(attention, self.kv_heads, kv_heads) + blocks(mlp, self.intermediate, intermediate)
        return float(np.interp(hidden, self.hidden, by_hidden))

    def dense(self, of: Latency, topology: Topology) -> float:
        """Predicted latency of the model before pruning, in ms."""
        return self.predict(of, *LayerWidths.dense(topology))

    def rising(self) -> "LatencyTable":
        """The table with times that rise, or stay, with every width: a narrower block that took longer is noise.

        Each time becomes the mean of the highest at a narrower or equal and the lowest at a wider or equal width.
        """
        return replace(self, ms={block: {of: _rising(ms) for of, ms in by.items()} for block, by in self.ms.items()})


def _rising(times: Tensor) -> Tensor:
    for axis in range(times.dim()):
        below, above = times.cummax(axis).values, times.flip(axis).cummin(axis).values.flip(axis)
        times = (below + above) / 2
    return times


def latency_metrics(topology: Topology, table: LatencyTable, masks: Masks, padded: bool = False) -> dict[str, Any]:
    """Predicted latency of the masks' widths in ms and as a share of the dense model's, by phase.

    padded: every layer computes as the widest one does.
    """
    hidden, intermediate, kv_heads = LayerWidths.of_counts(masks.widths())
    if padded:
        heads = topology.stock_heads(hidden, max(kv_heads))
        intermediate, kv_heads = topology.layers * [max(intermediate)], topology.layers * [heads]
    metrics: dict[str, Any] = {
        "profile_threads": table.made_on["threads"],
        "profile_is_cuda": int(table.made_on["device"] != "cpu"),
    }
    for of in LATENCIES:
        dense = table.dense(of, topology)
        latency = table.predict(of, hidden, intermediate, kv_heads)
        metrics[of] = {"predicted_ms": latency, "predicted_dense_ms": dense, "predicted_share": latency / dense}
    return metrics


def profile_metrics(table: LatencyTable | None, topology: Topology) -> dict[str, Any]:
    """metrics/profile.json: the dense model's latencies, in ms."""
    if table is None:
        return {"enabled": 0}
    metrics: dict[str, Any] = {"enabled": 1, "threads": table.made_on["threads"]}
    for phase in PHASES:
        dense = {f"{block}_ms": float(table.ms[block][phase].flatten()[-1]) for block in BLOCKS}
        metrics[phase] = {"dense_ms": table.dense(phase, topology), **dense}
    return metrics


def write_staircase(path: Path, table: LatencyTable | None) -> None:
    """metrics/profile.csv: an MLP's latency by intermediate width, at the dense hidden width; empty without a table."""
    columns = ["intermediate", *(f"{phase}_{name}" for phase in PHASES for name in ("ms", "iqr_ms"))]
    values: list[Sequence[float]] = []
    if table is not None:
        measured = [times["mlp"][phase][-1].tolist() for phase in PHASES for times in (table.ms, table.iqr_ms)]
        values = [table.intermediate, *measured]
    write_csv(path, columns, zip(*values, strict=True))


def write_table(directory: Path, table: LatencyTable | None) -> None:
    """Write the artifact, whose timings differ between two runs; None says in it that nothing was timed."""
    if table is None:
        write_artifact(directory, "profile", {}, enabled=False)
        return
    tensors = {f"widths.{axis}": torch.tensor(getattr(table, axis), dtype=torch.int64) for axis in AXES}
    for unit, times in (("ms", table.ms), ("iqr_ms", table.iqr_ms)):
        tensors |= {f"{block}.{phase}_{unit}": times[block][phase] for block in BLOCKS for phase in PHASES}
    write_artifact(directory, "profile", tensors, enabled=True, made_on=table.made_on)


def read_table(directory: Path, topology: Topology) -> LatencyTable:
    """Read a table. Raises ArtifactError if it is damaged, without timings, or of a model of other sizes."""
    tensors, meta = read_artifact(directory, "profile")
    if not meta["enabled"]:
        raise ArtifactError(
            f"{directory}: profile_hardware has timed nothing, but learn_masks.budget or adapt_dimensions.multiple "
            "needs a table; run dvc repro profile_hardware"
        )
    made_on, widths = meta["made_on"], {axis: tensors[f"widths.{axis}"].tolist() for axis in AXES}
    names = ("layers", *AXES)
    of_model = dict(zip(names, [topology.layers, *map(topology.width, AXES)], strict=True))
    of_table = dict(zip(names, [made_on["layers"], *(found[-1] for found in widths.values())], strict=True))
    if of_table != of_model:
        raise ArtifactError(
            f"{directory}: timed a model of {of_table}, but this one has {of_model}; run dvc repro profile_hardware"
        )

    def times(unit: str) -> Times:
        return {block: {phase: tensors[f"{block}.{phase}_{unit}"] for phase in PHASES} for block in BLOCKS}

    return LatencyTable(**widths, ms=times("ms"), iqr_ms=times("iqr_ms"), made_on=made_on)
