"""How long and how fast to train, and which windows when: pure functions of the step and the seed."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

Decay = Literal["cosine", "linear"]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes:
        steps: optimizer steps; None: as many as `epochs` takes.
        epochs: passes over the training windows (rounded up to whole steps); None: `steps` decides.
        batch_size: windows a forward pass.
        accumulation: forward passes a step.
        learning_rate: AdamW's peak.
        weight_decay: on the adapter's matrices.
        warmup: share of the steps with a linear rise, in [0, 1).
        decay: from the peak to 0 over the rest.
        gradient_clip: largest norm of the whole gradient.
        validate_every: steps between measurements on the validation windows; the last step is always measured.
        save_every: steps between saved states.
        gradient_checkpointing: recompute activations in the backward pass, for less memory.
    """

    steps: int | None
    epochs: float | None
    batch_size: int
    accumulation: int
    learning_rate: float
    weight_decay: float = 0.0
    warmup: float = 0.0
    decay: Decay = "cosine"
    gradient_clip: float = 1.0
    validate_every: int = 50
    save_every: int = 50
    gradient_checkpointing: bool = False

    @property
    def windows_a_step(self) -> int:
        return self.batch_size * self.accumulation

    def total_steps(self, windows: int) -> int:
        """Optimizer steps on this many training windows. Raises ValueError unless one of steps and epochs is set."""
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"steps = {self.steps} and epochs = {self.epochs}: set exactly one, the other None")
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, math.ceil(self.epochs * windows / self.windows_a_step))


def learning_rate_at(step: int, total: int, schedule: Schedule) -> float:
    """For the update that ends `step` (1 to `total`): linear warm-up to the peak, then decay that ends just above 0."""
    warmup_steps = round(schedule.warmup * total)
    if step <= warmup_steps:
        return schedule.learning_rate * step / warmup_steps
    progress = (step - 1 - warmup_steps) / (total - warmup_steps)
    factor = 1 - progress if schedule.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return schedule.learning_rate * factor


def windows_of(step: int, places: range, schedule: Schedule, windows: int, seed: int) -> list[int]:
    """Indices of the training windows at these places of a step (from 0): every epoch its own shuffle."""
    positions = [step * schedule.windows_a_step + place for place in places]
    return [_shuffled(windows, position // windows, seed)[position % windows] for position in positions]


@lru_cache(maxsize=2)
def _shuffled(windows: int, epoch: int, seed: int) -> list[int]:
    return torch.randperm(windows, generator=torch.Generator().manual_seed(mix_seed(seed, epoch))).tolist()


def mix_seed(seed: int, number: int) -> int:
    """A seed that differs for every pair in practice."""
    return (seed * 1_000_003 + number) % 2**63
