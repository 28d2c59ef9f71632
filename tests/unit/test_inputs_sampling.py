"""Samples of sharded corpora: seeded, bounded in what is read, and the same after a kill."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet as parquet
import pytest

from tvaprune.inputs import texts as module
from tvaprune.inputs.documents import Document
from tvaprune.inputs.sources import InputError, TextHub, TextLocal
from tvaprune.inputs.texts import read_documents, sample
from tvaprune.resume import ResumableRun

SHARDS, ROWS = 6, 120
TEXTS = {f"{shard}.{row}" for shard in range(SHARDS) for row in range(ROWS)}


class Killed(BaseException):
    """As if the process were gone: nothing after it runs, and files stay as they are."""


@pytest.fixture(params=["jsonl", "parquet", "hub"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # datasets waits 5 s after every stream of Parquet files, for threads of remote reads.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)


def write(folder: Path, kind: str) -> Path:
    folder.mkdir()
    for shard in range(SHARDS):
        texts = [f"{shard}.{row}" for row in range(ROWS)]
        if kind == "parquet":
            parquet.write_table(pyarrow.table({"text": texts}), folder / f"{shard}.parquet")
        else:
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
            (folder / f"{shard}.jsonl").write_text(lines)
    return folder


def source_of(folder: Path, kind: str, documents: int = 60, seed: int = 0) -> TextHub | TextLocal:
    if kind == "hub":
        # A folder in place of a repository, which the library reads alike and the parameters refuse.
        stored = TextHub(label="corpus", kind="web", repo="a/b", revision="main", documents=documents, seed=seed)
        return stored.model_copy(update={"repo": str(folder)})
    return TextLocal(label="corpus", kind="web", path=folder, documents=documents, seed=seed)


def taken(source: TextHub | TextLocal, read: list[int] | None = None, **options: Any) -> list[Document]:
    def document_of(row: dict[str, str], field: str, where: str, number: str, tidy: Any) -> Document:
        if read is not None:
            read.append(int(number))
        return real_document_of(row, field, where, number, tidy)

    real_document_of = module.document_of
    with pytest.MonkeyPatch.context() as patch, ResumableRun("fetch_inputs", {}, []) as state:
        patch.setattr(module, "document_of", document_of)
        return list(sample(source, state, **options))


def test_a_sample_is_seeded_and_reads_no_more_than_it_needs(tmp_path: Path, kind: str) -> None:
    folder = write(tmp_path / "corpus", kind)
    read: list[int] = []
    found = taken(source_of(folder, kind), read, buffer=40)
    texts = [document.text for document in found]
    assert len(set(texts)) == 60
    assert set(texts) < TEXTS
    assert len(read) == 60 + 40
    assert {text.split(".")[0] for text in texts} == {str(shard) for shard in range(SHARDS)}
    assert texts != sorted(texts)
    assert taken(source_of(folder, kind), buffer=40) == found
    assert [document.text for document in taken(source_of(folder, kind, seed=1), buffer=40)] != texts


def test_where_there_are_fewer_all_are_taken(tmp_path: Path, kind: str) -> None:
    found = taken(source_of(write(tmp_path / "corpus", kind), kind, documents=5000))
    texts = [document.text for document in found]
    assert sorted(texts) == sorted(TEXTS)
    by_row = [text.split(".")[1] for text in texts]
    assert by_row != sorted(by_row, key=int), "the order of a file is not that of the sample"


def test_rows_whose_other_fields_differ_in_type_are_sampled_as_they_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = [
        {"text": None, "meta": {"x": 1}},
        {"text": "2020-01-01", "meta": "s"},
        {"text": "a\u2028line", "only": "here"},
        {"text": "half \ud800 a pair"},
    ]
    for number, row in enumerate(rows):
        (folder / f"{number}.jsonl").write_text("\n" + json.dumps(row) + "\n\n")
    source = TextLocal(label="corpus", kind="web", path=folder, documents=9, seed=0)
    every = TextLocal(label="corpus", kind="web", path=folder)
    state = ResumableRun("fetch_inputs", {}, [])
    with state:
        sampled = {document.text for document in read_documents(source, tmp_path, state)}
        assert sampled == {document.text for document in read_documents(every, tmp_path, state)}
        assert len(sampled) == 4
        (folder / "0.jsonl").write_text('{"text": \n')
        with pytest.raises(InputError, match=r"corpus.*row 0 of the sample: not valid JSON"):
            read_documents(source, tmp_path, state)


def test_another_seed_takes_other_rows_of_a_single_file(tmp_path: Path) -> None:
    file = write(tmp_path / "corpus", "jsonl") / "0.jsonl"
    one, other = ({d.text for d in taken(source_of(file, "jsonl", documents=ROWS // 4, seed=s))} for s in (0, 1))
    assert len(one) == len(other) == ROWS // 4
    assert one != other


@pytest.mark.parametrize("after", [1, 3])
def test_killed_and_run_again_a_sample_ends_as_undisturbed(
    tmp_path: Path, kind: str, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(write(tmp_path / "corpus", kind), kind, documents=100)
    undisturbed_reads: list[int] = []
    undisturbed = taken(source, undisturbed_reads, buffer=30, save_every=25)
    saves, real = 0, ResumableRun.save

    def save(self: ResumableRun, state: dict[str, Any]) -> None:
        nonlocal saves
        real(self, state)
        saves += 1

    def stream(*arguments: Any) -> Any:
        return Dying(real_open(*arguments), lambda: saves >= after)

    real_open = module.open_stream
    with monkeypatch.context() as patch:
        patch.setattr(ResumableRun, "save", save)
        patch.setattr(module, "open_stream", stream)
        with pytest.raises(Killed):
            taken(source, buffer=30, save_every=25)
    (state,) = (tmp_path / ".resume").glob("*/state.pt")
    assert state.exists()
    read: list[int] = []
    assert taken(source, read, buffer=30, save_every=25) == undisturbed
    assert read == undisturbed_reads[25 * after :]
    assert list((tmp_path / ".resume").glob("*/*")) == []


class Dying:
    """A stream that ends the process ten rows after a state was saved, with lines written that the state has not."""

    def __init__(self, stream: Any, due: Any) -> None:
        self._stream, self._due = stream, due

    def state_dict(self) -> Any:
        return self._stream.state_dict()

    def __iter__(self) -> Iterator[Any]:
        late = 0
        for row in self._stream:
            late += self._due()
            if late > 10:
                raise Killed
            yield row


def test_other_shards_are_another_sample(tmp_path: Path) -> None:
    """A state of shards that changed meanwhile is not gone on from."""
    folder = write(tmp_path / "corpus", "jsonl")
    source = source_of(folder, "jsonl")
    with ResumableRun("fetch_inputs", {}, []) as state:
        first = list(sample(source, state, buffer=20))
        for file in folder.iterdir():
            file.write_text(file.read_text().replace(".", ".new."))
        second = list(sample(source, state, buffer=20))
    assert all("new" in document.text for document in second)
    assert not any("new" in document.text for document in first)


def test_a_source_samples_where_it_says_documents(tmp_path: Path, kind: str) -> None:
    source = source_of(write(tmp_path / "corpus", kind), kind)
    with ResumableRun("fetch_inputs", {}, []) as state:
        found = list(read_documents(source, tmp_path, state))
        everything = list(read_documents(source_of(tmp_path / "corpus", kind, documents=0), tmp_path, state))
    assert len({document.id for document in found}) == 60
    assert [document.text for document in everything[:2]] == ["0.0", "0.1"]
    assert len(everything) == SHARDS * ROWS


def test_files_of_two_kinds_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "corpus", "jsonl")
    (folder / "more.txt").write_text("text")
    with pytest.raises(InputError, match=r"corpus: documents = 60 samples rows of .jsonl or of .parquet, but there is"):
        taken(source_of(folder, "jsonl"))
