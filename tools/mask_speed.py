"""The speedup that masks give on this machine, before any weight is downloaded.

    python -m tools.mask_speed --model configs/models/Mistral-7B-v0.1 --masks artifacts/published --multiple 128

times the dense model and the pruned one in turn, both with random weights. It needs the model's config.json, a masks
artifact, and an otherwise idle machine.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from transformers import PreTrainedConfig
from typer import Option

from stages._command import command
from stages._options import Config
from tvaprune.architecture.parameter_counts import sparsity
from tvaprune.architecture.topology import LayerWidths, Topology
from tvaprune.checkpoint.config import load_config
from tvaprune.checkpoint.random_model import random_models
from tvaprune.device import pick_device, pick_dtype
from tvaprune.masks.adapt import adapt
from tvaprune.masks.latency_table import PHASES
from tvaprune.masks.masks import read_masks
from tvaprune.measures import markdown
from tvaprune.measures.latency import Benchmark, PhaseTimes, compare
from tvaprune.measures.machine import machine_name
from tvaprune.measures.markdown import SPEEDUP, speedup_cells
from tvaprune.measures.speed_report import summarise
from tvaprune.runtime.packed import Runtime, pick_runtime


def time_widths(
    config: PreTrainedConfig,
    widths: dict[str, LayerWidths],
    batch_sizes: list[int],
    benchmark: Benchmark,
    runtime: Runtime,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[int, tuple[PhaseTimes, PhaseTimes]]:
    """Prefill and decode by batch size, of models with random weights at these widths; one is named "dense"."""
    models = dict(zip(widths, random_models(config, list(widths.values()), dtype, device), strict=True))
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the models took before they shared their weights; graphs cannot use it
    return compare(models, batch_sizes, benchmark, runtime)


def against_dense(phase: PhaseTimes, work_name: str) -> dict[str, dict[str, Any]]:
    """Each model's medians, with its speedup over the dense model, the limit and the efficiency; see `summarise`."""
    found = {}
    for name in phase.latency_ms:
        pair = {"dense": phase.latency_ms["dense"], "compact": phase.latency_ms[name]}
        work = {"dense": phase.work["dense"], "compact": phase.work[name]}
        summary = summarise(replace(phase, latency_ms=pair, work=work), work_name)
        found[name] = summary.pop("compact") | {key: value for key, value in summary.items() if key != "dense"}
    return found


@command
def main(
    model: Config = Path("data/model"),
    masks: Annotated[Path, Option(help="Masks artifact.")] = Path("artifacts/adapted"),
    multiple: Annotated[int, Option(help="First adapt hidden and intermediate to multiples of this.", min=1)] = 1,
    target: Annotated[float | None, Option("--sparsity", help="For --multiple; the default is the masks' own.")] = None,
    batch_sizes: Annotated[str, Option(help="Sequences at once, separated by commas.")] = "1",
    prefill_tokens: Annotated[int, Option(help="Prompt length of the prefill.", min=1)] = 512,
    decode_prompt_tokens: Annotated[int, Option(help="Prompt length before decoding.", min=1)] = 64,
    decode_tokens: Annotated[int, Option(help="Steps decoded.", min=1)] = 64,
    repeats: Annotated[int, Option(help="Rounds that count.", min=3)] = 7,
    dtype: Annotated[str, Option(help="auto, float32 or bfloat16.")] = "auto",
    runtime: Annotated[str, Option(help="auto, eager, packed (CPU), graphs (CUDA) or compile.")] = "auto",
) -> None:
    """Reads the config and the masks; prints the table, in Markdown."""
    config, device = load_config(model), pick_device()
    topology = Topology.of(config)
    kept = read_masks(masks, topology)
    if multiple > 1:
        kept = adapt(topology, kept, target or sparsity(topology, kept.widths()), "budget", multiple, multiple)
    chosen, how = pick_dtype(device, dtype), pick_runtime(runtime, device)  # type: ignore[arg-type]
    widths = {"dense": LayerWidths.dense(topology), "pruned": LayerWidths.of_counts(kept.widths())}
    benchmark = Benchmark(prefill_tokens, decode_prompt_tokens, decode_tokens, repeats, max_warmup=3)
    sizes = [int(size) for size in batch_sizes.split(",")]
    timed = time_widths(config, widths, sizes, benchmark, how, chosen, device)
    print(
        f"{machine_name(device)}, {str(chosen).removeprefix('torch.')}, runtime {how}, torch {torch.__version__}; "
        f"{sparsity(topology, kept.widths()):.4f} of the decoder removed; prefill of {prefill_tokens} tokens, "
        f"decode of {decode_tokens} after {decode_prompt_tokens}\n"
    )
    rows = []
    for batch, phases in timed.items():
        for name, phase in zip(PHASES, phases, strict=True):
            found = against_dense(phase, "work")
            latencies = [f"{each['latency_ms']:.2f}" for each in found.values()]
            rows.append([str(batch), name, *latencies, *speedup_cells(found["pruned"])])
    print(markdown.table(["batch", "", "dense ms", "pruned ms", *SPEEDUP], rows))
