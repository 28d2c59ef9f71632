"""What every measure compares: the models that are there, on the same rows, beside the dense model's figures."""

import json
from pathlib import Path
from typing import Any

import torch

from tvaprune.artifacts import ArtifactError, read_json_lines, write_json
from tvaprune.resume import hash_files

# Positions whose logits exist at once: in float32, 48 MiB at a vocabulary of 49,152.
POSITIONS_AT_ONCE = 256


def present_models(dense: Path, compact: Path, finetuned: Path) -> dict[str, Path]:
    """The models that exist, by name in the metrics. Raises ArtifactError if the dense or the compact one is absent."""
    for name, directory in {"dense": dense, "compact": compact}.items():
        if not (directory / "config.json").is_file():
            raise ArtifactError(f"{directory}: no config.json, so no {name} model; run dvc repro")
    models = {"dense": dense, "compact": compact, "finetuned": finetuned}
    return {name: directory for name, directory in models.items() if (directory / "config.json").is_file()}


def write_reference(
    path: Path, dtype: torch.dtype, settings: dict[str, Any], inputs: list[Path], figures: dict[str, Any]
) -> None:
    """Write the dense model's figures, which no pruning changes, and how they were computed.

    `settings` is JSON; of `inputs`, the model and the rows, the contents count.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    how = {**settings, "inputs": hash_files(inputs)}
    write_json(path, {"dtype": str(dtype), "settings": how, "figures": figures})


def read_reference(
    path: Path, dtype: torch.dtype, settings: dict[str, Any], inputs: list[Path]
) -> dict[str, Any] | None:
    """The dense model's figures; None where there are none, or they were computed in another dtype or otherwise.

    Raises ArtifactError if the file is damaged.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        how = {**settings, "inputs": hash_files(inputs)}
        return content["figures"] if (content["dtype"], content["settings"]) == (str(dtype), how) else None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: holds no figures of the dense model ({error}); run dvc repro") from error


def spread_evenly(available: int, wanted: int) -> list[int]:
    """Indices of `wanted` rows out of `available`, ascending, each from the middle of an equal share.

    Rows of every group, the same for every model and seed. Raises ValueError if there are fewer than wanted.
    """
    if not 0 < wanted <= available:
        raise ValueError(f"{wanted} rows wanted, {available} available")
    return [(2 * index + 1) * available // (2 * wanted) for index in range(wanted)]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file. Raises ArtifactError if it is absent, empty or damaged; names the line."""
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file; run the fetch_inputs stage")
    rows = list(read_json_lines(path))
    if not rows:
        raise ArtifactError(f"{path}: holds no rows; run the fetch_inputs stage")
    return rows
