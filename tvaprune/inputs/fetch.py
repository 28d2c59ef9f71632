"""Fetch every input and put each directory into place complete, or not at all."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tvaprune.artifacts import write_json
from tvaprune.inputs.documents import Document, drop_known, normalise_title, write_documents
from tvaprune.inputs.model import SOURCE_FILE, fetch_model
from tvaprune.inputs.sources import InputError, Source, describe
from tvaprune.inputs.texts import read_documents
from tvaprune.inputs.zeroshot import fetch_tasks
from tvaprune.resume import SavedState


def fetch_inputs(
    *,
    model: Source,
    calibration: Mapping[str, Source],
    heldout: Mapping[str, Source],
    zeroshot: Source,
    exclude_heldout: bool,
    state: SavedState,
    model_directory: Path,
    calibration_directory: Path,
    heldout_directory: Path,
    zeroshot_directory: Path,
) -> dict[str, Any]:
    """Write the model, the calibration text, the held-out text and the zero-shot tasks.

    Args:
        calibration, heldout: name of the source (of its file) -> the source.
        exclude_heldout: leave out of the calibration text every article whose title, and every document whose
            text, is in the held-out text.
        state: of samples, to go on from after a kill.

    Returns:
        For each of the four directories what was written, as in its meta.json.

    Raises:
        InputError: an input cannot be fetched, or is not the expected one.
    """
    written: dict[str, Any] = {}
    with _workspace(model_directory) as (partial, temporary):
        written["model"] = fetch_model(model, partial, temporary)
        write_json(partial / SOURCE_FILE, written["model"])
    titles: set[str] = set()
    texts: set[str] = set()
    with _workspace(heldout_directory) as (partial, temporary):
        written["heldout"] = _fetch_texts(heldout, partial, temporary, state, titles, texts, collect=True)
    if not exclude_heldout:
        titles, texts = set(), set()
    with _workspace(calibration_directory) as (partial, temporary):
        written["calibration"] = _fetch_texts(calibration, partial, temporary, state, titles, texts, collect=False)
    with _workspace(zeroshot_directory) as (partial, temporary):
        rows = fetch_tasks(zeroshot, partial, temporary)
        written["zeroshot"] = {**describe(zeroshot), "rows": rows}
        write_json(partial / "meta.json", written["zeroshot"])
    return written


def _fetch_texts(
    sources: Mapping[str, Source],
    partial: Path,
    temporary: Path,
    state: SavedState,
    titles: set[str],
    texts: set[str],
    *,
    collect: bool,
) -> dict[str, Any]:
    """Write one .jsonl for each source. `collect`: add the titles instead of leaving them out."""
    meta: dict[str, Any] = {}
    for name, source in sources.items():
        kept, same_title, repeated = drop_known(
            read_documents(source, temporary / name, state), set() if collect else titles, texts
        )
        if not kept:
            raise InputError(f"{name}: the source gave no document with text")
        write_documents(partial / f"{name}.jsonl", kept)
        if collect:
            titles.update(_titles(kept))
        counts = {"documents": len(kept), "characters": sum(len(document.text) for document in kept)}
        left_out = {"left_out_as_heldout_title": same_title, "left_out_as_empty_or_repeated": repeated}
        meta[name] = {**describe(source), **counts, **left_out}
        print(f"{name}: {len(kept)} documents, {counts['characters']} characters", flush=True)
    write_json(partial / "meta.json", {"sources": meta})
    return meta


def _titles(documents: list[Document]) -> set[str]:
    return {normalise_title(document.title) for document in documents if document.title is not None}


@contextmanager
def _workspace(directory: Path) -> Iterator[tuple[Path, Path]]:
    """Two folders beside `directory`: one that becomes it when the block ends without error, one that is dropped."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.parent / f".{directory.name}.partial"
    temporary = directory.parent / f".{directory.name}.download"
    for folder in (partial, temporary):
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        folder.mkdir()
    try:
        yield partial, temporary
        if directory.exists():
            shutil.rmtree(directory)
        partial.rename(directory)
    finally:
        for folder in (partial, temporary):
            shutil.rmtree(folder, ignore_errors=True)
