"""A measured table of one machine: what every block of a decoder layer takes at every width."""

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tvaprune.architecture.topology import Topology
from tvaprune.artifacts import ArtifactError, read_artifact, write_artifact

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
# What latency is weighed: a phase's own, or a whole request's: one prefill and `made_on.decode_tokens` steps.
Latency = Literal["prefill", "decode", "request"]
LATENCIES: tuple[Latency, ...] = ("prefill", "decode", "request")
_BLOCKS = ("rest", "attention", "mlp")


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds by width.

    Attributes:
        hidden, intermediate, kv_heads: the widths that were timed, ascending; the dense ones last, and 0, which is the
            layer without that block, first in the latter two.
        rest: by phase, float64 [hidden]: embedding, rotary angles, final norm, vocabulary product, argmax.
        attention: by phase, float64 [hidden, kv_heads]: a layer's norm, projections, attention, cache and residual.
        mlp: by phase, float64 [hidden, intermediate]: a layer's norm, projections, activation and residual.
        iqr: the interquartile ranges of those, by block and phase.
        made_on: device, dtype, threads, versions and lengths.
    """

    hidden: list[int]
    intermediate: list[int]
    kv_heads: list[int]
    rest: dict[Phase, Float[Tensor, " hidden"]]
    attention: dict[Phase, Float[Tensor, "hidden kv_heads"]]
    mlp: dict[Phase, Float[Tensor, "hidden intermediate"]]
    iqr: dict[str, dict[Phase, Tensor]] = field(default_factory=dict)
    made_on: dict[str, Any] = field(default_factory=dict)

    def parts(self, of: Latency) -> tuple[Tensor, Tensor, Tensor]:
        """rest [hidden], attention [hidden, kv_heads] and mlp [hidden, intermediate] of a phase or a request."""
        if of != "request":
            return self.rest[of], self.attention[of], self.mlp[of]
        steps = self.made_on["decode_tokens"]
        rest, attention, mlp = (
            block["prefill"] + steps * block["decode"] for block in (self.rest, self.attention, self.mlp)
        )
        return rest, attention, mlp

    def predict(self, of: Latency, hidden: int, intermediate: list[int], kv_heads: list[int]) -> float:
        """Latency of a model in ms; between two widths of the table, a straight line."""
        rest, attention, mlp = (part.numpy() for part in self.parts(of))

        def by_hidden(values: np.ndarray) -> float:
            return float(np.interp(hidden, self.hidden, values))

        def blocks(table: np.ndarray, widths: list[int], chosen: list[int]) -> np.ndarray:
            return np.array([np.interp(chosen, widths, row).sum() for row in table])

        return (
            by_hidden(rest)
            + by_hidden(blocks(attention, self.kv_heads, kv_heads))
            + by_hidden(blocks(mlp, self.intermediate, intermediate))
        )

    def dense(self, of: Latency, topology: Topology) -> float:
        """Predicted latency of the model before pruning, in ms."""
        every = [1] * topology.layers
        return self.predict(
            of, topology.hidden, [n * topology.intermediate for n in every], [n * topology.kv_heads for n in every]
        )


def profile_metrics(table: LatencyTable | None, topology: Topology) -> dict[str, Any]:
    """metrics/profile.json: what the table says of the dense model, in ms."""
    if table is None:
        return {"enabled": 0}
    row: dict[str, Any] = {"enabled": 1, "threads": table.made_on["threads"]}
    for phase in PHASES:
        row[phase] = {
            "dense_ms": table.dense(phase, topology),
            "rest_ms": float(table.rest[phase][-1]),
            "attention_ms": float(table.attention[phase][-1, -1]),
            "mlp_ms": float(table.mlp[phase][-1, -1]),
        }
    return row


def write_staircase(path: Path, table: LatencyTable | None) -> None:
    """metrics/profile.csv: an MLP's latency by intermediate width, hidden dense; no rows without a table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["intermediate", *(f"{phase}_{name}" for phase in PHASES for name in ("ms", "iqr_ms"))])
        if table is None:
            return
        for index, width in enumerate(table.intermediate):
            columns = [by[phase] for phase in PHASES for by in (table.mlp, table.iqr["mlp"])]
            rows.writerow([width, *(float(column[-1, index]) for column in columns)])


def write_table(directory: Path, table: LatencyTable | None) -> None:
    """Write the artifact; None: nothing was timed, and it says so.

    The one artifact that differs between two runs: it holds timings.
    """
    if table is None:
        write_artifact(directory, "profile", {}, enabled=False)
        return
    blocks = {"rest": table.rest, "attention": table.attention, "mlp": table.mlp}
    tensors = {f"{name}.{phase}_ms": by_phase[phase] for name, by_phase in blocks.items() for phase in PHASES}
    tensors |= {f"{name}.{phase}_iqr_ms": table.iqr[name][phase] for name in blocks for phase in PHASES}
    tensors |= {
        f"widths.{axis}": torch.tensor(getattr(table, axis), dtype=torch.int64)
        for axis in ("hidden", "intermediate", "kv_heads")
    }
    write_artifact(directory, "profile", tensors, enabled=True, made_on=table.made_on)


def read_table(directory: Path, topology: Topology) -> LatencyTable:
    """Read a table and check that it describes the model.

    Raises:
        ArtifactError: damaged, without timings, or of a model of other sizes.
    """
    tensors, meta = read_artifact(directory, "profile")
    if not meta["enabled"]:
        raise ArtifactError(
            f"{directory}: profile_hardware has timed nothing, but adapt_dimensions.multiple is measured; "
            "run dvc repro profile_hardware"
        )
    widths = {axis: tensors[f"widths.{axis}"].tolist() for axis in ("hidden", "intermediate", "kv_heads")}
    of_model = {"layers": topology.layers, **{axis: topology.width(axis) for axis in widths}}  # type: ignore[arg-type]
    of_table = {"layers": meta["made_on"]["layers"], **{axis: found[-1] for axis, found in widths.items()}}
    if of_table != of_model:
        raise ArtifactError(
            f"{directory}: timed a model of {of_table}, but this one has {of_model}; run dvc repro profile_hardware"
        )

    def block(name: str, unit: str) -> dict[Phase, Tensor]:
        return {phase: tensors[f"{name}.{phase}_{unit}"] for phase in PHASES}

    return LatencyTable(
        **widths,
        rest=block("rest", "ms"),
        attention=block("attention", "ms"),
        mlp=block("mlp", "ms"),
        iqr={name: block(name, "iqr_ms") for name in _BLOCKS},
        made_on=meta["made_on"],
    )
