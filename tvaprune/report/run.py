"""What a report reads of a run: metrics, curves, widths with their importance, and where the model comes from."""

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tvaprune.architecture.topology import Topology
from tvaprune.artifacts import SOURCE_FILE, ArtifactError
from tvaprune.masks.masks import Masks
from tvaprune.options.axes import AXES, Axis

METRICS = ("masks", "compact", "finetune", "speed", "perplexity", "zeroshot", "quantized")
CURVES = ("mask_training", "finetune", "speed", "profile")
MODELS = {"dense": "dense", "compact": "pruned", "finetuned": "pruned + LoRA"}


@dataclass(frozen=True)
class Widths:
    """What is kept of one axis.

    Attributes:
        kept: units, one number for hidden, one a layer for the others.
        full: the dense width.
        importance: share of the units' importance that is kept, exp(score), one number for each of `kept`.
    """

    kept: list[int]
    full: int
    importance: list[float]


@dataclass(frozen=True)
class RunFiles:
    """The files of a run as values; what a run did not write is an empty value.

    Attributes:
        metrics: the content of metrics/NAME.json by name.
        curves: the rows of metrics/NAME.csv by name; text, empty where a cell is.
        made: tvaprune.json of the model that the run ends with: base, layout, `made_with`.
        certificate: parity.json of the pruned model: versions and checks.
        file_bytes: sizes of the weights' files, by what they are.
    """

    metrics: dict[str, dict[str, Any]]
    curves: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    widths: dict[Axis, Widths] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)
    certificate: dict[str, Any] = field(default_factory=dict)
    file_bytes: dict[str, int] = field(default_factory=dict)

    def measured(self, name: str) -> dict[str, str]:
        """The models in metrics/NAME.json, with the names that the report gives them."""
        return {model: shown for model, shown in MODELS.items() if model in self.metrics.get(name, {})}


def read_run(metrics: Path, models: dict[str, Path], masks: Masks, topology: Topology) -> RunFiles:
    """Read a run. `models`: directories by name, as of `present_models`. Raises ArtifactError for a damaged file."""
    last = models.get("finetuned", models["compact"])
    return RunFiles(
        metrics={name: read_json(metrics / f"{name}.json") for name in METRICS},
        curves={name: read_csv(metrics / f"{name}.csv") for name in CURVES},
        widths={axis: _widths(masks, axis, topology.width(axis)) for axis in AXES},
        source=read_json(models["dense"] / SOURCE_FILE),
        made=read_json(last / "tvaprune.json"),
        certificate=read_json(models["compact"] / "parity.json"),
        file_bytes={
            MODELS[name] + (", GGUF" if path.suffix == ".gguf" else ""): path.stat().st_size
            for name, folder in models.items()
            for path in sorted([*folder.glob("model.safetensors"), *folder.glob("model.gguf")])
        },
    )


def _widths(masks: Masks, axis: Axis, full: int) -> Widths:
    """Importance as in `masks.importance`: exp(score), each unit of a layer with as many parameters as the others."""
    keep, score = masks.keep[axis].view(-1, full), masks.score[axis].double().view(-1, full)
    share = (score.softmax(-1) * keep).sum(-1).nan_to_num(1.0)
    return Widths(keep.sum(-1).tolist(), full, share.tolist())


def read_json(path: Path) -> dict[str, Any]:
    """The content of a file; empty where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except json.JSONDecodeError as error:
        raise ArtifactError(f"{path}: not valid JSON ({error}); run dvc repro") from error


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none where there is no file."""
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines())) if path.is_file() else []
