"""Steps of mask learning and of fine-tuning at 8B shapes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tools import try_steps
from tools.gpu.parts import PRESETS, Settings
from tvaprune.device import pick_device, pick_dtype
from tvaprune.estimate import config_directory, sizes


def steps(step: str, settings: Settings) -> dict[str, Any]:
    """`PRESET, STAGE`: a file of configs/ on a card of the preset's size."""
    preset, stage = step.split(", ")
    params_file = Path("configs") / f"{'glassllm' if settings.tiny else PRESETS[preset]}.yaml"
    found, device, count = sizes(params_file, config_directory(params_file)), pick_device(), 2 if settings.tiny else 10
    with card_of(device, float(preset.removesuffix(" GB"))):
        dense = try_steps.random_dense(found, pick_dtype(device), device)
        if stage == "learn_masks":
            return try_steps.try_learning(found, dense, count)
        return try_steps.try_finetuning(found, dense, count, device)


@contextmanager
def card_of(device: torch.device, gigabytes: float) -> Iterator[None]:
    """Let this process take no more of a GPU's memory than a smaller card has; nothing on a CPU."""
    whole = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, 1e9 * gigabytes / whole), device)
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, device)
