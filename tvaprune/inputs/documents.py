"""Documents of plain text, and the files that hold them."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvaprune.artifacts import read_json_lines
from tvaprune.inputs.sources import InputError, TextField


@dataclass(frozen=True)
class Document:
    """One text."""

    id: str  # unique in its source
    text: str
    title: str | None = None  # of an article, where the source has one


Tidy = Callable[[str], str]  # what is done to a text when it is read: `plain` or `clean`
TEXT_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet", ".arrow")


def text_files(path: Path, suffixes: Sequence[str] = TEXT_SUFFIXES) -> list[Path]:
    """A file, or all files with these suffixes below a directory, in name order."""
    if not path.exists():
        raise InputError(f"{path}: no such file or directory")
    found = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    if not (files := [file for file in found if file.name.lower().endswith(tuple(suffixes))]):
        raise InputError(f"{path}: no file that ends in {', '.join(suffixes)}")
    return files


def read_rows(file: Path) -> Iterator[Any]:
    """The rows of a .jsonl, .jsonl.gz or .parquet file, or of an .arrow file as `datasets` saves it."""
    kind = file.suffix.lower()
    if kind not in (".parquet", ".arrow"):
        yield from read_json_lines(file)
        return
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]

    try:
        if kind == ".parquet":
            for batch in parquet.ParquetFile(file).iter_batches():
                yield from batch.to_pylist()
        else:
            with pyarrow.OSFile(str(file)) as opened:
                for batch in pyarrow.ipc.open_stream(opened):
                    yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{file}: damaged {kind} file: {error}") from error


def read_text(file: Path) -> str:
    """A file's text, UTF-8. Raises InputError, which names the file and the place, if it is not."""
    try:
        return file.read_text(encoding="utf-8-sig")  # without a byte order mark
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 at byte {error.start:,}; convert the file, or leave it out") from error


def field_of(row: Any, text_field: TextField, where: str) -> str:
    """The text in a field, or in several with an empty line between; null is an empty text.

    Raises InputError, which names the fields there are.
    """
    if not isinstance(text_field, str):
        return "\n\n".join(field_of(row, one, where) for one in text_field)
    if not isinstance(row, dict):
        raise InputError(f"{where}: of type {type(row).__name__}, not an object with the field {text_field!r}")
    if text_field not in row:
        raise InputError(f"{where}: no field {text_field!r}; it has {', '.join(sorted(row))}")
    text = row[text_field]
    if text is not None and not isinstance(text, str):
        raise InputError(f"{where}: field {text_field!r} is of type {type(text).__name__}, not text")
    return text or ""


def document_of(row: Any, text_field: TextField, where: str, default_id: str, tidy: Tidy) -> Document:
    """A row's text, after `tidy`; its `id` and `title` where it has them."""
    text, title = field_of(row, text_field, where), row.get("title")
    title = title if isinstance(title, str) and normalise_title(title) else None
    return Document(id=str(row.get("id", default_id)), text=tidy(text), title=title)


def plain(text: str) -> str:
    """Plain line ends, and no empty lines around the text; what is inside stays, indentation too."""
    # Half a surrogate pair, as scraped text has, becomes a replacement character: no file could hold it.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return re.sub(r"\A(?:[^\S\n]*\n)+", "", text.replace("\r\n", "\n").replace("\r", "\n")).rstrip()


def clean(text: str) -> str:
    """As `plain`, with single spaces, no indentation, and at most one empty line in a row: for prose."""
    text = re.sub(r"[^\S\n]+", " ", plain(text))
    return re.sub(r" *\n *", "\n", re.sub(r"\n\s*\n", "\n\n", text)).strip()


def normalise_title(title: str) -> str:
    """Lower case, single spaces, no underscores: titles of the same article become equal."""
    return " ".join(title.replace("_", " ").split()).casefold()


def drop_known(documents: Iterable[Document], titles: set[str], texts: set[str]) -> tuple[list[Document], int, int]:
    """Leave out empty documents, articles whose normalised title is known, and known texts; kept ones become known.

    Returns the kept documents, the number left out for their title, and for being empty or a repetition.
    """
    kept, same_title, repeated = [], 0, 0
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
    """What `write_documents` wrote: source name (the file's stem) -> its documents.

    Raises InputError: there are no files, or a line has no text.
    """
    if not (files := sorted(directory.glob("*.jsonl"))):
        raise InputError(f"{directory}: no .jsonl file; run the fetch_inputs stage")
    fields = ("id", "text")
    return {
        file.stem: [
            Document(*(field_of(row, name, f"{file}, document {number}") for name in fields))
            for number, row in enumerate(read_json_lines(file), start=1)
        ]
        for file in files
    }


def load_texts(directory: Path) -> dict[str, list[str]]:
    """As `load_documents`, the texts alone."""
    return {name: [document.text for document in own] for name, own in load_documents(directory).items()}
