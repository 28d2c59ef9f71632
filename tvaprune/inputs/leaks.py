"""Compare the evaluation text with the windows that are learned from."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tvaprune.artifacts import read_json_lines
from tvaprune.inputs.documents import load_documents
from tvaprune.inputs.ngrams import among, hash_ngrams
from tvaprune.inputs.sources import InputError
from tvaprune.inputs.zeroshot import TASKS, Task, task_files
from tvaprune.progress import Progress

# What is learned from: name -> tensors of artifacts/calibration. Validation windows choose among checkpoints.
LEARNED_FROM = {
    "calibration": ("input_ids", "validation_ids"),
    "finetuning": ("finetune_ids", "finetune_validation_ids"),
}
# Documents hashed at once; bounds memory.
_BATCH = 256
_EXAMPLES = 3


class LeakError(ValueError):
    """Evaluation text is in the text that is learned from."""


@dataclass(frozen=True)
class EvaluationDocument:
    """One document or row, in the pieces that a model is scored on."""

    name: str  # unique in its set
    pieces: list[str]


@dataclass
class Overlap:
    """What a set of evaluation documents shares with the windows of one kind."""

    ngrams: int = 0  # each counted once a document
    documents: int = 0  # those with a shared n-gram
    examples: list[str] = field(default_factory=list)  # names of the first of those


@dataclass
class Compared:
    """A set of evaluation documents, compared with the windows."""

    ngrams: int = 0  # each counted once a document
    documents: int = 0
    judged: int = 0  # documents long enough to have an n-gram
    overlaps: dict[str, Overlap] = field(default_factory=dict)  # by key of LEARNED_FROM

    def share(self, learned: str) -> float:
        """Share of the set's n-grams that are in these windows; 0 to 1."""
        return self.overlaps[learned].ngrams / max(1, self.ngrams)


@dataclass(frozen=True)
class Leaks:
    """Every evaluation set, by name; and the fine-tuning windows compared with the calibration windows."""

    sets: dict[str, Compared]
    # Share of the fine-tuning windows' n-grams. Not a leak: texts of one source share quotations.
    finetuning_in_calibration: float

    @property
    def largest(self) -> float:
        """The largest share of a set's n-grams in the windows of one kind."""
        return max(one.share(learned) for one in self.sets.values() for learned in one.overlaps)


def evaluation_documents(heldout: Path, zeroshot: Path) -> dict[str, Iterable[EvaluationDocument]]:
    """Every evaluation set: `heldout_LABEL` for each text, and the zero-shot tasks by their names.

    All rows, because the evaluation's parameters choose among them. Raises InputError, which names an unusable file.
    """
    texts: dict[str, Iterable[EvaluationDocument]] = {
        f"heldout_{name}": [EvaluationDocument(document.id, [document.text]) for document in documents]
        for name, documents in load_documents(heldout).items()
    }
    return texts | {name: _task_documents(TASKS[name], path) for name, path in task_files(zeroshot).items()}


def _task_documents(task: Task, path: Path) -> Iterator[EvaluationDocument]:
    for number, row in enumerate(read_json_lines(path), start=1):
        try:
            yield EvaluationDocument(f"line {number}", task.pieces(row))
        except (KeyError, TypeError) as error:
            raise InputError(f"{path}, line {number}: missing or wrong column {error}; run fetch_inputs") from error


def check_leaks(
    windows: Mapping[str, Int32[Tensor, "_ _"]],
    tokenizer: PreTrainedTokenizerBase,
    evaluation: Mapping[str, Iterable[EvaluationDocument]],
    n: int,
) -> Leaks:
    """Compare every evaluation set with the windows (by their names in `LEARNED_FROM`) by n-grams of `n` words.

    Words and not tokens: a window's first token depends on where it was cut, and published figures are of words.
    """
    known = {
        name: known_ngrams((text for part in parts for text in window_texts(windows[part], tokenizer)), n)
        for name, parts in LEARNED_FROM.items()
    }
    shared = among(known["finetuning"], known["calibration"])
    sets = {
        name: compare(Progress(documents, desc=f"check {name}", unit=" documents"), known, n)
        for name, documents in evaluation.items()
    }
    return Leaks(sets, float(shared.mean()) if len(shared) else 0.0)


def window_texts(windows: Int32[Tensor, "windows tokens"], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Text of windows, cut at end-of-text tokens. Without other special tokens: no n-gram around one is found."""
    for batch in windows.split(_BATCH):
        rows = (np.split(row, np.flatnonzero(row == tokenizer.eos_token_id)) for row in batch.numpy())
        pieces = [piece for row in rows for piece in row]
        yield from tokenizer.batch_decode(pieces, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def known_ngrams(texts: Iterable[str], n: int) -> UInt64[np.ndarray, " ngrams"]:
    """Hashes of all n-grams of the texts, each once, ascending."""
    parts = [np.zeros(0, np.uint64)]
    remaining = iter(texts)
    while batch := [[text] for text in islice(remaining, _BATCH)]:
        parts.append(hash_ngrams(batch, n)[0])
    return np.unique(np.concatenate(parts))


def compare(
    documents: Iterable[EvaluationDocument], known: Mapping[str, UInt64[np.ndarray, " ngrams"]], n: int
) -> Compared:
    """Count what the documents share with each of the known sets of n-grams, whose hashes ascend."""
    result = Compared(overlaps={name: Overlap() for name in known})
    remaining = iter(documents)
    while batch := list(islice(remaining, _BATCH)):
        ngrams, owner = hash_ngrams([document.pieces for document in batch], n)
        result.ngrams += len(ngrams)
        result.documents += len(batch)
        result.judged += len(np.unique(owner))
        for name, overlap in result.overlaps.items():
            shared = among(ngrams, known[name])
            leaked = np.unique(owner[shared])
            overlap.ngrams += int(shared.sum())
            overlap.documents += len(leaked)
            overlap.examples += [batch[index].name for index in leaked[: _EXAMPLES - len(overlap.examples)]]
    return result


def check_limit(leaks: Leaks, n: int, max_overlap: float) -> None:
    """Raise LeakError for the sets with more than `max_overlap` of their n-grams in the windows of one kind."""
    lines = []
    for name, compared in leaks.sets.items():
        for learned, overlap in compared.overlaps.items():
            if compared.share(learned) > max_overlap:
                examples = ", ".join(overlap.examples) + (", ..." if overlap.documents > len(overlap.examples) else "")
                lines.append(
                    f"  {name}: {compared.share(learned):.4f} of its {n}-grams are in the {learned} windows, from "
                    f"{overlap.documents} of {compared.documents} documents ({examples})"
                )
    if lines:
        raise LeakError(
            "evaluation text is in the text that is learned from; "
            f"check_leaks.max_overlap = {max_overlap} is exceeded:\n" + "\n".join(lines) + "\n"
            "take that text out of fetch_inputs.calibration (exclude_heldout does so for whole articles), evaluate "
            "on other text, or raise check_leaks.max_overlap and report the overlap with the results"
        )


def short_texts(leaks: Leaks, n: int) -> list[str]:
    """What to tell the user of sets whose documents are mostly too short to be compared."""
    return [
        f"{name}: {one.documents - one.judged} of {one.documents} documents have fewer than {n} words, so nothing was "
        "compared of them; lower check_leaks.ngram"
        for name, one in leaks.sets.items()
        if one.judged < one.documents / 2
    ]


def report(leaks: Leaks, n: int, declared: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics, numbers alone; `declared` is from `declare_sources`."""
    sets: dict[str, Any] = {}
    for name, one in leaks.sets.items():
        sets[name] = {"ngrams": one.ngrams, "documents": one.documents, "documents_judged": one.judged}
        for learned, overlap in one.overlaps.items():
            document_share = overlap.documents / max(1, one.documents)
            sets[name][f"in_{learned}"] = {"ngram_share": one.share(learned), "document_share": document_share}
    own = {"finetuning_in_calibration": leaks.finetuning_in_calibration}
    return {"ngram": n, "largest_overlap": leaks.largest, **declared, **own, "sets": sets}


def declare_sources(windows: Mapping[str, Mapping[str, int]], calibration: Path, heldout: Path) -> dict[str, Any]:
    """Which text was learned from: by key of `LEARNED_FROM`, `windows` by source, and `same_kind` by held-out text.

    `same_kind` is 1 if one of these sources has the held-out text's kind, whatever package it comes from, else 0.
    `windows` comes from meta.json: tensor -> source -> windows.
    """
    learned, measured = _kinds(calibration), _kinds(heldout)
    declared: dict[str, Any] = {}
    for name, parts in LEARNED_FROM.items():
        counts = {source: sum(windows[part][source] for part in parts) for source in windows[parts[0]]}
        kinds = {learned[source] for source, count in counts.items() if count}
        declared[name] = {"same_kind": {text: int(kind in kinds) for text, kind in measured.items()}, "windows": counts}
    return declared


def _kinds(directory: Path) -> dict[str, str]:
    """Source -> its kind of text."""
    sources = json.loads((directory / "meta.json").read_text())["sources"]
    return {label: one["kind"] for label, one in sources.items()}
