"""Train gates over frozen weights, until the target sparsity is met."""

import math
import time
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from tvaprune.architecture.topology import Topology
from tvaprune.distributed import ALONE, World
from tvaprune.gates.budget import BudgetGates
from tvaprune.gates.closed_form import ClosedFormGates
from tvaprune.gates.grasprune import GraspruneGates
from tvaprune.gates.insertion import GatedModel
from tvaprune.gates.objective import Row
from tvaprune.gates.paper import PaperGates
from tvaprune.gates.straight_through import StraightThroughGates
from tvaprune.losses import DivergedError
from tvaprune.masks.masks import Masks
from tvaprune.masks.update import WeightUpdate
from tvaprune.options.axes import Axis
from tvaprune.options.gates import GateOptions, GraspruneOptions, PaperOptions
from tvaprune.progress import Progress
from tvaprune.resume import Saver

SAVE_EVERY = 10
Gates = BudgetGates | PaperGates | GraspruneGates


@dataclass(frozen=True)
class Learned:
    """What training gives."""

    masks: Masks  # projected onto the target
    update: WeightUpdate  # the gates' means
    curve: list[Row]  # one row a step, with the keys of `objective.ROW`
    seconds_before: float = 0.0  # wall time of the processes that the run was resumed from, up to what they saved


def new_gates(
    topology: Topology,
    options: GateOptions,
    target_sparsity: float,
    axes: tuple[Axis, ...],
    device: torch.device,
    seed: int,
) -> Gates:
    """The gates that the options ask for."""
    if isinstance(options, PaperOptions):
        return PaperGates(topology, options, target_sparsity, axes, device, seed)
    if isinstance(options, GraspruneOptions):
        return GraspruneGates(topology, options, target_sparsity, axes, device)
    kind = StraightThroughGates if options.ablation == "deterministic" else ClosedFormGates
    return kind(topology, options, target_sparsity, axes, device, seed)


def learn_gates(
    model: nn.Module,
    input_ids: Int[Tensor, "samples seq"],
    gates: Gates,
    saver: Saver | None = None,
    progress: bool = True,
    world: World = ALONE,
) -> Learned:
    """Train the gates; the model's weights stay frozen.

    Args:
        model: causal LM on the gates' device; weights in any floating dtype.
        input_ids: taken in order, again from the start when exhausted.
        saver: state is read from it first and written to it, by rank 0, as training goes.
        world: the processes that share each step's windows; all end with the same gates.

    Raises:
        ValueError: a step's windows cannot be shared equally, or curvature_tokens does not divide seq_len.
        DivergedError: the loss or its gradient is not finite; what was saved stays.
    """
    options = gates.options
    own_windows = range(options.batch_size)[world.part(options.batch_size, f"learn_masks.{options.method}.batch_size")]
    device = next(model.parameters()).device
    curve: list[Row] = []
    started, seconds_before = time.perf_counter(), 0.0
    state = saver.load() if saver is not None else None
    with GatedModel(model, gates.topology).inserted() as gated:
        if state is not None:
            gates.load_state_dict(state["gates"])
            curve, seconds_before = state["curve"], state["seconds"]
        else:
            gates.start(gated, input_ids, world, progress)
        steps = range(len(curve), options.steps)
        bar = Progress(steps, initial=len(curve), total=options.steps, desc="gates", disable=not progress)
        for step in bar:
            indices = [(step * options.batch_size + window) % len(input_ids) for window in own_windows]
            windows = input_ids[indices].long().to(device)
            row = gates.step(gated, windows, step, world)
            if not math.isfinite(row["loss"]) or not math.isfinite(row["gradient_norm"]):
                raise DivergedError(
                    f"learn_masks: step {step + 1}, windows {indices}: loss {row['loss']}, gradient norm "
                    f"{row['gradient_norm']}. Check the model's weights for NaN; use TVAPRUNE_DTYPE=float32, or a "
                    f"lower learning rate in learn_masks.{options.method}. "
                    f"The state of the last {SAVE_EVERY} steps is kept"
                )
            curve.append({"step": step + 1, **row})
            bar.set_postfix({name: f"{row[name]:.3f}" for name in ("loss", "sparsity", "target")}, refresh=False)
            if saver is not None and world.is_main and (step + 1) % SAVE_EVERY == 0:
                seconds = seconds_before + time.perf_counter() - started
                saver.save({"gates": gates.state_dict(), "curve": curve, "seconds": seconds})
    return Learned(*gates.learned(), curve, seconds_before)
