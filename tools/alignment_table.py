"""What alignment is worth on this machine: the paper's Table 5, with measured latencies.

    python -m tools.alignment_table

adapts the masks to multiples of 1, 8, 16, 32, 64 and 128 and to the measured table, all within the same parameters,
times models of those widths in turn, and prints a row for each. It needs artifacts/profile of a run with
adapt_dimensions.multiple: measured, and a machine that does nothing else.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoTokenizer

from tvaprune.architecture.parameter_counts import sparsity
from tvaprune.architecture.topology import Topology
from tvaprune.checkpoint.cut import compact
from tvaprune.checkpoint.fold import weight_update
from tvaprune.checkpoint.loading import load, load_config
from tvaprune.checkpoint.random_model import LayerWidths, random_models
from tvaprune.device import DTYPES
from tvaprune.masks.adapt import adapt
from tvaprune.masks.latency_table import PHASES, LatencyTable, read_table
from tvaprune.masks.masks import Masks, read_masks
from tvaprune.masks.measured import adapt_measured
from tvaprune.measures.latency import compare
from tvaprune.measures.perplexity import evaluate, heldout_windows, read_texts
from tvaprune.params.adapt_dimensions import AdaptDimensionsParams
from tvaprune.params.eval_perplexity import EvalPerplexityParams

MULTIPLES = (1, 8, 16, 32, 64, 128)


def layer_widths(masks: Masks) -> LayerWidths:
    """The widths that masks leave."""
    widths = masks.widths()
    return LayerWidths(int(widths["hidden"]), widths["intermediate"].tolist(), widths["kv_heads"].tolist())


def alternatives(
    topology: Topology, masks: Masks, table: LatencyTable, params: AdaptDimensionsParams
) -> dict[str, Masks]:
    """Masks by name: dense, each multiple (an axis that it does not divide stays unaligned), measured."""
    found = {"dense": Masks.dense(topology)}
    for multiple in MULTIPLES:
        each = [multiple if width % multiple == 0 else 1 for width in (topology.hidden, topology.intermediate)]
        found[str(multiple)] = adapt(topology, masks, params.sparsity, "budget", *each)
    goal = (params.sparsity, params.latency_target, params.slack)
    return found | {"measured": adapt_measured(topology, masks, table, params.latency_phase, "uneven", *goal)}


def perplexities(
    model: Path, masks: dict[str, Masks], texts: Path, settings: EvalPerplexityParams, work: Path
) -> dict[str, float]:
    """By name, of the compact models before fine-tuning."""
    windows = heldout_windows(
        read_texts(texts), AutoTokenizer.from_pretrained(model), settings.window, settings.windows
    )
    found = {}
    for name, each in masks.items():
        directory = model
        if name != "dense":
            directory = work / name
            compact(model, each, weight_update(each, "mean"), directory)
        found[name] = evaluate(load(directory, torch.float32), windows, settings.batch_size, name).ppl
    return found


def measured_ms(
    model: Path, masks: dict[str, Masks], table: LatencyTable, repeats: int, max_warmup: int
) -> dict[str, dict[str, float]]:
    """By phase and name, median milliseconds at the table's lengths, dtype and threads."""
    where = table.made_on
    torch.set_num_threads(where["threads"])
    config, device = load_config(model), torch.device(where["device"])
    widths = [layer_widths(each) for each in masks.values()]
    models = dict(zip(masks, random_models(config, widths, DTYPES[where["dtype"]], device), strict=True))
    lengths = (where["prefill_tokens"], where["decode_prompt_tokens"], where["decode_tokens"])
    timed = compare(models, [where["batch"]], *lengths, repeats, max_warmup, where["runtime"])[where["batch"]]
    return {
        phase: {name: statistics.median(values) for name, values in each.latency_ms.items()}
        for phase, each in zip(PHASES, timed, strict=True)
    }


def main(
    model: Annotated[Path, typer.Option(help="The dense model's directory.")] = Path("data/model"),
    masks: Annotated[Path, typer.Option(help="Masks to adapt.")] = Path("artifacts/masks"),
    profile: Annotated[Path, typer.Option(help="Latency table.")] = Path("artifacts/profile"),
    heldout: Annotated[Path, typer.Option(help="Texts for --perplexity.")] = Path("data/heldout"),
    params_file: Annotated[
        Path, typer.Option("--params", help="Parameters; sections adapt_dimensions and eval_perplexity.")
    ] = Path("params.yaml"),
    repeats: Annotated[int, typer.Option(help="Rounds that count.", min=3)] = 9,
    max_warmup: Annotated[int, typer.Option(help="Rounds before, at most.", min=2)] = 5,
    perplexity: Annotated[bool, typer.Option(help="Compact each and measure its perplexity too.")] = False,
) -> None:
    """Print the table, in Markdown."""
    topology = Topology.of(load_config(model))
    table = read_table(profile, topology)
    found = alternatives(topology, read_masks(masks, topology), table, AdaptDimensionsParams.load(params_file))
    ppl: dict[str, float] = {}
    if perplexity:
        with tempfile.TemporaryDirectory() as work:
            ppl = perplexities(model, found, heldout, EvalPerplexityParams.load(params_file), Path(work))
    latency = measured_ms(model, found, table, repeats, max_warmup)
    columns = [f"{phase} ms, {how}" for phase in PHASES for how in ("predicted", "measured", "of dense")]
    print(f"on {table.made_on['processor']}, {table.made_on['dtype']}, {table.made_on['threads']} threads\n")
    print(" | ".join(["| multiple", "sparsity", "hidden", "intermediate", "kv heads", *columns, "perplexity |"]))
    print("|---" * (len(columns) + 6) + "|")
    for name, each in found.items():
        widths = layer_widths(each)
        cells = [name, f"{sparsity(topology, each.widths()):.4f}", str(widths.hidden)]
        cells += [f"{sum(counts) / topology.layers:.1f}" for counts in (widths.intermediate, widths.kv_heads)]
        for phase in PHASES:
            cells.append(f"{table.predict(phase, *widths):.2f}")
            cells += [f"{latency[phase][name]:.2f}", f"{latency[phase][name] / latency[phase]['dense']:.3f}"]
        cells.append(f"{ppl[name]:.2f}" if ppl else "")
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    typer.run(main)
