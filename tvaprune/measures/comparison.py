"""What every measure compares: the models that are there, on the same rows."""

from pathlib import Path
from typing import Any

from tvaprune.artifacts import ArtifactError, read_json_lines

# Positions whose logits exist at once: in float32, 48 MiB at a vocabulary of 49,152.
POSITIONS_AT_ONCE = 256


def present_models(dense: Path, compact: Path, finetuned: Path) -> dict[str, Path]:
    """The models to measure, by the name that their metrics carry.

    Args:
        finetuned: left out when it holds no config.json, as when fine-tuning is disabled.

    Raises:
        ArtifactError: the dense or the compact model is absent.
    """
    for name, directory in {"dense": dense, "compact": compact}.items():
        if not (directory / "config.json").is_file():
            raise ArtifactError(f"{directory}: no config.json, so no {name} model; run dvc repro")
    models = {"dense": dense, "compact": compact, "finetuned": finetuned}
    return {name: directory for name, directory in models.items() if (directory / "config.json").is_file()}


def spread_evenly(available: int, wanted: int) -> list[int]:
    """Indices of `wanted` rows out of `available`, ascending, each from the middle of an equal share.

    The first rows are not a fair sample where rows are grouped; this takes some of every group, and
    the same ones for every model and every seed.

    Raises:
        ValueError: there are fewer rows than wanted.
    """
    if not 0 < wanted <= available:
        raise ValueError(f"{wanted} rows wanted, {available} available")
    return [(2 * index + 1) * available // (2 * wanted) for index in range(wanted)]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file.

    Raises:
        ArtifactError: the file is absent, empty or damaged; names the line.
    """
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file; run the fetch_inputs stage")
    rows = list(read_json_lines(path))
    if not rows:
        raise ArtifactError(f"{path}: holds no rows; run the fetch_inputs stage")
    return rows
