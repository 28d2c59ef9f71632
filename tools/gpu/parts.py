"""The parts, their steps, and what they are measured with.

The measuring is imported where a step starts: a package that the machine lacks then costs only the parts that need it.
"""

import os
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tools.gpu.resumable import Part, Results, run_steps
from tvaprune.device import pick_device
from tvaprune.measures.machine import machine_name
from tvaprune.resume import hash_files

REPOSITORY = Path(__file__).resolve().parents[2]
MODELS = {"Mistral-7B": "Mistral-7B-v0.1", "Llama-3-8B": "Meta-Llama-3-8B"}  # directories of configs/models
# Batch size and prompt of the prefill: short at 64, so that three models and their caches fit in 80 GB.
BATCHES = {1: 1024, 16: 1024, 64: 256}
AXES = ("intermediate", "kv_heads", "layers", "hidden")
PRESETS = {"80 GB": "llama-3-8b-80gb", "24 GB": "llama-3-8b-24gb"}  # files of configs/
STAGES = ("sample_calibration", "learn_masks", "adapt_dimensions", "update_weights", "compact", "finetune_lora")

# Minutes are guesses from a few timed passes on an H200; a part's file says what it took.
_PARTS = (
    Part("tests", "the tests that are marked gpu", 4, ("pytest",)),
    Part("bandwidth", "what the card copies and multiplies a second", 0.5, ("copy", "matmul")),
    Part(
        "decode",
        "prefill and decode, dense and pruned on all axes",
        4,
        tuple(f"{model}, batch {batch}" for batch in BATCHES for model in MODELS),
    ),
    Part("multiples", "Mistral-7B at 0.5, widths in multiples of 1 to 128", 3, ("batch 1", "batch 16")),
    Part(
        "axes",
        "Mistral-7B, one axis pruned at a time",
        6,
        tuple(f"{axis}, batch {batch}" for batch in BATCHES for axis in AXES),
    ),
    Part(
        "steps",
        "steps of mask learning and fine-tuning at 8B shapes",
        4,
        tuple(f"{preset}, {stage}" for preset in PRESETS for stage in ("learn_masks", "finetune_lora")),
    ),
    Part(
        "whole",
        "a run at 8B shapes through the stages, with few steps",
        14,
        ("inputs", *STAGES, "benchmark_speed"),
        in_order=True,
    ),
    Part("vllm", "throughput in vLLM of the models of `whole`", 4, ("vllm",)),
)
PARTS = {part.name: part for part in _PARTS}
# Where the function of a part's name is: it takes a step and the settings, and returns the figures.
_ROOMS = {
    **dict.fromkeys(("tests", "bandwidth"), "limits"),
    **dict.fromkeys(("decode", "multiples", "axes"), "speed"),
    "steps": "training",
    "whole": "whole",
    "vllm": "serving",
}


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    tiny: bool  # shapes and rounds that any machine can run; the figures mean nothing
    runtime: str  # of `runtime.packed.pick_runtime`
    work: Path  # where `whole` keeps its models
    vllm: Path | None  # interpreter of an environment that has vLLM

    def recorded(self) -> dict[str, Any]:
        """What the figures of one file have in common."""
        return {"shapes": "tiny" if self.tiny else "full", "runtime": self.runtime}


def work(directory: Path, name: str, settings: Settings, steps: Sequence[str]) -> None:
    """Measure steps of a part, in a process of its own."""
    os.chdir(REPOSITORY)  # configs/ is named by relative paths

    def measured(step: str) -> dict[str, Any]:
        return measure(name, step, settings)

    run_steps(Results(directory, PARTS[name], settings.recorded()), steps, measured, made_on())


def measure(name: str, step: str, settings: Settings) -> dict[str, Any]:
    """The figures of one step of a part; what earlier steps left in the device's memory is freed first."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return getattr(import_module(f"tools.gpu.{_ROOMS[name]}"), name)(step, settings)


def made_on() -> dict[str, str]:
    """The device, the versions and the code that figures are of."""
    found = {"device": machine_name(pick_device())}
    if torch.cuda.is_available():
        driver = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found |= {"driver": driver, "CUDA": str(torch.version.cuda)}
    for package in ("torch", "transformers", "peft"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    commit = _said("git", "rev-parse", "--short", "HEAD")
    changes = _said("git", "status", "--porcelain", "--untracked-files=no") if commit else ""
    code = [path for room in ("stages", "tools", "tvaprune") for path in (REPOSITORY / room).rglob("*.py")]
    found["commit"] = (commit or "unknown") + (" with changes" if changes else "")
    return found | {"code": hash_files(code)[:12]}


def _said(*command: str) -> str:
    """The first line that a command prints; empty where there is no such command, or it fails."""
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ""
    return (done.stdout.splitlines() or [""])[0].strip()
