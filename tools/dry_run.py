"""What a file of parameters comes to, before anything is downloaded: widths, parameters and memory.

    python -m tools.dry_run configs/llama-3-8b-24gb.yaml

builds the model on the meta device from its published config, drops units by random scores as far as the target asks,
adapts their number, and counts. Sizes follow from the target; which units go, only a run can say.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from tvaprune.architecture.topology import AXES, Axis, Topology
from tvaprune.checkpoint.fold import weight_update
from tvaprune.checkpoint.layouts import dense_tensors, plan
from tvaprune.checkpoint.loading import load_config
from tvaprune.gates.insertion import GatedModel, hard_gates
from tvaprune.gates.memory import training_memory
from tvaprune.gates.state import GateTraining
from tvaprune.masks.adapt import adapt
from tvaprune.masks.masks import Masks, sparsity
from tvaprune.masks.projection import project
from tvaprune.methods import check_method
from tvaprune.params.adapt_dimensions import AdaptDimensionsParams
from tvaprune.params.everything import check_everything
from tvaprune.params.fetch_inputs import FetchInputsParams
from tvaprune.params.finetune_lora import FinetuneLoraParams
from tvaprune.params.learn_masks import LearnMasksParams
from tvaprune.params.profile_hardware import ProfileHardwareParams
from tvaprune.params.sample_calibration import SampleCalibrationParams
from tvaprune.recovery.memory import finetuning_memory

PUBLISHED = Path("configs/models")


@dataclass(frozen=True)
class Sizes:
    """What the parameters make of the model.

    Attributes:
        config, student: of the dense model, and of the pruned one as `compact` would write it.
        masks: projected and adapted.
        parameters_dense, parameters_kept: of the whole models; a tied head counts once.
        sparsity: share of the decoder layers' parameters that went.
    """

    config: PreTrainedConfig
    student: PreTrainedConfig
    masks: Masks
    parameters_dense: int
    parameters_kept: int
    sparsity: float


def published_config(params_file: Path) -> Path:
    """Where the config of the model that the parameters name is: configs/models, by the repository's or package's name.

    Raises:
        FileNotFoundError: it is not there.
    """
    source = FetchInputsParams.load(params_file).model
    name = getattr(source, "repo", None) or getattr(source, "name", None) or source.path.name  # type: ignore[union-attr]
    directory = PUBLISHED / name.rpartition("/")[2]
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{directory}: no config.json of {name}; name a directory that has it with --model")
    return directory


def random_masks(topology: Topology, target_sparsity: float, axes: tuple[Axis, ...] = AXES) -> Masks:
    """Random importances and means, projected onto the target."""
    generator = torch.Generator().manual_seed(1)
    scores = {axis: torch.randn(topology.gate_shape(axis), generator=generator) for axis in AXES}
    means = {axis: 1 + 0.1 * torch.randn(topology.gate_shape(axis), generator=generator) for axis in AXES}
    everything = {axis: score > 0 for axis, score in scores.items()}
    return project(topology, Masks(everything, scores, means), target_sparsity, axes)


def sizes(params_file: Path, model: Path) -> Sizes:
    """Check the parameters, build the dense model with gates and the pruned one on the meta device, and count.

    Raises:
        ValueError: parameters that are wrong, or do not fit the model.
    """
    check_everything(params_file)
    learn, adapting = LearnMasksParams.load(params_file), AdaptDimensionsParams.load(params_file)
    config = load_config(model)
    topology = Topology.of(config)
    check_method(learn.method, learn.axes, learn.sparsity, topology)
    dropped = random_masks(topology, learn.sparsity, learn.axes)
    timed = ProfileHardwareParams.load(params_file)
    # Which widths `measured` takes, the hardware says; they are multiples of what it times.
    multiples = adapting.multiples() or (timed.hidden_step, timed.intermediate_step)
    masks = adapt(topology, dropped, learn.sparsity, adapting.rounding, *multiples, adapting.layout)
    run_gated(config, topology, masks)
    student = pruned_config(config, masks, adapting.layout)
    return Sizes(config, student, masks, parameters(config), parameters(student), sparsity(topology, masks))


def memory(
    params_file: Path, found: Sizes, dtype: torch.dtype = torch.bfloat16, device_type: str = "cuda"
) -> dict[str, dict[str, int]]:
    """Bytes by stage and part, on one device; fine-tuning only where it is enabled."""
    windows = SampleCalibrationParams.load(params_file)
    learn, recover = LearnMasksParams.load(params_file), FinetuneLoraParams.load(params_file)
    gates = GateTraining(**learn.gates.model_dump())
    bytes_of = {
        "learn_masks": training_memory(
            found.config, gates, windows.seq_len, dtype, device_type, learn.gradient_checkpointing
        )
    }
    if recover.enabled:
        bytes_of["finetune_lora"] = finetuning_memory(
            found.student, found.config, recover.options, windows.finetune_seq_len, dtype, device_type
        )
    return bytes_of


def run_gated(config: PreTrainedConfig, topology: Topology, masks: Masks) -> None:
    """Place the gates in the dense model and run it, on the meta device: what does not fit raises."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        gates = {axis: gate.to("meta") for axis, gate in hard_gates(masks.keep, masks.mu).items()}
        with GatedModel(model, topology).inserted() as gated:
            gated.set(gates, int(masks.keep["hidden"].sum()))
            model(torch.zeros(1, 8, dtype=torch.int64))


def pruned_config(config: PreTrainedConfig, masks: Masks, layout: str) -> PreTrainedConfig:
    """The config that `compact` would write."""
    planned = plan(config, dense_tensors(config), masks, weight_update(masks, "mean"), layout)  # type: ignore[arg-type]
    content = dict(planned.config)
    return AutoConfig.for_model(content.pop("model_type"), **content)


def parameters(config: PreTrainedConfig) -> int:
    """Of a model of this config; a tied head counts once."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())


def size_lines(found: Sizes) -> Iterator[str]:
    """What to print of the sizes."""
    yield f"dense   {found.parameters_dense:,} parameters"
    yield f"pruned  {found.parameters_kept:,} parameters; {found.sparsity:.4f} of the decoder layers' removed"
    for axis, widths in found.masks.widths().items():
        counts = widths.flatten().tolist()
        spread = str(counts[0]) if axis == "hidden" else f"{min(counts)} to {max(counts)} a layer"
        yield f"        {axis}: {spread}, of {found.masks.keep[axis].shape[-1]}"


def main(
    params_file: Annotated[Path, typer.Argument(help="Parameters: params.yaml or a file of configs/.")],
    model: Annotated[
        Path | None, typer.Option(help="Directory with the model's config.json; without it, that of configs/models.")
    ] = None,
) -> None:
    """Print the widths, the parameters and the memory that the parameters come to."""
    directory = model or published_config(params_file)
    found = sizes(params_file, directory)
    typer.echo(f"{params_file} on {directory.name}")
    for line in size_lines(found):
        typer.echo(line)
    for stage, parts in memory(params_file, found).items():
        shown = " + ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items() if name != "total")
        typer.echo(f"{stage}: {parts['total'] / 1e9:.2f} GB on CUDA in bfloat16 ({shown})")


if __name__ == "__main__":
    typer.run(main)
