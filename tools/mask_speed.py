"""What masks are worth in speed on this machine, before any weight is downloaded.

    python -m tools.mask_speed --model configs/models/Mistral-7B-v0.1 --masks artifacts/published --multiple 128

times the dense model and the one that the masks leave, both of random weights, side by side. It needs the model's
config.json, a masks artifact, and a machine that does nothing else.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer

from tools.alignment_table import layer_widths
from tvaprune.architecture.parameter_counts import sparsity
from tvaprune.architecture.topology import Topology
from tvaprune.checkpoint.loading import load_config
from tvaprune.checkpoint.random_model import random_models
from tvaprune.device import pick_device, pick_dtype
from tvaprune.masks.adapt import adapt
from tvaprune.masks.latency_table import PHASES
from tvaprune.masks.masks import Masks, read_masks
from tvaprune.measures.latency import compare
from tvaprune.measures.machine import machine_name
from tvaprune.measures.speed_report import speed_metrics
from tvaprune.runtime.packed import pick_runtime


def main(
    model: Annotated[Path, typer.Option(help="Directory with the dense model's config.json.")] = Path("data/model"),
    masks: Annotated[Path, typer.Option(help="Masks artifact.")] = Path("artifacts/adapted"),
    multiple: Annotated[
        int,
        typer.Option(help="Adapt hidden and intermediate widths to multiples of this first; 1: as they are.", min=1),
    ] = 1,
    target: Annotated[
        float | None,
        typer.Option("--sparsity", help="For --multiple: the sparsity to keep to; without, the masks' own."),
    ] = None,
    batch_sizes: Annotated[str, typer.Option(help="Sequences at once, with commas.")] = "1",
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
    widths = [layer_widths(Masks.dense(topology)), layer_widths(kept)]
    models = dict(zip(("dense", "compact"), random_models(config, widths, chosen, device), strict=True))
    batches = [int(size) for size in batch_sizes.split(",")]
    timed = compare(models, batches, prefill_tokens, decode_prompt_tokens, decode_tokens, repeats, 3, how)
    name = str(chosen).removeprefix("torch.")
    print(f"{machine_name(device)}, {name}, runtime {how}, torch {torch.__version__}; ", end="")
    removed = f"{sparsity(topology, kept.widths()):.4f} of the decoder removed"
    print(f"{removed}; prefill of {prefill_tokens} tokens, decode of {decode_tokens} after {decode_prompt_tokens}")
    print("\n| batch | | dense ms | pruned ms | speedup | limit | efficiency |\n|---|---|---|---|---|---|---|")
    for batch, phases in timed.items():
        metrics = speed_metrics({batch: phases})
        for phase in PHASES:
            found = metrics[phase]
            cells = [f"{found[model]['latency_ms']:.2f}" for model in models]
            cells += [f"{found['speedup']:.2f}×", f"{found['limit']:.2f}×", f"{found['efficiency']:.2f}"]
            print(f"| {batch} | {phase} | {' | '.join(cells)} |")


if __name__ == "__main__":
    typer.run(main)
