"""Try a file of parameters on this machine, before anything is downloaded: time and memory of real steps.

    python -m tools.try_steps configs/llama-3-8b-80gb.yaml

takes some steps of mask learning and of fine-tuning at the model's sizes, with random weights and random text, on the
device that the stages would use. It prints seconds a step, the ratio to a step without gates, and the memory beside the
estimates of `tvaprune estimate`.
"""

import gc
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer import Argument, Option, echo

from stages._command import command
from tvaprune.architecture.attention import use_training_attention
from tvaprune.architecture.topology import LayerWidths, Topology
from tvaprune.checkpoint.random_model import random_models
from tvaprune.cost import peak_memory_bytes
from tvaprune.device import pick_device, pick_dtype, synchronise
from tvaprune.distributed import ALONE, Process
from tvaprune.estimate import Sizes, config_directory, memory, sizes
from tvaprune.gates.insertion import GatedModel
from tvaprune.gates.objective import objective
from tvaprune.gates.training import new_gates
from tvaprune.measures.latency import random_prompt
from tvaprune.measures.machine import machine_name
from tvaprune.options.gates import GateOptions, GraspruneOptions
from tvaprune.progress import Progress
from tvaprune.recovery.schedule import total_steps
from tvaprune.recovery.training import finetune
from tvaprune.resume import NoState


def with_steps(options: GateOptions, steps: int) -> GateOptions:
    """The same options for another number of steps; the two phases of grasprune keep their shares."""
    if isinstance(options, GraspruneOptions):
        masks = max(1, round(steps * options.mask_steps / options.steps))
        return replace(options, mask_steps=masks, scale_steps=steps - masks)
    return replace(options, steps=steps)


def random_dense(found: Sizes, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The dense model with random weights."""
    with device:
        return AutoModelForCausalLM.from_config(found.config, dtype=dtype).eval()


def try_learning(found: Sizes, dense: PreTrainedModel, steps: int) -> dict[str, Any]:
    """Steps of learn_masks, each beside the same forward, objective and backward without gates.

    Returns median seconds of the bare step and of the gates' step.
    """
    request, size = found.request, found.request.options.batch_size
    ids = random_prompt(dense, size * steps, found.windows.seq_len)
    topology, options = Topology.of(dense.config), with_steps(request.options, steps)
    gates = new_gates(topology, options, request.sparsity, request.axes, dense.device, seed=0)
    dense.requires_grad_(False)
    use_training_attention(dense, dense.device)
    if request.gradient_checkpointing:
        dense.activation_checkpointing_enable()
        dense.train()
    seconds: dict[str, list[float]] = {"bare": [], "gates": []}
    with GatedModel(dense, topology).inserted() as gated:
        gates.start(gated, ids[:2], ALONE, progress=True)
        for step, windows in enumerate(Progress(ids.split(size), desc="steps")):
            gated.clear()
            dense.enable_input_require_grads()
            with timed(dense.device, seconds["bare"]):
                objective(dense, windows).backward()
            dense.disable_input_require_grads()
            with timed(dense.device, seconds["gates"]):
                gates.step(gated, windows, step, ALONE)
    median = {f"{name}_s": statistics.median(values) if values else 0.0 for name, values in seconds.items()}
    asked = {"steps": request.options.steps, "batch_size": size, "checkpointing": request.gradient_checkpointing}
    return _figures("learn_masks", found, dense, median | asked)


@contextmanager
def timed(device: torch.device, seconds: list[float]) -> Iterator[None]:
    """Append how long the block took, with the device's work done."""
    synchronise(device)
    started = time.perf_counter()
    yield
    synchronise(device)
    seconds.append(time.perf_counter() - started)


def try_finetuning(found: Sizes, dense: PreTrainedModel, steps: int, device: torch.device) -> dict[str, Any]:
    """Steps of finetune_lora, on the widths that the parameters come to: without a teacher, and as they say.

    Returns mean seconds of both. Moves the dense model to host memory, where the stage loads it.
    """
    asked = replace(found.recover.options, steps=steps, epochs=None, validate_every=steps, seed=0)
    alone = replace(asked, teacher="none", ce_weight=1.0)
    ids = random_prompt(dense, asked.windows_per_step * steps, found.windows.finetune_seq_len)
    seconds = {}
    for name, options in {"alone_s": alone, "step_s": asked}.items():
        dense.eval().to("cpu")
        (student,) = random_models(
            found.config, [LayerWidths.of_counts(found.masks.widths())], dense.dtype, dense.device
        )
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        with tempfile.TemporaryDirectory() as work:
            done = finetune(student, dense, ids, ids[:2], options, Process(device), NoState(Path(work)))
        seconds[name] = done.metrics["step_seconds"]
        del student, done  # on the device
    total = total_steps(found.recover.options, found.windows.finetune_samples)
    return _figures("finetune_lora", found, dense, {**seconds, "teacher": asked.teacher, "steps": total})


def _figures(stage: str, found: Sizes, dense: PreTrainedModel, measured: dict[str, Any]) -> dict[str, Any]:
    """What was measured, and the peak of memory so far beside its estimate."""
    device = pick_device()
    estimate = memory(found, dense.dtype, device.type)[stage]["total"]
    return measured | {"peak_memory_bytes": peak_memory_bytes(device), "estimated_memory_bytes": estimate}


def _say(stage: str, figures: dict[str, Any], seconds: float, ratio: str) -> None:
    peak, estimate, steps = (figures[name] for name in ("peak_memory_bytes", "estimated_memory_bytes", "steps"))
    echo(
        f"{stage}: {seconds:.3f} s a step, {seconds * steps / 60:.1f} minutes for {steps}; "
        f"{peak / 1e9:.2f} GB (on a CPU of the whole process), estimated {estimate / 1e9:.2f}"
    )
    echo(f"{stage}: {ratio}")


@command
def main(
    params_file: Annotated[Path, Argument(help="Parameters: params.yaml or a file of configs/.")],
    model: Annotated[Path | None, Option(help="Directory with the model's config.json; see configs/models.")] = None,
    steps: Annotated[int, Option(help="Steps of each; the first are slower.", min=2)] = 10,
) -> None:
    """Prints seconds a step and memory of learn_masks and finetune_lora."""
    found = sizes(params_file, model or config_directory(params_file))
    device = pick_device()
    dtype = pick_dtype(device)
    if not found.request.trains_gates:
        raise ValueError(f"{params_file}: learn_masks.method = {found.request.method} takes no steps")
    if found.request.latency:
        raise ValueError(f"{params_file}: a latency budget needs a measured table; set learn_masks.budget to params")
    echo(f"{params_file}: {found.parameters_dense:,} parameters in {dtype} on {machine_name(device)}")
    dense = random_dense(found, dtype, device)
    learned = try_learning(found, dense, steps)
    ratio = f"a step takes {learned['gates_s'] / learned['bare_s']:.2f} times one without gates"
    _say("learn_masks", learned, learned["gates_s"], ratio)
    if found.recover.enabled:
        tuned = try_finetuning(found, dense, steps, device)
        ratio = f"a step takes {tuned['step_s'] / tuned['alone_s']:.2f} times one without a teacher"
        _say("finetune_lora", tuned, tuned["step_s"], ratio)
