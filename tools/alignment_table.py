"""The speed of aligned widths on this machine: the paper's Table 5, with measured latencies.

    python -m tools.alignment_table

adapts the masks to multiples of 1, 8, 16, 32, 64 and 128 and to the measured table, all within the same parameters,
times models of those widths in turn, and prints a row for each. It needs artifacts/profile of a run with
adapt_dimensions.multiple: measured, and an otherwise idle machine.
"""

import statistics
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import torch
from transformers import AutoTokenizer
from typer import Option

from stages._command import command
from stages._options import Heldout, Model, ParamsFile
from tools.mask_speed import time_widths
from tvaprune.architecture.parameter_counts import sparsity
from tvaprune.architecture.topology import LayerWidths, Topology
from tvaprune.checkpoint.config import load_config
from tvaprune.checkpoint.cut import compact
from tvaprune.checkpoint.loading import load
from tvaprune.device import DTYPES
from tvaprune.inputs.documents import load_texts
from tvaprune.masks.adapt import adapt
from tvaprune.masks.latency_table import PHASES, LatencyTable, read_table
from tvaprune.masks.masks import Masks, read_masks
from tvaprune.masks.measured import widths_within_parameters
from tvaprune.masks.projection import keep_widths
from tvaprune.masks.update import WeightUpdate, read_update
from tvaprune.measures import markdown
from tvaprune.measures.latency import Benchmark
from tvaprune.measures.perplexity import evaluate, heldout_windows
from tvaprune.params.adapt_dimensions import AdaptDimensionsParams
from tvaprune.params.eval_perplexity import EvalPerplexityParams

MULTIPLES = (1, 8, 16, 32, 64, 128)


def by_multiple(topology: Topology, masks: Masks, target_sparsity: float) -> dict[str, Masks]:
    """Masks adapted to each multiple within the same parameters; axes that it does not divide stay unaligned."""
    found = {}
    for multiple in MULTIPLES:
        hidden, units = (multiple if width % multiple == 0 else 1 for width in (topology.hidden, topology.intermediate))
        found[str(multiple)] = adapt(topology, masks, target_sparsity, "budget", hidden, units)
    return found


def alternatives(
    topology: Topology, masks: Masks, table: LatencyTable, params: AdaptDimensionsParams
) -> dict[str, Masks]:
    """Masks by name: dense, each multiple, measured."""
    chosen = widths_within_parameters(
        topology, masks, table, params.latency_phase, "uneven", params.sparsity, params.slack
    )
    measured = keep_widths(masks, chosen.hidden, chosen.intermediate, chosen.kv_heads)
    return {"dense": Masks.dense(topology), **by_multiple(topology, masks, params.sparsity), "measured": measured}


def perplexities(
    model: Path, masks: dict[str, Masks], update: WeightUpdate, texts: Path, params: EvalPerplexityParams
) -> dict[str, float]:
    """By name, of the compact models before fine-tuning; geometric mean over the validation texts."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    windows = heldout_windows(load_texts(texts), tokenizer, params.window, params.validation, {})
    found = {}
    for name, each in masks.items():
        with tempfile.TemporaryDirectory() as work:
            directory = model if name == "dense" else Path(work)
            if name != "dense":
                compact(model, each, update, directory)
            measured = evaluate(load(directory, torch.float32), windows, params.batch_size, name)["validation"]
            found[name] = statistics.geometric_mean(text.ppl for text in measured.values())
    return found


def measured_ms(
    model: Path, masks: dict[str, Masks], table: LatencyTable, repeats: int, max_warmup: int
) -> dict[str, dict[str, float]]:
    """By phase and name, median milliseconds at the table's lengths, dtype and threads."""
    made_on = table.made_on
    torch.set_num_threads(made_on["threads"])
    widths = {name: LayerWidths.of_counts(each.widths()) for name, each in masks.items()}
    benchmark = Benchmark.of(SimpleNamespace(**made_on, repeats=repeats, max_warmup=max_warmup))
    batch, dtype, device = made_on["batch"], DTYPES[made_on["dtype"]], torch.device(made_on["device"])
    timed = time_widths(load_config(model), widths, [batch], benchmark, made_on["runtime"], dtype, device)[batch]
    return {
        phase: {name: statistics.median(values) for name, values in each.latency_ms.items()}
        for phase, each in zip(PHASES, timed, strict=True)
    }


@command
def main(
    model: Model = Path("data/model"),
    masks: Annotated[Path, Option(help="Masks to adapt.")] = Path("artifacts/masks"),
    means: Annotated[Path, Option(help="Learned means, for --perplexity.")] = Path("artifacts/means"),
    profile: Annotated[Path, Option(help="Latency table.")] = Path("artifacts/profile"),
    heldout: Heldout = Path("data/heldout"),
    params_file: ParamsFile = Path("params.yaml"),
    repeats: Annotated[int, Option(help="Rounds that count.", min=3)] = 9,
    max_warmup: Annotated[int, Option(help="Most rounds of warm-up.", min=2)] = 5,
    perplexity: Annotated[bool, Option(help="Also compact each and measure its perplexity.")] = False,
) -> None:
    """Reads params.yaml (adapt_dimensions, sparsity, eval_perplexity); prints the table, in Markdown."""
    topology = Topology.of(load_config(model))
    table = read_table(profile, topology)
    found = alternatives(topology, read_masks(masks, topology), table, AdaptDimensionsParams.load(params_file))
    ppl: dict[str, float] = {}
    if perplexity:
        update = read_update(means, topology)
        ppl = perplexities(model, found, update, heldout, EvalPerplexityParams.load(params_file))
    latency = measured_ms(model, found, table, repeats, max_warmup)
    print(f"on {table.made_on['processor']}, {table.made_on['dtype']}, {table.made_on['threads']} threads\n")
    columns = [f"{phase} ms, {how}" for phase in PHASES for how in ("predicted", "measured", "of dense")]
    rows = []
    for name, each in found.items():
        widths = LayerWidths.of_counts(each.widths())
        cells = [name, f"{sparsity(topology, each.widths()):.4f}", str(widths.hidden)]
        cells += [f"{sum(counts) / topology.layers:.1f}" for counts in (widths.intermediate, widths.kv_heads)]
        for phase in PHASES:
            measured, dense = latency[phase][name], latency[phase]["dense"]
            cells += [f"{table.predict(phase, *widths):.2f}", f"{measured:.2f}", f"{measured / dense:.3f}"]
        rows.append([*cells, f"{ppl[name]:.2f}" if ppl else ""])
    head = ["multiple", "sparsity", "hidden", "intermediate", "kv heads", *columns, "perplexity"]
    print(markdown.table(head, rows))
