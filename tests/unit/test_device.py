"""The environment decides where to compute; a wrong choice is told before any work."""

import platform
import subprocess
import sys

import pytest
import torch

from tvaprune.device import pick_device, pick_dtype, synchronise

CPU = torch.device("cpu")


def test_without_a_gpu_the_cpu_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device() == CPU


def test_with_a_gpu_it_is_taken_unless_the_environment_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device() == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device() == torch.device("cuda", 1)
    monkeypatch.setenv("TVAPRUNE_DEVICE", "cpu")
    assert pick_device() == CPU
    monkeypatch.setenv("TVAPRUNE_DEVICE", "cuda:1")
    assert pick_device() == torch.device("cuda", 1)


def test_more_processes_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="cuda:2: this machine has 2 CUDA devices; TVAPRUNE_NPROC"):
        pick_device()


@pytest.mark.parametrize(("name", "message"), [("gpu", "not a device"), ("cuda", "has no CUDA device")])
def test_a_device_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TVAPRUNE_DEVICE", name)
    with pytest.raises(ValueError, match=f"TVAPRUNE_DEVICE='{name}': .*{message}"):
        pick_device()


@pytest.mark.parametrize(("avx512", "amx"), [(False, False), (True, False), (False, True)])
def test_the_cpu_computes_in_bfloat16_only_where_it_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, avx512: bool, amx: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert pick_dtype(CPU) == (torch.bfloat16 if avx512 or amx else torch.float32)


@pytest.mark.parametrize("native", [True, False])
def test_a_gpu_that_emulates_bfloat16_computes_in_float32(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert pick_dtype(torch.device("cuda")) == (torch.bfloat16 if native else torch.float32)


def test_the_environment_overrides_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVAPRUNE_DTYPE", "float16")
    assert pick_dtype(CPU) == torch.float16
    monkeypatch.setenv("TVAPRUNE_DTYPE", "int8")
    with pytest.raises(ValueError, match="TVAPRUNE_DTYPE='int8': use one of float32, bfloat16, float16"):
        pick_dtype(CPU)


def test_only_a_gpu_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    synchronise(CPU)
    assert waited == []
    synchronise(torch.device("cuda"))
    assert waited == [torch.device("cuda")]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another libc has no mallopt")
def test_freed_memory_is_used_again_without_asking_the_system() -> None:
    script = """
import resource, sys, torch
from tvaprune.device import keep_freed_memory
from tvaprune.losses import KL_ALONE, distillation_loss
if "keep" in sys.argv:
    assert keep_freed_memory()
hidden, head, labels = torch.randn(256, 8), torch.randn(49152, 8), torch.zeros(256, dtype=torch.int64)
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    distillation_loss(hidden.requires_grad_(), head, hidden.detach(), head, labels, KL_ALONE)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    returned, kept = (
        int(subprocess.run([sys.executable, "-c", script, *how], capture_output=True, text=True, check=True).stdout)
        for how in ([], ["keep"])
    )
    assert kept < returned / 10
