"""Two real processes over Gloo: what they learn is what one learns on the same batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tvaprune.distributed import ALONE, World, launch, processes_asked
from tvaprune.gates.curvature import RunningCurvature
from tvaprune.gates.training import SAVE_EVERY
from tvaprune.options.axes import AXES

REPOSITORY = Path(__file__).resolve().parents[2]


def run(directory: Path, processes: int, *arguments: str, killed_at: str = "") -> subprocess.CompletedProcess[str]:
    """Start `tests.learn_on_processes`, in a process of its own, because torchrun sets its environment.

    Its state is below `directory`, and what it learned in `learned(directory, processes)`.
    """
    directory.mkdir(exist_ok=True)
    out = directory / f"{processes}.safetensors"
    code = "import sys; from tvaprune.distributed import launch; launch(sys.argv[1], sys.argv[3:], int(sys.argv[2]))"
    return subprocess.run(
        [sys.executable, "-c", code, "tests.learn_on_processes", str(processes), *arguments, str(out), killed_at],
        cwd=REPOSITORY, env=os.environ | {"DVC_ROOT": str(directory)}, capture_output=True, text=True, timeout=400,
    )  # fmt: skip


def learned(directory: Path, processes: int, *arguments: str) -> dict[str, torch.Tensor]:
    done = run(directory, processes, *arguments)
    assert done.returncode == 0, done.stderr
    return load_file(directory / f"{processes}.safetensors")


@pytest.mark.parametrize(
    ("case", "family", "sharded"),
    [
        ("paper", "llama_tied", "whole"),
        ("tva", "qwen3", "sharded"),
        pytest.param("tva", "llama", "whole", marks=pytest.mark.nightly),
        pytest.param("deterministic", "llama", "whole", marks=pytest.mark.nightly),
        pytest.param("grasprune", "llama_bias", "sharded", marks=pytest.mark.slow),
        pytest.param("paper", "llama_bias", "sharded", marks=pytest.mark.nightly),
    ],
)
def test_two_processes_learn_the_gates_of_one(tmp_path: Path, case: str, family: str, sharded: str) -> None:
    """Noise included: it belongs to a window, wherever it is computed."""
    two = learned(tmp_path, 2, case, family, sharded)
    one = learned(tmp_path, 1, case, family, "whole")
    for name, expected in one.items():
        if name.startswith("keep."):
            assert torch.equal(two[name], expected), name
        else:
            torch.testing.assert_close(two[name], expected, rtol=0, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    assert not torch.equal(one["mean.intermediate"], torch.ones_like(one["mean.intermediate"]))


@pytest.mark.parametrize(
    ("case", "family"),
    [
        ("tva", "llama"),
        pytest.param("deterministic", "qwen3", marks=pytest.mark.nightly),
        pytest.param("grasprune", "llama", marks=pytest.mark.slow),
        pytest.param("paper", "qwen3", marks=pytest.mark.nightly),
    ],
)
def test_two_processes_resume_after_a_kill_as_if_undisturbed(tmp_path: Path, case: str, family: str) -> None:
    """Rank 0 saved on its own device, which the other process cannot read."""
    undisturbed = learned(tmp_path / "undisturbed", 2, case, family, "whole")
    killed = run(tmp_path / "killed", 2, case, family, "whole", killed_at="13")
    assert "process 1 of 2 was killed by signal 9" in killed.stderr
    assert len(list((tmp_path / "killed").glob(".resume/learn-*/state.pt"))) == 1
    resumed = learned(tmp_path / "killed", 2, case, family, "whole")
    steps = len(undisturbed["steps"])
    assert undisturbed.pop("steps").tolist() == list(range(steps))
    assert resumed.pop("steps").tolist() == list(range(SAVE_EVERY, steps))
    assert undisturbed.keys() == resumed.keys()
    for name, expected in undisturbed.items():
        assert torch.equal(resumed[name], expected), name


def test_shares_cover_everything_once() -> None:
    worlds = [World(rank, 3) for rank in range(3)]
    assert [n for world in worlds for n in range(6)[world.part(6, "batch_size")]] == list(range(6))
    assert sorted(n for world in worlds for n, counts in world.turns(7) if counts) == list(range(7))
    assert {len(world.turns(7)) for world in worlds} == {3}
    assert ALONE.turns(2) == [(0, True), (1, True)]
    with pytest.raises(ValueError, match="batch_size = 4: 3 processes cannot share it equally"):
        World(0, 3).part(4, "batch_size")


@pytest.mark.parametrize("value", ["0", "two", "-1"])
def test_a_wrong_number_of_processes_is_named(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("TVAPRUNE_NPROC", value)
    with pytest.raises(ValueError, match=f"TVAPRUNE_NPROC='{value}': give a whole number"):
        processes_asked()


def test_a_process_that_torchrun_started_starts_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVAPRUNE_NPROC", "4")
    assert processes_asked() == 4
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert processes_asked() == 1


def test_nodes_need_an_address_to_connect_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVAPRUNE_NNODES", "2")
    with pytest.raises(ValueError, match="set TVAPRUNE_RENDEZVOUS to the host:port"):
        launch("stages.learn_masks", [], 2)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_resumed_curvature_is_on_its_own_process_device(rank: int) -> None:
    """The state is one, read to the CPU; `meta` stands for a second process's GPU."""
    device = torch.device(["cpu", "meta"][rank])
    ones = {axis: torch.ones(2, 3) for axis in AXES}
    resumed = RunningCurvature.from_state(RunningCurvature(ones, 4).state_dict(), device)
    step = {axis: torch.ones(2, 3, device=device) for axis in AXES}
    resumed.add(step, {axis: one.bool() for axis, one in step.items()}, 1)
    state = resumed.state_dict()
    tensors = [tensor for part in ("start", "drawn", "draws") for tensor in state[part].values()]
    assert {tensor.device for tensor in tensors} == {device}
