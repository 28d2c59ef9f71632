"""The length of training, its learning rates, and its windows: pure functions of the options and the step."""

import math
from functools import lru_cache

import torch

from tvaprune.options.recovery import RecoveryOptions


def total_steps(options: RecoveryOptions, windows: int) -> int:
    """Optimizer steps on this many training windows; `epochs` is rounded up to whole steps."""
    if options.steps is not None:
        return options.steps
    assert options.epochs is not None
    return max(1, math.ceil(options.epochs * windows / options.windows_per_step))


def learning_rate_at(step: int, total: int, options: RecoveryOptions) -> float:
    """For the update that ends `step` (1 to `total`): linear warm-up to the peak, then decay that ends just above 0."""
    warmup_steps = round(options.warmup * total)
    if step <= warmup_steps:
        return options.learning_rate * step / warmup_steps
    progress = (step - 1 - warmup_steps) / (total - warmup_steps)
    factor = 1 - progress if options.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return options.learning_rate * factor


def step_windows(step: int, windows: int, options: RecoveryOptions) -> list[int]:
    """Indices, below `windows`, of the training windows that a step (from 0) uses; every epoch has its own shuffle."""
    first = step * options.windows_per_step
    return [
        _shuffled(windows, position // windows, options.seed)[position % windows]
        for position in range(first, first + options.windows_per_step)
    ]


@lru_cache(maxsize=2)
def _shuffled(windows: int, epoch: int, seed: int) -> list[int]:
    return torch.randperm(windows, generator=torch.Generator().manual_seed(mix_seed(seed, epoch))).tolist()


def mix_seed(seed: int, number: int) -> int:
    """A seed that differs for every pair in practice."""
    return (seed * 1_000_003 + number) % 2**63
