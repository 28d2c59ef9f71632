"""Learn the gates over frozen weights, under a parameter budget that is met at every step."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tvaprune.architecture.topology import AXES, Axis, Topology, embedding
from tvaprune.device import synchronise
from tvaprune.distributed import ALONE, World
from tvaprune.gates.curvature import gate_curvature
from tvaprune.gates.insertion import GatedModel, NoisePool
from tvaprune.gates.state import Gates, GateTraining
from tvaprune.gates.steps import Batch, Row, budget_step, hidden_states, lagrangian_step, objective
from tvaprune.losses import next_token_labels
from tvaprune.masks.masks import Masks
from tvaprune.masks.projection import project
from tvaprune.masks.update import WeightUpdate
from tvaprune.resume import Saver


@dataclass(frozen=True)
class Learned:
    """What training gives.

    Attributes:
        masks: projected onto the target, threshold 0.
        update: the gates' means.
        curve: one row a step: step, loss, ce, distillation, sparsity, target, hidden_kept, gradient_norm (before any
            clipping).
        step_seconds: median over steps of the whole step but the teacher's forward.
        bare_step_seconds: median of the same forward, objective and backward (to the embeddings) without gates, on
            some of the same batches, in between.
        teacher_seconds: median of the dense model's forward for distillation; 0 without.
    """

    masks: Masks
    update: WeightUpdate
    curve: list[Row]
    step_seconds: float
    bare_step_seconds: float
    teacher_seconds: float


BARE_EVERY = 25  # a bare step is timed once in so many steps
SAVE_EVERY = 10


def learn_gates(
    model: nn.Module,
    topology: Topology,
    input_ids: Tensor,
    target_sparsity: float,
    settings: GateTraining,
    *,
    axes: tuple[Axis, ...] = AXES,
    seed: int = 0,
    saver: Saver | None = None,
    progress: bool = True,
    world: World = ALONE,
) -> Learned:
    """Train mu and log_var (and lambda) until the target is met; the model's weights stay frozen.

    Departures from section 3.1, each with its ablation in docs/lab-log.md: gates are 0 or mu in the forward, and the
    threshold is solved at every step so that the kept parameters are the schedule's (constraint "budget"); log_var
    starts at the bottleneck's own stationary point and is tracked there, where the paper follows a sampled gradient;
    dropped dimensions are zero and outside the norm while training.

    Args:
        model: causal LM on its device; weights in any floating dtype.
        input_ids: int32 or int64 [samples, seq_len]; taken in order, again from the start when exhausted.
        target_sparsity: share of the decoder layers' parameters to remove.
        saver: state is read from it first and written to it, by rank 0, as training goes.
        world: the processes that share each step's windows; all end with the same gates.

    Raises:
        ValueError: a step's windows cannot be shared equally, or curvature_tokens does not divide seq_len.
    """
    if settings.curvature_tokens is not None and input_ids.shape[1] % settings.curvature_tokens:
        raise ValueError(
            f"learn_masks.gates.curvature_tokens = {settings.curvature_tokens} does not divide windows of "
            f"{input_ids.shape[1]} tokens"
        )
    own_windows = range(settings.batch_size)[world.part(settings.batch_size, "learn_masks.gates.batch_size")]
    device = next(model.parameters()).device
    gates = Gates(topology, settings, axes, device, seed)
    timings: dict[str, list[float]] = {"step": [], "bare": [], "teacher": []}
    curve: list[Row] = []
    take = budget_step if settings.constraint == "budget" else lagrangian_step
    start = 0
    state = saver.load() if saver is not None else None
    noise = None
    if settings.noise > 0:
        noise = NoisePool(seed, device, next(model.parameters()).dtype, _pool_size(topology, input_ids))
    with GatedModel(model, topology).inserted() as gated:
        if state is not None:
            gates.load_state_dict(state["gates"])
            curve, timings, start = state["curve"], state["timings"], state["step"]
        elif settings.init == "curvature":
            windows = input_ids[-settings.curvature_windows :].long().to(device)
            stretch = settings.curvature_tokens or windows.shape[1]
            curvature = gate_curvature(gated, windows, stretch, seed=seed, progress=progress, world=world)
            gates.start_at_stationary_point(curvature)
        steps = range(start, settings.steps)
        bar = tqdm(steps, initial=start, total=settings.steps, desc="gates", disable=not progress)
        for step in bar:
            input_ids_now = _batch(input_ids, step * settings.batch_size, own_windows).to(device)
            teacher = None
            if settings.distillation_weight > 0:
                gated.clear()
                teacher, seconds = _timed(partial(_teacher, gated, input_ids_now), device)
                timings["teacher"].append(seconds)
            batch = Batch(input_ids_now, next_token_labels(input_ids_now), teacher)
            if step % BARE_EVERY == min(BARE_EVERY // 2, settings.steps - 1):
                timings["bare"].append(_timed(partial(_bare_step, gated, settings, batch), device)[1])
            if noise is not None:
                noise.start_step(step, own_windows)
            progressed = (step + 1) / settings.steps
            row, seconds = _timed(partial(take, gated, gates, batch, progressed, target_sparsity, noise, world), device)
            timings["step"].append(seconds)
            curve.append({"step": step + 1, **row})
            shown = {name: f"{row[name]:.3f}" for name in ("loss", "sparsity", "target")}
            bar.set_postfix(shown, refresh=False)
            if saver is not None and world.is_main and (step + 1) % SAVE_EVERY == 0:
                saver.save({"gates": gates.state_dict(), "curve": curve, "timings": timings, "step": step + 1})
    masks, update = gates.found()
    return Learned(
        project(topology, masks, target_sparsity, axes),
        update,
        curve,
        step_seconds=_median(timings["step"]),
        bare_step_seconds=_median(timings["bare"]),
        teacher_seconds=_median(timings["teacher"]),
    )


@torch.no_grad()
def _teacher(gated: GatedModel, input_ids: Tensor) -> Tensor:
    return hidden_states(gated, input_ids=input_ids)


def _bare_step(gated: GatedModel, settings: GateTraining, batch: Batch) -> None:
    """What a step would cost without gates: to measure, not to learn from."""
    gated.clear()
    embedded = embedding(gated.model)(batch.input_ids).detach().requires_grad_()
    objective(gated, settings, batch, inputs_embeds=embedded).loss.backward()


def _timed(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    synchronise(device)
    started = time.perf_counter()
    result = work()
    synchronise(device)
    return result, time.perf_counter() - started


def _median(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).median()) if values else 0.0


def _batch(input_ids: Tensor, first: int, windows: range) -> Tensor:
    """int64 [windows, seq]: those at these indices of the batch that begins at window `first`, in a round."""
    return input_ids[[(first + window) % len(input_ids) for window in windows]].long()


def _pool_size(topology: Topology, input_ids: Tensor) -> int:
    """Enough for one window at the widest site a gate multiplies at, with room for offsets."""
    widest = max(topology.hidden, topology.intermediate, topology.kv_heads * topology.query_rows)
    return 2 * input_ids.shape[1] * widest
