"""A seeded sample of a corpus too large to read: shards in random order, rows through a bounded shuffle buffer.

Hub data sets and local shards alike, by the streams of `datasets`. The same seed, revision and shards give the same
sample, and a run that was killed goes on where it was.
"""

import hashlib
import json
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tvaprune.inputs.documents import Document, read_rows
from tvaprune.inputs.sources import HubSource, InputError, LocalSource
from tvaprune.resume import SavedState

# Rows in the shuffle buffer, or as many as are asked for, if those are fewer: so many more rows are read than taken.
_BUFFER = 10_000
# Shards that are read in turns: a data set's shards can each be of one kind.
_SHARDS_AT_ONCE = 10
_SAVE_EVERY = 2_000

ToDocument = Callable[[Any, int], Document]


def open_stream(source: HubSource | LocalSource, files: list[Path]) -> Any:
    """The rows, a few shards in turns and these in an order by the seed; nothing is read yet.

    Args:
        files: of a local source, all .jsonl or all .parquet.

    Raises:
        InputError: the hub did not give it, or the files are of two kinds, or texts, which have no rows.
    """
    from datasets import load_dataset

    if isinstance(source, HubSource):
        try:
            rows = load_dataset(
                source.repo, source.config, split=source.split, revision=source.revision, streaming=True
            )
        except (OSError, ConnectionError) as error:
            raise InputError(f"{source.repo} at {source.revision}: the hub did not give it: {error}") from error
    else:
        kinds = {file.suffix for file in files}
        if kinds not in ({".jsonl"}, {".parquet"}):
            raise InputError(
                f"{source.path.name}: documents = {source.documents} samples rows of .jsonl or of .parquet, but there "
                f"is {', '.join(sorted(kinds))}; name a folder of one kind, or leave documents out to read all"
            )
        builder = {".jsonl": "json", ".parquet": "parquet"}[kinds.pop()]
        rows = load_dataset(builder, data_files=[str(file) for file in files], split="train", streaming=True)
    # It warns that a buffer's rows are lost on going on; this one holds none, ours are kept below.
    logging.getLogger("datasets.iterable_dataset").setLevel(logging.ERROR)
    return rows.shuffle(seed=source.seed, buffer_size=1, max_buffer_input_shards=_SHARDS_AT_ONCE)


def sample(
    source: HubSource | LocalSource,
    files: list[Path],
    to_document: ToDocument,
    state: SavedState,
    buffer: int = _BUFFER,
    save_every: int = _SAVE_EVERY,
) -> Iterator[Document]:
    """`source.documents` documents in a seeded random order; fewer where there are fewer.

    Every row goes into a buffer, and once that is full another, chosen by the seed and the row's number, leaves it.
    What has left is in a file of `state.directory`, whole once the sample is.

    Args:
        to_document: a row and its number in the stream.
        buffer: rows to hold at most.
        save_every: rows between two saved states.
    """
    key = hashlib.sha256(repr((type(source), astuple(source), _identity(files))).encode()).hexdigest()[:24]
    taken = state.directory / f"{key}.jsonl"
    if not taken.exists():
        _take(source, files, to_document, state, key, taken, min(buffer, source.documents), save_every)
    for row in read_rows(taken):
        yield Document(**row)


def _take(
    source: HubSource | LocalSource,
    files: list[Path],
    to_document: ToDocument,
    state: SavedState,
    key: str,
    taken: Path,
    buffer: int,
    save_every: int,
) -> None:
    """Write the sample to `taken`, going on from the state if it is this sample's."""
    stream, number, held, done, length = open_stream(source, files), 0, [], 0, 0
    saved = state.load()
    unfinished = taken.with_suffix(".unfinished")
    if saved is not None and saved["key"] == key and unfinished.exists():
        number, held, done, length = saved["number"], saved["held"], saved["done"], saved["length"]
        stream.load_state_dict(saved["stream"])
    with (
        unfinished.open("ab") as file,
        tqdm(desc=f"sample {taken.stem[:6]}", total=source.documents, initial=done, unit=" documents") as bar,
    ):
        file.truncate(length)  # what was written after the state was saved comes again
        for row in stream:
            document = to_document(row, number)
            fields = {"id": document.id, "text": document.text, "title": document.title}
            place = random.Random(f"{source.seed} {number}").randrange(buffer)
            number += 1
            if len(held) < buffer:
                held.append(fields)
            else:
                held[place], fields = fields, held[place]
                file.write(_line(fields))
                done += 1
                bar.update()
            if done == source.documents:
                break
            if number % save_every == 0:
                file.flush()
                state.save(
                    {
                        "key": key,
                        "stream": stream.state_dict(),
                        "number": number,
                        "held": held,
                        "done": done,
                        "length": file.tell(),
                    }
                )
        random.Random(source.seed).shuffle(held)
        for fields in held[: source.documents - done]:
            file.write(_line(fields))
    unfinished.replace(taken)


def _line(fields: dict[str, str | None]) -> bytes:
    return json.dumps(fields, ensure_ascii=False).encode() + b"\n"


def _identity(files: list[Path]) -> list[tuple[str, int, int]]:
    """Names, sizes and times of local shards: other contents are another sample."""
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
