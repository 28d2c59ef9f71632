"""Whatever is in a file, it is read as it says or refused in an error that names it; nothing else escapes."""

import copy
import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.bad_inputs.workspace import REPOSITORY
from tests.tiny_models import random_masks, random_update, tiny_model, write_published
from tvaprune.architecture.topology import Topology
from tvaprune.artifacts import ArtifactError, read_artifact
from tvaprune.checkpoint.tensor_files import Checkpoint
from tvaprune.inputs.sources import InputError, TextLocal
from tvaprune.inputs.texts import read_documents
from tvaprune.masks.masks import read_masks, write_masks
from tvaprune.masks.published import PublishedMasksError, read_published_masks
from tvaprune.masks.update import read_update, write_update
from tvaprune.options.axes import AXES
from tvaprune.params.everything import check_content
from tvaprune.params.loading import ParameterError, read_yaml
from tvaprune.resume import NoState

TOPOLOGY = Topology.of(tiny_model("llama").config)
PARAMS = read_yaml(REPOSITORY / "params.yaml")
many = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


@contextmanager
def refusal(kinds: type[Exception] | tuple[type[Exception], ...], *names: str) -> Iterator[None]:
    """The block may raise an error of these kinds alone, and it names one of the names."""
    said = names[0]
    try:
        yield
    except kinds as error:
        said = str(error)
    assert any(name in said for name in names), said


def keys(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in nested mappings and lists."""
    found = [path] if path else []
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return found + [each for key, value in pairs for each in keys(value, (*path, key))]


@st.composite
def spoiled(draw: st.DrawFn, content: bytes) -> bytes:
    """The content with a few bytes changed, left out, put in, or cut off."""
    spoilt = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(len(spoilt) - 1, 0)))
        what = draw(st.sampled_from(["set", "drop", "add", "cut"]))
        if what == "set" and spoilt:
            spoilt[start] = draw(st.integers(0, 255))
        elif what == "drop":
            del spoilt[start : start + draw(st.integers(1, 40))]
        elif what == "add":
            spoilt[start:start] = draw(st.binary(min_size=1, max_size=12))
        else:
            del spoilt[start:]
    return bytes(spoilt)


@many
@given(place=st.sampled_from(keys(PARAMS)), value=values)
def test_any_value_at_any_key_of_params_is_taken_or_refused(place: tuple[Any, ...], value: Any) -> None:
    content = copy.deepcopy(PARAMS)
    *sections, name = place
    inner: Any = content
    for section in sections:
        inner = inner[section]
    inner[name] = value
    with refusal(ParameterError, str(place[0]), str(name)):
        check_content(content, Path("params.yaml"))


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("artifacts")
    write_masks(root / "masks", random_masks(TOPOLOGY, seed=1), made_with={}, validation_ppl={})
    write_update(root / "update", random_update(TOPOLOGY, seed=2), made_with={}, validation_ppl={})
    return root


@many
@given(data=st.data(), name=st.sampled_from(["masks", "update"]), file=st.sampled_from(["meta.json", "header", "all"]))
def test_a_damaged_artifact_is_refused_or_holds_numbers_of_the_models_shapes(
    data: st.DataObject, name: str, file: str, artifacts: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    work = tmp_path_factory.mktemp("spoilt")
    for each in ("meta.json", "tensors.safetensors"):
        content = (artifacts / name / each).read_bytes()
        if file == each or (each != "meta.json" and file == "all"):
            content = data.draw(spoiled(content))
        elif each != "meta.json" and file == "header":
            end = 8 + struct.unpack("<Q", content[:8])[0]
            content = data.draw(spoiled(content[:end])) + content[end:]
        (work / each).write_bytes(content)
    with refusal(ArtifactError, str(work)):
        if name == "masks":
            masks = read_masks(work, TOPOLOGY)
            for axis in AXES:
                assert masks.keep[axis].shape == masks.score[axis].shape == TOPOLOGY.gate_shape(axis)
                assert int(masks.keep[axis].sum()) == int(masks.keep[axis].long().clamp(0, 1).sum())
                assert not masks.score[axis].isnan().any()
        else:
            assert all(scale.isfinite().all() for scale in read_update(work, TOPOLOGY).scale.values())


@many
@given(meta=values)
def test_any_json_as_meta_is_taken_or_refused(meta: Any, artifacts: Path, tmp_path_factory: Any) -> None:
    work = tmp_path_factory.mktemp("meta")
    (work / "tensors.safetensors").write_bytes((artifacts / "masks" / "tensors.safetensors").read_bytes())
    for content in (meta, {"kind": "masks", "schema": 1, "tensors": meta}):
        (work / "meta.json").write_text(json.dumps(content))
        with refusal(ArtifactError, str(work)):
            read_artifact(work, "masks")


dtypes = st.sampled_from(["F32", "F16", "BF16", "F64", "I8", "BOOL", "F8_E4M3", "X"])
numbers = st.integers(0, 96) | st.integers(-2, 2**64)
entries = st.fixed_dictionaries(
    {"dtype": dtypes, "shape": st.lists(numbers, max_size=3), "data_offsets": st.lists(numbers, min_size=2, max_size=2)}
)


@many
@given(header=st.dictionaries(st.text(min_size=1, max_size=3), entries, max_size=3) | values, size=st.integers(0, 96))
def test_no_header_makes_a_tensor_larger_than_its_file(header: Any, size: int, tmp_path_factory: Any) -> None:
    work = tmp_path_factory.mktemp("header")
    encoded = json.dumps(header).encode()
    (work / "model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + b"\1" * size)
    with refusal(ValueError, str(work)):
        assert sum(each.nbytes for each in Checkpoint.of(work).info.values()) == size


@pytest.fixture(scope="module")
def published_masks(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Made once: torch's pickles hold addresses, so no two are of the same length for certain."""
    file = tmp_path_factory.mktemp("published") / "masks.pkl"
    write_published(file, random_masks(TOPOLOGY, seed=1), random_update(TOPOLOGY, seed=2))
    return file.read_bytes()


@many
@given(data=st.data())
def test_a_damaged_pickle_of_masks_is_refused_or_read(
    data: st.DataObject, published_masks: bytes, tmp_path_factory: Any
) -> None:
    file = tmp_path_factory.mktemp("pickle") / "masks.pkl"
    file.write_bytes(data.draw(spoiled(published_masks)))
    with refusal(PublishedMasksError, "masks.pkl"):
        masks, update = read_published_masks(file, TOPOLOGY)
        assert all(masks.keep[axis].shape == TOPOLOGY.gate_shape(axis) for axis in AXES)
        assert all(scale.isfinite().all() for scale in update.scale.values())


@many
@given(content=st.binary(max_size=200) | spoiled(b'{"text": "a river"}\n{"text": "b"}\n'), suffix=st.sampled_from(
    [".txt", ".jsonl", ".parquet", ".arrow"]
))  # fmt: skip
def test_any_bytes_as_text_are_read_or_refused(content: bytes, suffix: str, tmp_path_factory: Any) -> None:
    work = tmp_path_factory.mktemp("texts")
    file = work / f"a{suffix}"
    file.write_bytes(content)
    source = TextLocal(label="a", kind="a", path=file)
    with refusal((ArtifactError, InputError), f"a{suffix}"):
        assert all(isinstance(document.text, str) for document in read_documents(source, work, NoState(work)))


def test_a_mask_of_bytes_other_than_0_and_1_is_refused(artifacts: Path, tmp_path: Path) -> None:
    """torch takes a byte of 7 for True, and counts it as it likes."""
    write_masks(tmp_path, random_masks(TOPOLOGY, seed=1))
    tensors, _ = read_artifact(tmp_path, "masks")
    tensors["hidden.keep"].view(torch.uint8)[0] = 7
    save_file(dict(tensors), tmp_path / "tensors.safetensors")
    with pytest.raises(ArtifactError, match=r"hidden\.keep has bytes other than 0 and 1"):
        read_masks(tmp_path, TOPOLOGY)
