"""From a model and calibration windows to masks, by any method, with what it cost."""

import csv
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tvaprune.architecture.attention import use_training_attention
from tvaprune.architecture.parameter_counts import dense_decoder_parameters, kept_decoder_parameters, shared_parameters
from tvaprune.architecture.topology import AXES, Axis, Topology, decoder, lm_head
from tvaprune.baselines.problem import Problem
from tvaprune.baselines.registry import check_baseline, score_baseline
from tvaprune.cost import peak_memory_bytes
from tvaprune.distributed import ALONE, World
from tvaprune.gates.insertion import GatedModel, hard_gates
from tvaprune.gates.state import GateTraining
from tvaprune.gates.training import Learned, learn_gates
from tvaprune.losses import distillation_loss, next_token_labels
from tvaprune.masks.masks import Masks
from tvaprune.masks.projection import solve_threshold
from tvaprune.masks.update import WeightUpdate
from tvaprune.options.baselines import BASELINE_OPTIONS
from tvaprune.resume import Saver

GATE_METHODS = ("tva", "deterministic", "vtrans")


@dataclass(frozen=True)
class Found:
    """Masks that meet the target, and the figures of finding them.

    Attributes:
        masks: projected onto the target.
        update: what to fold into the weights of the kept units.
        curve: one row a step; empty for methods without steps.
        seconds: wall time, of this process alone when a run was resumed.
        step_seconds, bare_step_seconds, teacher_seconds: see `Learned`; 0 for methods without gates.
        peak_memory_bytes: highest memory of the process (device memory on CUDA).
        validation_nll: nats a token on held-out calibration windows: dense, masked with mu, masked with 0/1 gates.
    """

    masks: Masks
    update: WeightUpdate
    curve: list[dict[str, float | int]]
    seconds: float
    step_seconds: float
    bare_step_seconds: float
    teacher_seconds: float
    peak_memory_bytes: int
    validation_nll: dict[str, float]


def check_method(method: str, axes: tuple[Axis, ...], target_sparsity: float, topology: Topology) -> None:
    """Refuse before any work what no calibration can mend.

    Raises:
        ValueError: names the parameter, its value and what is allowed.
        UnreachableSparsityError: the axes in play cannot remove so much.
    """
    if method not in GATE_METHODS:
        check_baseline(method, axes, target_sparsity)
    alike = {axis: torch.full(topology.gate_shape(axis), 1.0 if axis in axes else torch.inf) for axis in AXES}
    solve_threshold(topology, alike, target_sparsity)


def find_masks(
    model: PreTrainedModel,
    input_ids: Tensor,
    validation_ids: Tensor,
    target_sparsity: float,
    gates: GateTraining,
    baseline: Any,
    *,
    method: str,
    axes: tuple[Axis, ...],
    seed: int,
    gradient_checkpointing: bool = False,
    saver: Saver | None = None,
    progress: bool = True,
    world: World = ALONE,
) -> Found:
    """Find masks by the method named.

    tva: the gates as set. deterministic: the ablation of the bottleneck, the same without noise, KL and its stationary
    point, log_var by gradient from a constant. vtrans: the same without the means (Dutta et al. 2024, their baseline;
    with adapt_dimensions.multiple 1 it is not adapted either). Any other: a published baseline.

    Args:
        model: dense, on its device; frozen here.
        input_ids: int32 [samples, seq_len], what masks are learned on.
        validation_ids: int32 [n, seq_len], what they are checked on; decides nothing.
        baseline: options of the baseline, of its class in BASELINE_OPTIONS; None = its defaults.
        world: processes that share the work of the gates' training; the baselines' is not shared.

    Raises:
        ValueError, UnreachableSparsityError: as `check_method`.
    """
    topology = Topology.of(model.config)
    check_method(method, axes, target_sparsity, topology)
    model.requires_grad_(False)
    use_training_attention(model, next(model.parameters()).device)
    started = time.perf_counter()
    if method not in GATE_METHODS:
        problem = Problem(model, topology, input_ids, target_sparsity, axes, seed, progress)
        masks, update = score_baseline(method, problem, baseline or BASELINE_OPTIONS[method]())
        learned = Learned(masks, update, [], 0.0, 0.0, 0.0)
    else:
        if gradient_checkpointing:
            model.activation_checkpointing_enable()
            model.train()  # transformers checkpoints in training mode only; these families have no dropout of their own
        if method == "deterministic":
            none = dict.fromkeys(AXES, 0.0)
            gates = replace(gates, noise=0.0, kl_weight=none, init="constant", log_var="trained")
        learned = learn_gates(
            model,
            topology,
            input_ids,
            target_sparsity,
            gates,
            axes=axes,
            seed=seed,
            saver=saver,
            progress=progress and world.is_main,
            world=world,
        )
        masks, update = learned.masks, learned.update
        if method == "vtrans":
            update = WeightUpdate.none(topology)
    seconds = time.perf_counter() - started
    return Found(
        masks=masks,
        update=update,
        curve=learned.curve,
        seconds=seconds,
        step_seconds=learned.step_seconds,
        bare_step_seconds=learned.bare_step_seconds,
        teacher_seconds=learned.teacher_seconds,
        peak_memory_bytes=peak_memory_bytes(next(model.parameters()).device),
        validation_nll=validation_nll(model, topology, masks, update, validation_ids, world),
    )


@torch.no_grad()
def validation_nll(
    model: PreTrainedModel,
    topology: Topology,
    masks: Masks,
    update: WeightUpdate,
    windows: Tensor,
    world: World = ALONE,
) -> dict[str, float]:
    """Mean nats a token over windows, int32 [n, seq_len]: dense, with mu, with 0/1 gates."""
    device = next(model.parameters()).device
    kept = int(masks.keep["hidden"].sum())
    variants = {"dense": None, "mean": hard_gates(masks.keep, update.scale), "binary": hard_gates(masks.keep)}
    totals = dict.fromkeys(variants, 0.0)
    with GatedModel(model, topology).inserted() as gated:
        for name, gates in variants.items():
            if gates is not None:
                means = update.channel_scale if name == "mean" else {}
                gated.set(
                    {axis: gates[axis].to(device) for axis in AXES},
                    kept,
                    channel_mu={site: mean.to(device) for site, mean in means.items()},
                )
            for index, counts in world.turns(len(windows)):
                window = windows[index].long().to(device)
                hidden = decoder(model)(input_ids=window[None], use_cache=False).last_hidden_state[0]
                labels = next_token_labels(window[None])
                loss = distillation_loss(hidden, lm_head(model).weight, None, None, labels)
                totals[name] += counts * float(loss.ce)
    summed = world.sum_(torch.tensor(list(totals.values()), dtype=torch.float64, device=device))
    return {name: total / len(windows) for name, total in zip(totals, summed.tolist(), strict=True)}


def masks_metrics(found: Found, config: Any, target_sparsity: float) -> dict[str, Any]:
    """metrics/masks.json: sparsities as shares, parameters as counts, times in seconds, perplexities on validation."""
    topology = Topology.of(config)
    decoder = dense_decoder_parameters(topology)
    decoder_kept = kept_decoder_parameters(topology, found.masks.keep)
    hidden = int(found.masks.keep["hidden"].sum())
    outside = [
        shared_parameters(topology, width, config.vocab_size, config.tie_word_embeddings)
        for width in (topology.hidden, hidden)
    ]
    ratio = found.step_seconds / found.bare_step_seconds if found.bare_step_seconds else 0.0
    return {
        "target_sparsity": target_sparsity,
        "sparsity_decoder": 1 - decoder_kept / decoder,
        "sparsity_model": 1 - (decoder_kept + outside[1]) / (decoder + outside[0]),
        "params_dense": decoder + outside[0],
        "params_kept": decoder_kept + outside[1],
        "hidden_kept": hidden,
        "steps": len(found.curve),
        "seconds": found.seconds,
        "step_seconds": found.step_seconds,
        "bare_step_seconds": found.bare_step_seconds,
        "step_ratio": ratio,
        "teacher_seconds": found.teacher_seconds,
        "peak_memory_bytes": found.peak_memory_bytes,
        "validation_ppl": {name: math.exp(min(nll, 50.0)) for name, nll in found.validation_nll.items()},
    }


def write_curve(path: Path, curve: list[dict[str, float | int]]) -> None:
    """The training curve as CSV, one row a step."""
    columns = ["step", "loss", "ce", "distillation", "sparsity", "target", "hidden_kept", "gradient_norm"]
    _write_csv(path, columns, [[row[column] for column in columns] for row in curve])


def write_widths(path: Path, masks: Masks) -> None:
    """Kept widths by layer as CSV."""
    rows = zip(masks.keep["intermediate"].sum(-1).tolist(), masks.keep["kv_heads"].sum(-1).tolist(), strict=True)
    _write_csv(path, ["layer", "intermediate_kept", "kv_heads_kept"], [[i, *row] for i, row in enumerate(rows)])


def _write_csv(path: Path, columns: list[str], rows: list[list[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
