"""The speedup that masks give on this machine, before any weight is downloaded.

    python -m tools.mask_speed --model configs/models/Mistral-7B-v0.1 --masks artifacts/published --multiple 128

times the dense model and the pruned one in turn, both with random weights. It needs the model's config.json, a masks
artifact, and an otherwise idle machine.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer

from tools import markdown
from tools.markdown import SPEEDUP, speedup_cells
from tvaprune.architecture.topology import Topology
from tvaprune.checkpoint.loading import load_config
from tvaprune.checkpoint.random_model import LayerWidths, random_models
from tvaprune.device import pick_device, pick_dtype
from tvaprune.masks.adapt import adapt
from tvaprune.masks.latency_table import PHASES
from tvaprune.masks.masks import Masks, read_masks, sparsity
from tvaprune.measures.latency import Benchmark, compare
from tvaprune.measures.machine import machine_name
from tvaprune.measures.speed_report import speed_metrics
from tvaprune.runtime.packed import pick_runtime


def main(
    model: Annotated[Path, typer.Option(help="Directory with the dense model's config.json.")] = Path("data/model"),
    masks: Annotated[Path, typer.Option(help="Masks artifact.")] = Path("artifacts/adapted"),
    multiple: Annotated[
        int,
        typer.Option(help="First adapt hidden and intermediate widths to multiples of this; 1 leaves them.", min=1),
    ] = 1,
    target: Annotated[
        float | None,
        typer.Option("--sparsity", help="For --multiple: the sparsity to keep to; the default is the masks' own."),
    ] = None,
    batch_sizes: Annotated[str, typer.Option(help="Sequences at once, separated by commas.")] = "1",
    prefill_tokens: Annotated[int, typer.Option(help="Prompt length of the prefill.", min=1)] = 512,
    decode_prompt_tokens: Annotated[int, typer.Option(help="Prompt length before decoding.", min=1)] = 64,
    decode_tokens: Annotated[int, typer.Option(help="Steps decoded.", min=1)] = 64,
    repeats: Annotated[int, typer.Option(help="Rounds that count.", min=3)] = 7,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    runtime: Annotated[str, typer.Option(help="auto, eager, packed (CPU), graphs (CUDA) or compile.")] = "auto",
) -> None:
    """Print the table, in Markdown."""
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
            found = metrics[phase]
            latencies = [f"{found[name]['latency_ms']:.2f}" for name in models]
            rows.append([str(batch), phase, *latencies, *speedup_cells(found)])
    print(markdown.table(["batch", "", "dense ms", "pruned ms", *SPEEDUP], rows))


if __name__ == "__main__":
    typer.run(main)
