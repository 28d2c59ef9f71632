"""From a model and calibration windows to masks, by any method, with what it cost."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tvaprune.cost import peak_memory_bytes
from tvaprune.gates.attention import use_training_attention
from tvaprune.gates.insertion import GatedModel, hard_gates
from tvaprune.gates.training import GateTraining, Saver, learn_gates
from tvaprune.losses import distillation_loss, next_token_labels
from tvaprune.model import topology as layout
from tvaprune.model.sparsity import dense_decoder_parameters
from tvaprune.model.topology import AXES, Axis, Topology
from tvaprune.widths.masks import Masks, UnreachableSparsityError, project


@dataclass(frozen=True)
class Found:
    """Masks that meet the target, and the figures of finding them.

    Attributes:
        masks: projected onto the target.
        curve: one row a step; empty for methods without steps.
        steps: optimiser steps taken.
        seconds: wall time, of this process alone when a run was resumed.
        step_seconds, bare_step_seconds, teacher_seconds: see `Learned`.
        peak_memory_bytes: highest memory of the process (device memory on CUDA).
        validation_nll: nats a token on held-out calibration windows: dense, masked with mu, masked with 0/1 gates.
    """

    masks: Masks
    curve: list[dict[str, float | int]]
    steps: int
    seconds: float
    step_seconds: float
    bare_step_seconds: float
    teacher_seconds: float
    peak_memory_bytes: int
    validation_nll: dict[str, float]


def find_masks(
    model: PreTrainedModel,
    input_ids: Tensor,
    validation_ids: Tensor,
    target_sparsity: float,
    gates: dict[str, Any],
    *,
    method: str,
    axes: tuple[Axis, ...],
    seed: int,
    gradient_checkpointing: bool = False,
    saver: Saver | None = None,
    progress: bool = True,
) -> Found:
    """Find masks by the method named.

    Args:
        model: dense, on its device; frozen here.
        input_ids: int32 [samples, seq_len], what masks are learned on.
        validation_ids: int32 [n, seq_len], what they are checked on; decides nothing.
        gates: fields of `GateTraining`.

    Raises:
        UnreachableSparsityError: before any work, when the axes in play cannot remove so much.
    """
    topology = Topology.of(model.config)
    _check_reachable(topology, target_sparsity, axes)
    model.requires_grad_(False)
    use_training_attention(model)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.train()  # transformers checkpoints in training mode only; these families have no dropout of their own
    started = time.perf_counter()
    settings = GateTraining(**{**gates, "slope": tuple(gates["slope"])})
    learned = learn_gates(
        model, topology, input_ids, target_sparsity, settings, axes=axes, seed=seed, saver=saver, progress=progress
    )
    seconds = time.perf_counter() - started
    return Found(
        masks=learned.masks,
        curve=learned.curve,
        steps=settings.steps,
        seconds=seconds,
        step_seconds=learned.step_seconds,
        bare_step_seconds=learned.bare_step_seconds,
        teacher_seconds=learned.teacher_seconds,
        peak_memory_bytes=peak_memory_bytes(next(model.parameters()).device),
        validation_nll=validation_nll(model, topology, learned.masks, validation_ids),
    )


def _check_reachable(topology: Topology, target_sparsity: float, axes: tuple[Axis, ...]) -> None:
    everything = Masks.dense(topology)
    project(topology, everything, target_sparsity, axes)
    if dense_decoder_parameters(topology) * (1 - target_sparsity) < topology.hidden:
        raise UnreachableSparsityError(f"sparsity = {target_sparsity}: leaves less than one unit")


@torch.no_grad()
def validation_nll(model: PreTrainedModel, topology: Topology, masks: Masks, windows: Tensor) -> dict[str, float]:
    """Mean nats a token over windows, int32 [n, seq_len]: dense, with mu, with 0/1 gates."""
    device = next(model.parameters()).device
    kept = int(masks.keep["hidden"].sum())
    variants = {"dense": None, "mean": hard_gates(masks.keep, masks.mu), "binary": hard_gates(masks.keep)}
    totals = dict.fromkeys(variants, 0.0)
    with GatedModel(model, topology).inserted() as gated:
        for name, gates in variants.items():
            if gates is not None:
                gated.set({axis: gates[axis].to(device) for axis in AXES}, kept)
            for window in windows.long().to(device):
                hidden = layout.decoder(model)(input_ids=window[None], use_cache=False).last_hidden_state[0]
                labels = next_token_labels(window[None])
                totals[name] += float(distillation_loss(hidden, layout.head(model).weight, None, None, labels).ce)
    return {name: total / len(windows) for name, total in totals.items()}
