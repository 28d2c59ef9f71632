"""The contract between stages: what is written reads back, and damage is named."""

import json
import math
from pathlib import Path

import pytest
import torch

from tvaprune.artifacts import ArtifactError, read_artifact, write_artifact, write_json

TENSORS = {
    "b": torch.randn(2, 3, generator=torch.Generator().manual_seed(0)),
    "a": torch.tensor([True, False]),
    "ids": torch.arange(6, dtype=torch.int32).view(3, 2),
}


def test_tensors_and_meta_read_back(tmp_path: Path) -> None:
    write_artifact(tmp_path / "x", "masks", TENSORS, sparsity=0.2)
    tensors, meta = read_artifact(tmp_path / "x", "masks")
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {n: t.dtype for n, t in TENSORS.items()}
    assert meta["sparsity"] == 0.2
    assert meta["tensors"]["ids"] == {"dtype": "int32", "shape": [3, 2]}


def test_equal_contents_are_equal_bytes(tmp_path: Path) -> None:
    """The order of insertion and a strided view change nothing: hashes decide what reruns."""
    write_artifact(tmp_path / "x", "masks", TENSORS)
    reversed_order = dict(reversed(TENSORS.items())) | {"b": TENSORS["b"].t().contiguous().t()}
    write_artifact(tmp_path / "y", "masks", reversed_order)
    for name in ("tensors.safetensors", "meta.json"):
        assert (tmp_path / "x" / name).read_bytes() == (tmp_path / "y" / name).read_bytes()


def test_another_kind_is_refused(tmp_path: Path) -> None:
    write_artifact(tmp_path, "masks", TENSORS)
    with pytest.raises(ArtifactError, match="expected kind 'update' schema 1, found 'masks'"):
        read_artifact(tmp_path, "update")


def test_absence_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"meta\.json: no such file; is .*nothing a masks artifact"):
        read_artifact(tmp_path / "nothing", "masks")
    write_artifact(tmp_path / "x", "masks", TENSORS)
    (tmp_path / "x" / "tensors.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"tensors\.safetensors.*masks artifact"):
        read_artifact(tmp_path / "x", "masks")


@pytest.mark.parametrize("name", ["tensors.safetensors", "meta.json"])
def test_a_truncated_file_is_named_as_damage(tmp_path: Path, name: str) -> None:
    write_artifact(tmp_path, "masks", TENSORS)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ArtifactError, match=r"damaged masks artifact .*; remove it and run dvc repro"):
        read_artifact(tmp_path, "masks")


@pytest.mark.parametrize("change", [{"shape": [2, 4]}, {"dtype": "float16"}])
def test_tensors_that_are_not_as_described_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    write_artifact(tmp_path, "masks", TENSORS)
    meta = json.loads((tmp_path / "meta.json").read_text())
    meta["tensors"]["b"] |= change
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ArtifactError, match="tensor 'b'"):
        read_artifact(tmp_path, "masks")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_json_refuses_what_is_no_number(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match=r"m\.json: a figure is not finite: .*not JSON compliant"):
        write_json(tmp_path / "m.json", {"a": {"b": value}})
    assert not (tmp_path / "m.json").exists()
