"""Memory that ran out is reported in one line that names parameters, and other errors are left alone."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML

from stages._command import clear_errors
from tvaprune.out_of_memory import ADVICE, OutOfMemory, advice, memory_errors_named

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    ],
)
def test_each_kind_is_one_line_and_exit_status_1(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, clear_errors():
        raise error
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "out of memory" in said


def test_what_torch_raises_is_recognised() -> None:
    with pytest.raises(OutOfMemory), memory_errors_named():
        torch.empty(1 << 60)


def test_other_errors_are_left_alone() -> None:
    with pytest.raises(RuntimeError, match="shapes differ"), memory_errors_named():
        raise RuntimeError("shapes differ")


def test_a_stage_names_its_own_parameters() -> None:
    """As a process, whose main module says which stage it is."""
    code = (
        "import sys; from importlib.machinery import ModuleSpec; from stages._command import clear_errors\n"
        "sys.modules['__main__'].__spec__ = ModuleSpec('stages.finetune_lora', None)\n"
        "with clear_errors(): raise MemoryError"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1
    assert "error: stages.finetune_lora: out of memory" in done.stderr
    assert "finetune_lora.gradient_checkpointing: true" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_parameter_that_is_named_exists() -> None:
    params = YAML(typ="safe").load(REPOSITORY / "params.yaml")
    words = {word.strip(",:.") for text in ADVICE.values() for word in text.split()}
    named = {word for word in words if "." in word and word.partition(".")[0] in params}
    assert len(named) > 8
    for section, key in (word.split(".") for word in named):
        assert key in params[section], (section, key)
    assert "more memory" in advice("stages.check_params")
