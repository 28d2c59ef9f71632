"""The text of the evaluation sets, in the pieces that a model reads."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tvaprune.artifacts import read_json_lines
from tvaprune.inputs.documents import load_documents
from tvaprune.inputs.sources import InputError


@dataclass(frozen=True)
class EvaluationDocument:
    """One document or row, in the pieces that a model is scored on."""

    name: str  # unique in its set
    pieces: list[str]


def evaluation_documents(heldout: Path, zeroshot: Path) -> dict[str, Iterable[EvaluationDocument]]:
    """Every evaluation set: `heldout_LABEL` for each text, and the zero-shot tasks by their names.

    All of it, because the parameters of the evaluation decide which windows and rows are measured.

    Raises:
        InputError: a file is absent or damaged; names it.
    """
    texts: dict[str, Iterable[EvaluationDocument]] = {
        f"heldout_{name}": [EvaluationDocument(document.id, [document.text]) for document in documents]
        for name, documents in load_documents(heldout).items()
    }
    for task in _PIECES:
        if not (zeroshot / f"{task}.jsonl").is_file():
            raise InputError(f"{zeroshot / task}.jsonl: no such file; run the fetch_inputs stage")
    return texts | {task: _task_rows(zeroshot / f"{task}.jsonl") for task in _PIECES}


def _task_rows(path: Path) -> Iterator[EvaluationDocument]:
    for number, row in enumerate(read_json_lines(path), start=1):
        try:
            yield EvaluationDocument(f"line {number}", _PIECES[path.stem](row))
        except (KeyError, TypeError) as error:
            message = f"{path}, line {number}: missing or wrong column {error}; run the fetch_inputs stage"
            raise InputError(message) from error


# What a model reads of a row, once with each answer that is scored; without the prompt's own words.
_PIECES = {
    "boolq": lambda row: [row["passage"], row["question"]],
    "piqa": lambda row: [f"{row['goal']} {row[solution]}" for solution in ("sol1", "sol2")],
    "hellaswag": lambda row: [f"{row['ctx_a']} {row['ctx_b']} {ending}" for ending in row["endings"]],
    "winogrande": lambda row: [row["sentence"].replace("_", row[option]) for option in ("option1", "option2")],
    "arc_easy": lambda row: [f"{row['question']} {choice}" for choice in row["choices"]["text"]],
}
_PIECES["arc_challenge"] = _PIECES["arc_easy"]
