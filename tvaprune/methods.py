"""From a model and windows of text to masks, by any method, and the report of what it found."""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from tvaprune.architecture.attention import use_training_attention
from tvaprune.architecture.parameter_counts import dense_decoder_parameters, kept_decoder_parameters, shared_parameters
from tvaprune.architecture.topology import Topology
from tvaprune.artifacts import write_csv
from tvaprune.baselines.allocation import widths_of_uniform_share
from tvaprune.baselines.problem import Problem
from tvaprune.baselines.registry import score_baseline
from tvaprune.cost import peak_memory_bytes
from tvaprune.device import require_trainable
from tvaprune.distributed import ALONE, World
from tvaprune.gates.fixed_masks import FixedMaskGates
from tvaprune.gates.insertion import GatedModel, hard_gates
from tvaprune.gates.latency import LatencyGates
from tvaprune.gates.objective import ROW, Row, objective
from tvaprune.gates.training import Gates, Learned, learn_gates, new_gates
from tvaprune.masks.latency_table import LatencyTable, latency_metrics
from tvaprune.masks.masks import Masks
from tvaprune.masks.projection import solve_threshold
from tvaprune.masks.update import WeightUpdate, replaced
from tvaprune.options.axes import AXES
from tvaprune.options.gates import TvaOptions
from tvaprune.options.masks import MaskRequest, method_options
from tvaprune.options.method import check_sparsity
from tvaprune.resume import Saver


@dataclass(frozen=True)
class Found:
    """Masks that meet the target, and the figures of finding them."""

    masks: Masks  # projected onto the target
    update: WeightUpdate
    curve: list[Row]  # one row a step; empty for methods without steps
    seconds: float  # wall time, of a resumed run all its processes'
    peak_memory_bytes: int  # of the process (device memory on CUDA)
    validation_nll: dict[str, float]  # as `validation_nll`


def check_request(request: MaskRequest, topology: Topology) -> None:
    """Refuse before any work what no calibration text can mend.

    Raises:
        TypeError: the options are of another method.
        ValueError: names the parameter, its value and what is allowed.
        UnreachableSparsityError: the pruned axes cannot remove so much of the layers that are not protected.
    """
    kind = method_options(request.method)
    if not isinstance(request.options, kind):
        found = type(request.options).__name__
        raise TypeError(f"options: learn_masks.method = {request.method!r} takes {kind.__name__}, found {found}")
    check_sparsity(request.sparsity)
    kind.check_axes(request.axes)
    if getattr(request.options, "bias", False) and (topology.output_bias or topology.mlp_bias):
        raise ValueError(
            f"learn_masks.{request.method}.bias = true: its biases would replace those of o_proj and down_proj, and "
            "this model has some; set it to false"
        )
    if request.latency is not None:
        return  # the table says which latencies the axes reach
    if kind.uniform_share or getattr(request.options, "allocation", None) == "uniform":
        first, last = (getattr(request.options, f"protect_{end}", 0) for end in ("first", "last"))
        widths_of_uniform_share(topology, request.axes, request.sparsity, first, last)  # raises
        return
    alike = {axis: torch.full(topology.gate_shape(axis), 1.0 if axis in request.axes else torch.inf) for axis in AXES}
    for axis, score in alike.items():
        if axis != "hidden" and kind.keeps_one_unit:
            score[:, 0] = torch.inf
    solve_threshold(topology, alike, request.sparsity)


def find_masks(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "samples seq"],
    validation_ids: Int[Tensor, "windows seq"],
    request: MaskRequest,
    saver: Saver | None = None,
    progress: bool = True,
    world: World = ALONE,
    table: LatencyTable | None = None,
) -> Found:
    """Find masks by the method that the request names.

    Args:
        model: dense, on its device; frozen here.
        input_ids: what masks are learned on.
        validation_ids: what they are measured on; decides nothing.
        world: processes that share the work of the gates' training; the baselines' is not shared.
        table: times that rise with the width, where the request's budget is latency.

    Raises:
        ValueError, UnreachableSparsityError: as `check_request`; the model is in float16.
    """
    topology = Topology.of(model.config)
    check_request(request, topology)
    require_trainable(model.dtype)
    model.requires_grad_(False)
    device = next(model.parameters()).device
    use_training_attention(model, device)
    started = time.perf_counter()
    if request.trains_gates:
        _recompute_activations(model, request)
        gates = _gates(topology, request, table, device)
        learned = learn_gates(model, input_ids, gates, saver, progress and world.is_main, world)
    else:
        problem = Problem(model, topology, input_ids, request.sparsity, request.axes, request.seed, progress)
        learned = Learned(*score_baseline(request.method, problem, request.options), [])
        if request.means_steps:
            options = TvaOptions(steps=request.means_steps)
            gates = FixedMaskGates(topology, options, learned.masks, device)
            _recompute_activations(model, request)
            refitted = WeightUpdate.none(topology, weight=learned.update.weight)
            with replaced(model, refitted):
                learned = learn_gates(model, input_ids, gates, saver, progress)
            learned = replace(learned, update=replace(learned.update, weight=refitted.weight))
    return Found(
        masks=learned.masks,
        update=learned.update,
        curve=learned.curve,
        seconds=learned.seconds_before + time.perf_counter() - started,
        peak_memory_bytes=peak_memory_bytes(device),
        validation_nll=validation_nll(model, topology, learned.masks, learned.update, validation_ids, world),
    )


def _recompute_activations(model: PreTrainedModel, request: MaskRequest) -> None:
    if request.gradient_checkpointing:
        model.activation_checkpointing_enable()
        model.train()  # transformers checkpoints in training mode only; these families have no dropout of their own


def _gates(topology: Topology, request: MaskRequest, table: LatencyTable | None, device: torch.device) -> Gates:
    if request.latency is None:
        return new_gates(topology, request.options, request.sparsity, request.axes, device, request.seed)
    assert table is not None, "a latency budget needs a latency table"
    return LatencyGates(topology, request.options, request.latency, table, request.axes, device, request.seed)


@torch.no_grad()
def validation_nll(
    model: PreTrainedModel,
    topology: Topology,
    masks: Masks,
    update: WeightUpdate,
    windows: Int[Tensor, "windows seq"],
    world: World = ALONE,
) -> dict[str, float]:
    """Mean nats a token over windows: dense; mean: masked, with the whole update; binary: with 0/1 gates alone."""
    device = next(model.parameters()).device
    nothing = WeightUpdate.none(topology)
    variants = {"dense": None, "mean": update, "binary": nothing}
    totals = dict.fromkeys(variants, 0.0)
    with GatedModel(model, topology).inserted() as gated:
        for name, used in variants.items():
            if used is not None:
                gated.set(
                    {axis: gate.to(device) for axis, gate in hard_gates(masks.keep, used.scale).items()},
                    int(masks.keep["hidden"].sum()),
                    {site: mean.to(device) for site, mean in used.channel_scale.items()},
                )
            with replaced(model, used or nothing, masks):
                for index, counts in world.turns(len(windows)):
                    totals[name] += counts * float(objective(model, windows[index][None].long().to(device)))
    summed = world.sum_(torch.tensor(list(totals.values()), dtype=torch.float64, device=device))
    return {name: total / len(windows) for name, total in zip(totals, summed.tolist(), strict=True)}


def masks_metrics(found: Found, config: Any, request: MaskRequest, table: LatencyTable | None = None) -> dict[str, Any]:
    """metrics/masks.json: sparsities as shares, parameters as counts, times in seconds, perplexities on validation.

    sparsity_learned is that of the last step, before the projection. With a latency budget, the goal and what the
    table predicts take the place of the target.
    """
    topology = Topology.of(config)
    decoder = dense_decoder_parameters(topology)
    decoder_kept = kept_decoder_parameters(topology, found.masks.keep)
    hidden = int(found.masks.keep["hidden"].sum())
    dense, kept = (
        shared_parameters(topology, width, config.vocab_size, config.tie_word_embeddings)
        for width in (topology.hidden, hidden)
    )
    reached = 1 - decoder_kept / decoder
    target: dict[str, Any] = {"target_sparsity": request.sparsity}
    if request.latency is not None and table is not None:
        target = {"target_latency": request.latency.ratio, **latency_metrics(topology, table, found.masks)}
    return {
        **target,
        "sparsity_learned": found.curve[-1]["sparsity"] if found.curve else reached,
        "sparsity_decoder": reached,
        "sparsity_model": 1 - (decoder_kept + kept) / (decoder + dense),
        "params_dense": decoder + dense,
        "params_kept": decoder_kept + kept,
        "hidden_kept": hidden,
        "steps": len(found.curve),
        "seconds": found.seconds,
        "peak_memory_bytes": found.peak_memory_bytes,
        "validation_ppl": {name: math.exp(min(nll, 50.0)) for name, nll in found.validation_nll.items()},
    }


def learned_message(report: dict[str, Any], request: MaskRequest) -> str:
    """What to tell the user of the budget, from masks.json."""
    reached = f"sparsity {report['sparsity_decoder']:.4f} of the decoder"
    if request.latency is None:
        return f"{reached}, target {request.sparsity}"
    share = report[request.latency.phase]["predicted_share"]
    return (
        f"predicted {share:.3f} of the dense {request.latency.phase} latency, limit {request.latency.ratio}; {reached}"
    )


def projection_warning(report: dict[str, Any]) -> str | None:
    """What to tell the user where the projection, and not the training, made the sparsity."""
    learned, reached = report["sparsity_learned"], report["sparsity_decoder"]
    if abs(learned - reached) <= 0.01:
        return None
    return (
        f"training reached a sparsity of {learned:.4f}, and the projection made {reached:.4f} of it; the units between "
        "were not learned. Train longer, or change the options of the method"
    )


def write_curve(path: Path, curve: list[Row]) -> None:
    """The training curve as CSV, one row a step."""
    write_csv(path, ROW, ([row[column] for column in ROW] for row in curve))


def write_widths(path: Path, masks: Masks) -> None:
    """Kept widths by layer as CSV."""
    widths = masks.widths()
    rows = zip(widths["intermediate"].tolist(), widths["kv_heads"].tolist(), strict=True)
    write_csv(path, ("layer", "intermediate_kept", "kv_heads_kept"), ([i, *row] for i, row in enumerate(rows)))
