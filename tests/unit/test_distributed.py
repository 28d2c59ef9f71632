"""Two real processes over Gloo: what they learn is what one learns on the same batch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tvaprune.architecture.topology import AXES
from tvaprune.distributed import ALONE, World, launch, processes_asked
from tvaprune.gates.curvature import RunningCurvature

REPOSITORY = Path(__file__).resolve().parents[2]


def run(directory: Path, processes: int, *arguments: str) -> dict[str, torch.Tensor]:
    """What `tests.learn_on_processes` learned; in a process of its own, because torchrun sets its environment."""
    out = directory / f"{processes}.safetensors"
    code = "import sys; from tvaprune.distributed import launch; launch(sys.argv[1], sys.argv[3:], int(sys.argv[2]))"
    subprocess.run(
        [sys.executable, "-c", code, "tests.learn_on_processes", str(processes), *arguments, str(out)],
        cwd=REPOSITORY, check=True, timeout=200,
    )  # fmt: skip
    return load_file(out)


@pytest.mark.parametrize(
    ("case", "family", "sharded"),
    [
        ("paper", "llama_tied", "whole"),
        ("tva", "qwen3", "sharded"),
        pytest.param("tva", "llama", "whole", marks=pytest.mark.nightly),
        pytest.param("deterministic", "llama", "whole", marks=pytest.mark.slow),
        pytest.param("paper", "llama_bias", "sharded", marks=pytest.mark.nightly),
    ],
)
def test_two_processes_learn_the_gates_of_one(tmp_path: Path, case: str, family: str, sharded: str) -> None:
    """Noise included: it belongs to a window, wherever it is computed."""
    two = run(tmp_path, 2, case, family, sharded)
    one = run(tmp_path, 1, case, family, "whole")
    for name, expected in one.items():
        if name.startswith("keep."):
            assert torch.equal(two[name], expected), name
        else:
            torch.testing.assert_close(two[name], expected, rtol=0, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    assert not torch.equal(one["mean.intermediate"], torch.ones_like(one["mean.intermediate"]))


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
