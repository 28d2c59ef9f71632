"""Fetch every input. A directory is replaced when its new content is complete, or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvaprune.artifacts import write_json
from tvaprune.inputs.documents import drop_known, normalise_title, write_documents
from tvaprune.inputs.model import fetch_model
from tvaprune.inputs.sources import InputError, ModelSource, TaskSource, TextSource, describe
from tvaprune.inputs.texts import read_documents
from tvaprune.inputs.zeroshot import fetch_tasks
from tvaprune.resume import SavedState


@dataclass(frozen=True)
class InputDirectories:
    """Where each input is written."""

    model: Path
    calibration: Path
    heldout: Path
    zeroshot: Path


def fetch_inputs(
    model: ModelSource,
    calibration: list[TextSource],
    heldout: list[TextSource],
    zeroshot: TaskSource,
    directories: InputDirectories,
    *,
    exclude_heldout: bool,
    state: SavedState,
) -> dict[str, Any]:
    """Write the model, the texts (one LABEL.jsonl a source) and the zero-shot tasks; return what was written.

    `exclude_heldout` leaves out of the calibration text every article whose title, and every document whose text, is in
    the held-out text. `state` is the progress of samples, which a killed run continues from. Raises InputError if an
    input cannot be fetched or is another.
    """
    written: dict[str, Any] = {}
    with _workspace(directories.model) as folders:
        written["model"] = fetch_model(model, *folders)
    with _workspace(directories.heldout) as folders:
        texts: set[str] = set()
        written["heldout"], titles = _fetch_texts(heldout, *folders, state, set(), texts)
    if not exclude_heldout:
        titles, texts = set(), set()
    with _workspace(directories.calibration) as folders:
        written["calibration"], _ = _fetch_texts(calibration, *folders, state, titles, texts)
    with _workspace(directories.zeroshot) as (partial, temporary):
        written["zeroshot"] = {**describe(zeroshot), "rows": fetch_tasks(zeroshot, partial, temporary)}
        write_json(partial / "meta.json", written["zeroshot"])
    return written


def _fetch_texts(
    sources: list[TextSource], partial: Path, temporary: Path, state: SavedState, titles: set[str], texts: set[str]
) -> tuple[dict[str, Any], set[str]]:
    """Write one .jsonl for each source, without known titles and texts; adds the new texts to the known ones.

    Returns what was written, by label, and the normalised titles in it.
    """
    meta: dict[str, Any] = {}
    written_titles: set[str] = set()
    for source in sources:
        name = source.label
        kept, same_title, repeated = drop_known(read_documents(source, temporary / name, state), titles, texts)
        if not kept:
            raise InputError(
                f"{name}: no document is left: {repeated} empty, repeated or held out, and {same_title} with the title "
                "of a held-out article; see fetch_inputs.calibration.exclude_heldout"
            )
        write_documents(partial / f"{name}.jsonl", kept)
        written_titles |= {normalise_title(document.title) for document in kept if document.title is not None}
        counts = {"documents": len(kept), "characters": sum(len(document.text) for document in kept)}
        left_out = {"left_out_as_heldout_title": same_title, "left_out_as_empty_or_repeated": repeated}
        meta[name] = {**describe(source), **counts, **left_out}
        print(f"{name}: {len(kept)} documents, {counts['characters']} characters", flush=True)
    write_json(partial / "meta.json", {"sources": meta})
    return meta, written_titles


@contextmanager
def _workspace(directory: Path) -> Iterator[tuple[Path, Path]]:
    """A folder that replaces `directory` when the block ends without error, and one in it for temporary files."""
    partial = directory.parent / f".{directory.name}.partial"
    temporary = partial / ".download"
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    temporary.mkdir(parents=True)
    try:
        yield partial, temporary
        shutil.rmtree(temporary)
        if directory.exists():
            shutil.rmtree(directory)
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
