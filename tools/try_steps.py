"""Whether a file of parameters fits this machine, and how long it takes, before anything is downloaded.

    python -m tools.try_steps configs/llama-3-8b-80gb.yaml

takes some real steps of mask learning and of fine-tuning at the model's sizes, with random weights and random text,
on the device that the stages would take, and prints seconds and memory beside the estimates of tools.dry_run.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM

from tools.alignment_table import layer_widths
from tools.dry_run import memory, published_config, sizes
from tvaprune.checkpoint.random_model import random_models
from tvaprune.cost import peak_memory_bytes
from tvaprune.device import pick_device, pick_dtype
from tvaprune.gates.state import GateTraining
from tvaprune.measures.machine import machine_name
from tvaprune.methods import find_masks
from tvaprune.params.finetune_lora import FinetuneLoraParams
from tvaprune.params.learn_masks import LearnMasksParams
from tvaprune.params.sample_calibration import SampleCalibrationParams
from tvaprune.recovery.lora import LoraSettings
from tvaprune.recovery.schedule import Schedule
from tvaprune.recovery.training import Objective, finetune


class _Forgetful:
    """A run's state that is not kept."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def load(self) -> None:
        return None

    def save(self, state: dict[str, Any]) -> None:
        pass


def main(
    params_file: Annotated[Path, typer.Argument(help="Parameters: params.yaml or a file of configs/.")],
    model: Annotated[
        Path | None, typer.Option(help="Directory with the model's config.json; without it, that of configs/models.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of each; the first are slower.", min=2)] = 10,
) -> None:
    """Print seconds a step and memory of learn_masks and finetune_lora."""
    found = sizes(params_file, model or published_config(params_file))
    device = pick_device()
    dtype = pick_dtype(device)
    estimates = memory(params_file, found, dtype, device.type)
    typer.echo(f"{params_file}: {found.parameters_dense:,} parameters in {dtype} on {machine_name(device)}")
    windows = SampleCalibrationParams.load(params_file)
    learn, recover = LearnMasksParams.load(params_file), FinetuneLoraParams.load(params_file)
    generator = torch.Generator().manual_seed(0)

    def text(count: int, tokens: int) -> torch.Tensor:
        return torch.randint(found.config.vocab_size, (count, tokens), generator=generator)

    with device:
        dense = AutoModelForCausalLM.from_config(found.config, dtype=dtype).eval()
    gates = replace(GateTraining(**learn.gates.model_dump()), steps=steps, curvature_windows=2)
    learned = find_masks(
        dense, text(gates.batch_size * steps, windows.seq_len), text(2, windows.seq_len), learn.sparsity, gates,
        None, method="tva", axes=learn.axes, seed=0, gradient_checkpointing=learn.gradient_checkpointing,
    )  # fmt: skip
    seconds = learned.step_seconds + learned.teacher_seconds
    _say("learn_masks", seconds, learn.gates.steps, learned.peak_memory_bytes, estimates)
    if not recover.enabled:
        return
    # As the stage loads them: in host memory, and on the device only while they are used there.
    dense.eval().to("cpu")
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    (student,) = random_models(found.config, [layer_widths(found.masks)], dtype, torch.device("cpu"))
    settings, objective = recover.take(LoraSettings), recover.take(Objective)
    schedule = replace(recover.take(Schedule), steps=steps, epochs=None, validate_every=steps)
    ids = text(schedule.windows_a_step * steps, windows.finetune_seq_len)
    with tempfile.TemporaryDirectory() as work:
        done = finetune(
            student, dense, ids, ids[:2], lora=settings, objective=objective, schedule=schedule, seed=0, device=device,
            state=_Forgetful(Path(work)),  # type: ignore[arg-type]
        )  # fmt: skip
    total = recover.take(Schedule).total_steps(windows.finetune_samples)
    _say("finetune_lora", done.metrics["step_seconds"], total, peak_memory_bytes(device), estimates)


def _say(stage: str, seconds: float, steps: int, peak: int, estimates: dict[str, dict[str, int]]) -> None:
    typer.echo(
        f"{stage}: {seconds:.3f} s a step, {seconds * steps / 60:.1f} minutes for {steps}; "
        f"{peak / 1e9:.2f} GB (on a CPU of the whole process), estimated {estimates[stage]['total'] / 1e9:.2f}"
    )


if __name__ == "__main__":
    typer.run(main)
