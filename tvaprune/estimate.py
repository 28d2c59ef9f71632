"""The parameter count and the memory of a run, from its parameters, before any weight is downloaded.

The model is built on the meta device from its config, pruned to the target by random scores, adapted and
counted. Parameters and memory are close to those of a real run. Widths are not: a method chooses its own.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedConfig

import tvaprune.checkpoint.loading  # noqa: F401  registers the class of a pruned model's config
from tvaprune.architecture.parameter_counts import sparsity
from tvaprune.architecture.topology import Topology, check_family
from tvaprune.artifacts import SOURCE_FILE
from tvaprune.checkpoint.config import load_config
from tvaprune.checkpoint.layouts import dense_tensors, plan
from tvaprune.gates.memory import training_memory
from tvaprune.inputs.model import fetch_config
from tvaprune.inputs.sources import LocalSource, ModelHub, ModelSource, describe
from tvaprune.masks.adapt import adapt
from tvaprune.masks.masks import Masks
from tvaprune.masks.projection import project
from tvaprune.masks.update import WeightUpdate
from tvaprune.methods import check_request
from tvaprune.options.axes import AXES, Axis
from tvaprune.options.gates import PerAxis
from tvaprune.options.masks import MaskRequest
from tvaprune.params.adapt_dimensions import AdaptDimensionsParams
from tvaprune.params.everything import check_everything
from tvaprune.params.fetch_inputs import FetchInputsParams
from tvaprune.params.finetune_lora import FinetuneLoraParams
from tvaprune.params.learn_masks import LearnMasksParams
from tvaprune.params.profile_hardware import ProfileHardwareParams
from tvaprune.params.sample_calibration import SampleCalibrationParams
from tvaprune.progress import SHOWN_AFTER_S, Progress
from tvaprune.recovery.memory import finetuning_memory

PUBLISHED = Path("configs/models")  # of a clone
FETCHED = Path("data/model")  # where fetch_inputs puts it


@dataclass(frozen=True)
class Sizes:
    """What is asked for, and the sizes of the dense and the pruned model."""

    request: MaskRequest
    windows: SampleCalibrationParams
    recover: FinetuneLoraParams
    config: PreTrainedConfig  # of the dense model
    student: PreTrainedConfig  # of the pruned model, as `compact` would write it
    masks: Masks  # projected and adapted
    parameters_dense: int  # of the whole model; a tied head counts once
    parameters_kept: int
    sparsity: float  # share of the decoder layers' parameters that is removed


def config_directory(params_file: Path) -> Path:
    """Where the config of the model that the parameters name is.

    That is its own directory, one in configs/models, data/model, or for a repository of the Hub a download.

    Raises:
        FileNotFoundError: it is nowhere; of a local model, `load_config` says so.
        InputError: the Hub does not serve it, or it is damaged.
    """
    source = FetchInputsParams.load(params_file).model
    name = _name(source)
    if isinstance(source, LocalSource):
        return params_file.parent / name
    published, fetched = PUBLISHED / name.rpartition("/")[2], params_file.parent / FETCHED
    if (published / "config.json").is_file():
        return published
    if (fetched / "config.json").is_file() and _is_of(fetched, source):
        return fetched
    if isinstance(source, ModelHub):
        return fetch_config(source)
    raise FileNotFoundError(
        f"{params_file}: fetch_inputs.model is {name}, of which {PUBLISHED} has no config, and {FETCHED} is not "
        "fetched; name a directory that has its config.json with --model"
    )


def _name(source: ModelSource) -> str:
    if isinstance(source, LocalSource):
        return str(source.path)
    return source.repo if isinstance(source, ModelHub) else source.name


def _is_of(fetched: Path, source: ModelSource) -> bool:
    """Whether a directory that fetching wrote holds this source's model, not that of an earlier run."""
    record = fetched / SOURCE_FILE
    found = json.loads(record.read_text()) if record.is_file() else {}
    # Fetching may find the license in the model's readme.
    return all(found.get(key) == value for key, value in describe(source).items() if key != "license")


def random_masks(
    topology: Topology, target_sparsity: float, axes: tuple[Axis, ...] = AXES, ahead: PerAxis | None = None
) -> Masks:
    """Standard normal scores, with a head start of each axis, projected onto the target."""
    generator = torch.Generator().manual_seed(1)
    scores = {
        axis: torch.randn(topology.gate_shape(axis), generator=generator) + getattr(ahead, axis, 0.0) for axis in AXES
    }
    return project(topology, scores, target_sparsity, axes)


def sizes(params_file: Path, model: Path) -> Sizes:
    """Check the parameters, prune the model at random, and count. Raises ValueError for wrong parameters."""
    check_everything(params_file)
    request, adapting = LearnMasksParams.load(params_file).request(), AdaptDimensionsParams.load(params_file)
    config = load_config(model)
    check_family(config)
    topology = Topology.of(config)
    check_request(request, topology)
    ahead = getattr(request.options, "head_start", None)
    masks = random_masks(topology, request.sparsity, request.axes, ahead)
    timed = ProfileHardwareParams.load(params_file)
    # With `measured` the hardware decides; its widths are multiples of these steps.
    multiples = adapting.multiples() or (timed.hidden_step, timed.intermediate_step)
    masks = adapt(topology, masks, request.sparsity, adapting.rounding, *multiples, adapting.layout)
    dense = dense_tensors(config)
    planned = plan(config, dense, masks, WeightUpdate.none(topology), adapting.layout)
    content = dict(planned.config)
    student = AutoConfig.for_model(content.pop("model_type"), **content)
    before, after = (sum(tensor.numel for tensor in tensors.values()) for tensors in (dense, planned.tensors))
    asked = (request, SampleCalibrationParams.load(params_file), FinetuneLoraParams.load(params_file))
    return Sizes(*asked, config, student, masks, before, after, sparsity(topology, masks.widths()))


def memory(found: Sizes, dtype: torch.dtype = torch.bfloat16, device_type: str = "cuda") -> dict[str, dict[str, int]]:
    """Bytes by stage and part, on one device: of gates where they are trained, of fine-tuning where it is enabled."""
    request, windows = found.request, found.windows
    counts: dict[str, Callable[[], dict[str, int]]] = {}
    if request.trains_gates:
        gates = (found.config, request.options, windows.seq_len)
        counts["learn_masks"] = partial(training_memory, *gates, dtype, device_type, request.gradient_checkpointing)
    if found.recover.enabled:
        models = (found.student, found.config, found.recover.options, windows.finetune_seq_len)
        counts["finetune_lora"] = partial(finetuning_memory, *models, dtype, device_type)
    bar = Progress(counts.items(), desc="count a step's memory", unit="stage", delay=SHOWN_AFTER_S)
    return {stage: count() for stage, count in bar}


def size_lines(found: Sizes) -> Iterator[str]:
    yield f"dense   {found.parameters_dense:,} parameters"
    # Widths that a latency gives are known once this machine is timed and the masks are learned.
    unless = " (by sparsity; learn_masks.budget = latency decides)" if found.request.latency else ""
    yield f"pruned  {found.parameters_kept:,} parameters; {found.sparsity:.4f} of the decoder layers' removed{unless}"
    for axis, widths in found.masks.widths().items():
        shown = f"{int(widths)}" if axis == "hidden" else f"{int(widths.min())} to {int(widths.max())} a layer"
        yield f"        {axis}: {shown}, of {found.masks.keep[axis].shape[-1]}"


def report(params_file: Path, model: Path | None = None) -> Iterator[str]:
    """Widths, parameters and memory, a line each; of the model in a directory, or the one that the parameters name."""
    directory = model or config_directory(params_file)
    found = sizes(params_file, directory)
    yield f"{params_file} on {model or _name(FetchInputsParams.load(params_file).model)}"
    yield from size_lines(found)
    for stage, parts in memory(found).items():
        shown = " + ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items() if name != "total")
        yield f"{stage}: {parts['total'] / 1e9:.2f} GB on CUDA in bfloat16 ({shown})"
