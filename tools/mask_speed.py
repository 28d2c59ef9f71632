"""The speedup that masks give on this machine, before any weight is downloaded.

    python -m tools.mask_speed --model configs/models/Mistral-7B-v0.1 --masks artifacts/published --multiple 128

times the dense model and the pruned one in turn, both with random weights. It needs the model's config.json, a masks
artifact, and an otherwise idle machine.
"""

from pathlib import Path
from typing import Annotated

import torch
from typer import Option

from stages._command import command
from stages._options import Config
from tvaprune.architecture.parameter_counts import sparsity
from tvaprune.architecture.topology import Topology
from tvaprune.checkpoint.loading import load_config
from tvaprune.checkpoint.random_model import LayerWidths, random_models
from tvaprune.device import pick_device, pick_dtype
from tvaprune.masks.adapt import adapt
from tvaprune.masks.latency_table import PHASES
from tvaprune.masks.masks import Masks, read_masks
from tvaprune.measures import markdown
from tvaprune.measures.latency import Benchmark, compare
from tvaprune.measures.machine import machine_name
from tvaprune.measures.markdown import SPEEDUP, speedup_cells
from tvaprune.measures.speed_report import speed_metrics
from tvaprune.runtime.packed import pick_runtime


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
    widths = [LayerWidths.of(each.widths()) for each in (Masks.dense(topology), kept)]
    models = dict(zip(("dense", "compact"), random_models(config, widths, chosen, device), strict=True))
    benchmark = Benchmark(prefill_tokens, decode_prompt_tokens, decode_tokens, repeats, max_warmup=3)
    timed = compare(models, [int(size) for size in batch_sizes.split(",")], benchmark, how)
    print(
        f"{machine_name(device)}, {str(chosen).removeprefix('torch.')}, runtime {how}, torch {torch.__version__}; "
        f"{sparsity(topology, kept.widths()):.4f} of the decoder removed; prefill of {prefill_tokens} tokens, "
        f"decode of {decode_tokens} after {decode_prompt_tokens}\n"
    )
    rows = []
    for batch, phases in timed.items():
        metrics = speed_metrics({batch: phases})
        for phase in PHASES:
            latencies = [f"{metrics[phase][name]['latency_ms']:.2f}" for name in models]
            rows.append([str(batch), phase, *latencies, *speedup_cells(metrics[phase])])
    print(markdown.table(["batch", "", "dense ms", "pruned ms", *SPEEDUP], rows))
