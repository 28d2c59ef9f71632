"""The tasks' rows have what lm-eval's own definitions read."""

import gzip
import json
from pathlib import Path
from typing import Any, get_args

import pytest

from tvaprune.inputs.sources import InputError, LocalSource, TaskHub
from tvaprune.inputs.zeroshot import TASKS, fetch_tasks, read_requests
from tvaprune.options.inputs import TaskName

ARC = {"id": "q1", "question": "Why?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"}
ROWS: dict[str, dict[str, Any]] = {
    "boolq": {"question": "is it", "passage": "It is.", "answer": True},
    "piqa": {"goal": "g", "sol1": "s1", "sol2": "s2", "label": 1},
    "hellaswag": {"activity_label": "A", "ctx_a": "a", "ctx_b": "b", "endings": ["x", "y"], "label": "1", "ind": 5},
    "winogrande": {"sentence": "A _ b.", "option1": "x", "option2": "y", "answer": "2"},
    "arc_easy": ARC,
    "arc_challenge": ARC,
}


def write_tasks(folder: Path, rows: dict[str, dict[str, Any]]) -> LocalSource:
    folder.mkdir(exist_ok=True)
    for name, row in rows.items():
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    return LocalSource(path=folder)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_same_tasks_can_be_asked_for_fetched_and_measured() -> None:
    from tvaprune.measures import zeroshot as measured

    assert get_args(TaskName) == tuple(TASKS) == measured.TASKS


def test_rows_come_in_lm_evals_columns_and_again_the_same(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "again").mkdir()
    source = write_tasks(tmp_path / "in", ROWS)
    assert fetch_tasks(source, tmp_path / "out", tmp_path) == dict.fromkeys(TASKS, 1)
    assert read(tmp_path / "out" / "boolq.jsonl") == [{"question": "is it", "passage": "It is.", "label": 1}]
    (row,) = read(tmp_path / "out" / "hellaswag.jsonl")
    assert sorted(row) == ["activity_label", "ctx_a", "ctx_b", "endings", "label"]
    # what was written is itself a local source
    fetch_tasks(LocalSource(path=tmp_path / "out"), tmp_path / "again", tmp_path)
    for name in TASKS:
        assert (tmp_path / "again" / f"{name}.jsonl").read_bytes() == (tmp_path / "out" / f"{name}.jsonl").read_bytes()


def test_the_hub_is_asked_for_lm_evals_repositories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def load_dataset(repo: str, config: str | None, *, split: str, revision: str) -> list[dict[str, Any]]:
        name = next(name for name, task in TASKS.items() if (task.repo, task.config) == (repo, config))
        asked[name] = (split, revision)
        return [ROWS[name]]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    fetch_tasks(TaskHub(), tmp_path, tmp_path)
    assert asked["arc_easy"] == ("test", "main")
    assert asked["boolq"] == ("validation", "main")


def test_requests_become_one_question_each(tmp_path: Path) -> None:
    def request(native_id: str, answer: str) -> dict[str, Any]:
        content = {"id": native_id, "query": "Question: Why?\nAnswer:", "choices": ["x", "y", "z"], "gold": 2}
        return {"native_id": native_id, "doc": content, "request": {"continuation": answer}}

    path = tmp_path / "requests.jsonl.gz"
    with gzip.open(path, "wt") as file:
        for native_id in ("one", "two"):
            for answer in ("x", "y", "z"):
                file.write(json.dumps(request(native_id, answer)) + "\n")
    assert list(read_requests(path)) == [
        {
            "id": native_id,
            "question": "Why?",
            "choices": {"text": ["x", "y", "z"], "label": ["A", "B", "C"]},
            "answerKey": "C",
        }
        for native_id in ("one", "two")
    ]


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    source = write_tasks(tmp_path / "in", {**ROWS, "piqa": {"goal": "g", "sol1": "s", "label": 0}})
    with pytest.raises(InputError, match="piqa row 0: missing or wrong column: 'sol2'"):
        fetch_tasks(source, tmp_path / "out", tmp_path)


def test_a_missing_task_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    source = write_tasks(tmp_path / "in", {name: row for name, row in ROWS.items() if name != "winogrande"})
    with pytest.raises(InputError, match=r"winogrande.jsonl: no such file"):
        fetch_tasks(source, tmp_path / "out", tmp_path)
