"""Measuring on a GPU in parts: every part at tiny shapes on a CPU, kills, limits, failures, tables."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from typer.testing import CliRunner

from stages._command import application
from tests.part_of_steps import HANGING, ORDERED, STEPS, Settings, work
from tools import measure_gpu
from tools.gpu import parts, whole
from tools.gpu.parts import PARTS
from tools.gpu.resumable import DONE, FAILED, NOT_RUN, OVER, UNFINISHED, NotPossibleError, Results, run_part
from tools.gpu.speed import without
from tools.gpu.tables import tables
from tools.gpu.training import card_of
from tvaprune.architecture.topology import Topology

REPOSITORY = Path(__file__).resolve().parents[2]
WAIT_S = 300
MACHINE = {"device": "Some Card", "torch": "2"}


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> parts.Settings:
    monkeypatch.chdir(REPOSITORY)
    return parts.Settings(tiny=True, runtime="auto", work=tmp_path / "work", vllm=None)


def measured(directory: Path, name: str, settings: parts.Settings, steps: tuple[str, ...]) -> Results:
    """Steps of a part as its process measures them."""
    results = Results(directory, PARTS[name], settings.recorded())
    for step in steps:
        figures = parts.measure(name, step, settings)
        results.end(step, {"state": DONE, "figures": figures, "seconds": 1.0, "made_on": MACHINE})
    return Results(directory, PARTS[name], settings.recorded())


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("decode", ("Mistral-7B, batch 1", "Llama-3-8B, batch 16")),
        ("multiples", ("batch 1",)),
        ("axes", tuple(f"{axis}, batch 64" for axis in parts.AXES)),
    ],
)
def test_a_part_of_speeds_has_a_row_for_each_model_and_phase(
    tmp_path: Path, tiny: parts.Settings, name: str, steps: tuple[str, ...]
) -> None:
    limits = measured(tmp_path, "bandwidth", tiny, PARTS["bandwidth"].steps)
    results = measured(tmp_path, name, tiny, steps)
    assert set(steps) <= set(results.part.steps)
    text = tables([limits, results])
    assert text.count("Some Card, torch 2") == 2
    found = [row for row in rows(text) if len(row) > 2][1:]
    models = ["dense", *map(str, (1, 8, 16, 32, 64, 128) if name == "multiples" else (0.2, 0.5))]
    phases = [(f"{step}, {phase}", model) for step in steps for phase in ("prefill of 8", "decode") for model in models]
    assert [(row[0], row[1]) for row in found] == phases
    for row in found:
        assert float(row[6]) > 0
        assert row[8] == "1.00×" or row[1] != "dense"
        assert float(row[11]) >= 0
        assert (row[1] == "dense") == (row[2] == "0.000")


def test_steps_of_training_are_compared_with_steps_without(tmp_path: Path, tiny: parts.Settings) -> None:
    steps = ("80 GB, learn_masks", "24 GB, finetune_lora")
    gates, lora = rows(tables([measured(tmp_path, "steps", tiny, steps)]))[1:]
    assert (gates[0], lora[0]) == steps
    for row, reason in ((gates, "gates"), (lora, "a teacher")):
        without = float(row[2].removesuffix(f" without {reason}"))
        assert float(row[3]) == pytest.approx(float(row[1]) / without, rel=0.05)
        assert float(row[5]) > 0
        assert float(row[6]) > 0


def in_process(stage: str, root: Path) -> dict[str, Any]:
    """A stage, without the seconds that a new Python takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        done = CliRunner().invoke(application(importlib.import_module(f"stages.{stage}").main), [])
    assert done.exit_code == 0, (stage, done.output, done.exception)
    return {"seconds": 1.0, "host_memory_bytes": 10**9}


@pytest.mark.nightly
def test_the_whole_run_goes_through_the_stages(
    tmp_path: Path, tiny: parts.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: list[str] = []
    monkeypatch.setattr(whole, "run_stage", lambda stage, root: run.append(stage) or in_process(stage, root))
    steps = PARTS["whole"].steps
    results = measured(tmp_path, "whole", tiny, steps[-1:])  # on a machine that has nothing of the steps before
    assert run == list(steps[1:])
    speed = json.loads((whole.workspace(tiny) / "metrics" / "speed.json").read_text())
    assert {"dense", "compact", "finetuned"} <= set(speed["models"])
    assert [row[0] for row in rows(tables([results]))] == ["stage", "benchmark_speed", "all"]
    measured(tmp_path, "whole", tiny, steps[:2])
    assert run[-1] == steps[1]
    assert len(run) == len(steps)


def test_a_stage_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)stages.update_weights ended with status 1:.*error: params\.yaml"):
        whole.run_stage("update_weights", tmp_path)


@pytest.mark.parametrize(("name", "reason"), [("tests", "no CUDA device"), ("vllm", "no interpreter")])
def test_what_the_machine_lacks_is_said(
    tiny: parts.Settings, name: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NotPossibleError, match=reason):
        parts.measure(name, PARTS[name].steps[0], tiny)


def test_the_figures_name_machine_versions_and_code() -> None:
    found = parts.made_on()
    assert found["torch"] == torch.__version__.partition("+")[0] or found["torch"] == torch.__version__
    assert {"device", "transformers", "peft", "commit", "code"} <= set(found)
    assert all(found.values())


def test_one_axis_loses_its_share_and_the_others_nothing() -> None:
    topology = Topology(layers=32, hidden=4096, intermediate=14336, kv_heads=8, group_size=4, head_dim=128)
    for share in (0.2, 0.5):
        found = {axis: without(topology, axis, share, 128) for axis in parts.AXES}
        for axis in ("hidden", "intermediate", "kv_heads"):
            kept = {name: sum(w) if isinstance(w, list) else w for name, w in found[axis]._asdict().items()}
            dense = {"hidden": 4096, "intermediate": 32 * 14336, "kv_heads": 32 * 8}
            assert kept[axis] / dense[axis] == pytest.approx(1 - share, abs=0.02)
            assert all(kept[name] == dense[name] for name in dense if name != axis)
        layers = found["layers"]
        assert sum(width == 0 for width in layers.intermediate) == sum(n == 0 for n in layers.kv_heads)
        assert sum(width == 0 for width in layers.intermediate) == round(share * 32)
        assert layers.kv_heads[0] > 0


def test_a_card_limits_a_gpu_and_leaves_a_cpu_alone() -> None:
    with card_of(torch.device("cpu"), 24):
        assert torch.ones(1)[0] == 1


def test_steps_that_fail_end_their_process_or_cannot_run_lose_no_other(tmp_path: Path) -> None:
    results = run_part(tmp_path, STEPS, Settings(), work, WAIT_S)
    states = {step: results.state_of(step) for step in STEPS.steps}
    assert states == {"good": DONE, "lacking": NOT_RUN, "wrong": FAILED, "deadly": FAILED, "last": DONE}
    assert results.state == FAILED
    written = json.loads((tmp_path / "steps.json").read_text())
    assert written["state"] == FAILED
    assert written["steps"]["good"]["figures"] == {"value": "good"}
    assert written["steps"]["wrong"]["error"] == "KeyError: 'cause'"
    assert written["steps"]["deadly"]["error"] == "its process ended, status 3"
    assert set(results.left()) == {"lacking", "wrong", "deadly"}


def test_a_part_at_its_limit_is_recorded_and_tried_last_in_the_next_call(tmp_path: Path) -> None:
    results = run_part(tmp_path, HANGING, Settings(), work, limit_s=1)
    assert results.state_of("hangs") == OVER
    assert results.state == OVER
    assert results.steps["hangs"]["error"] == "the part's limit of 1 s"
    assert results.left() == ["after", "hangs"]
    assert run_part(tmp_path, ORDERED, Settings(), work, WAIT_S).state == FAILED  # the next part runs


def test_a_failure_ends_a_part_whose_steps_need_each_other(tmp_path: Path) -> None:
    results = run_part(tmp_path, ORDERED, Settings(), work, WAIT_S)
    assert [results.state_of(step) for step in ORDERED.steps] == [DONE, FAILED, UNFINISHED]
    assert results.left() == ["wrong", "last"]


def test_figures_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    Results(tmp_path, STEPS, Settings().recorded()).end("good", {"state": DONE, "seconds": 1})
    with pytest.raises(ValueError, match=r"steps\.json: made with .*use another directory"):
        Results(tmp_path, STEPS, asdict(Settings("other")))


def test_figures_of_two_machines_are_in_two_tables(tmp_path: Path, tiny: parts.Settings) -> None:
    results = Results(tmp_path, PARTS["bandwidth"], tiny.recorded())
    entry = {"state": DONE, "seconds": 1.0}
    results.end("copy", {**entry, "figures": {"bytes_per_s": 4e12}, "made_on": {"device": "One"}})
    figures = {"flops_per_s": 7e14, "width": 8192, "dtype": "bfloat16"}
    results.end("matmul", {**entry, "figures": figures, "made_on": {"device": "Other"}})
    text = tables([results])
    assert "\nOne\n" in text
    assert "\nOther\n" in text
    assert "4000 GB/s" in text
    assert "700 TFLOP/s" in text


def test_the_list_says_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = Results(tmp_path, PARTS["bandwidth"], {"shapes": "tiny", "runtime": "auto"})
    for step in PARTS["bandwidth"].steps:
        results.end(step, {"state": DONE, "seconds": 60, "figures": {}, "made_on": MACHINE})
    measure_gpu.main(tmp_path, show=True, tiny=True)
    found = {row[0]: row[1:4] for row in rows(capsys.readouterr().out)}
    assert found["bandwidth"] == [DONE, "2 of 2", "2.0 taken"]
    assert found["axes"] == [UNFINISHED, "0 of 12", "about 6"]


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        measure_gpu.main(tmp_path, ["no"])
    assert not list(tmp_path.iterdir())


def command(directory: Path) -> list[str]:
    return [sys.executable, "-m", "tools.measure_gpu", str(directory), "bandwidth", "multiples", "--tiny"]


@pytest.mark.slow
def test_a_killed_run_goes_on_without_repeating_what_is_done(tmp_path: Path) -> None:
    environment = os.environ | {"TVAPRUNE_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command(tmp_path), cwd=REPOSITORY, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + WAIT_S
    while not (tmp_path / "multiples.json").is_file():
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    below = psutil.Process(first.pid).children(recursive=True)
    assert below
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert psutil.wait_procs(below, timeout=WAIT_S)[1] == []  # no orphan writes on
    before = (tmp_path / "bandwidth.json").read_bytes()
    left = json.loads((tmp_path / "multiples.json").read_text())
    assert left["running"] in PARTS["multiples"].steps
    assert left["state"] == UNFINISHED

    done = subprocess.run(command(tmp_path), cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "bandwidth.json").read_bytes() == before
    made_on = json.loads(before)["steps"]["copy"]["made_on"]
    assert done.stdout.count(made_on["device"]) == 2
    assert "### multiples: Mistral-7B at 0.5, widths in multiples of 1 to 128, tiny" in done.stdout
    assert json.loads((tmp_path / "multiples.json").read_text())["state"] == DONE
