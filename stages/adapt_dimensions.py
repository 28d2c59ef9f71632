"""Adapt the kept dimensions to the hardware's multiples."""

from pathlib import Path
from typing import Annotated

from typer import Option, echo

from stages._command import command
from stages._options import Config, Metrics, ParamsFile
from tvaprune.architecture.parameter_counts import sparsity
from tvaprune.architecture.topology import Topology
from tvaprune.artifacts import read_artifact, write_json
from tvaprune.checkpoint.config import load_config
from tvaprune.masks.adapt import adapt, adapt_metrics
from tvaprune.masks.latency_table import PHASES, latency_metrics, read_table
from tvaprune.masks.masks import IMPORTED, read_masks, write_masks
from tvaprune.masks.measured import widths_within_parameters
from tvaprune.masks.projection import keep_widths
from tvaprune.params.adapt_dimensions import AdaptDimensionsParams


@command
def main(
    model: Config = Path("data/model"),
    masks: Annotated[Path, Option(help="Masks artifact to adapt.")] = Path("artifacts/masks"),
    profile: Annotated[Path, Option(help="Latency table, for measured widths.")] = Path("artifacts/profile"),
    adapted: Annotated[Path, Option(help="Masks artifact to write.")] = Path("artifacts/adapted"),
    metrics: Metrics = Path("metrics/adapt.json"),
    params_file: ParamsFile = Path("params.yaml"),
) -> None:
    """Reads data/model/config.json, artifacts/masks, artifacts/profile and params.yaml (adapt_dimensions, sparsity,
    compact.layout, learn_masks.latency); writes artifacts/adapted, whose widths are multiples, and metrics/adapt.json.
    Masks learned for a latency have widths that were timed, which are multiples, and stay as they are. Imported masks
    keep their own sparsity.
    """
    params = AdaptDimensionsParams.load(params_file)
    topology = Topology.of(load_config(model))
    before = read_masks(masks, topology)
    _, meta = read_artifact(masks, "masks")
    target = params.sparsity
    if IMPORTED in meta["made_with"]:
        target = sparsity(topology, before.widths())
        echo(
            f"the masks are imported: their sparsity, {target:.4f}, is kept in place of params.yaml's {params.sparsity}"
        )
    table = None
    if params.latency:
        table, after = read_table(profile, topology).rising(), before
    elif multiples := params.multiples():
        after = adapt(topology, before, target, params.rounding, *multiples, layout=params.layout)
    else:
        table = read_table(profile, topology)
        chosen = widths_within_parameters(
            topology, before, table, params.latency_phase, params.layout, target, params.slack
        )
        after = keep_widths(before, chosen.hidden, chosen.intermediate, chosen.kv_heads)
    made_with = meta["made_with"] | params.used()
    write_masks(adapted, after, made_with=made_with, validation_ppl=meta["validation_ppl"])
    report = adapt_metrics(topology, before, after, None if params.latency else target)
    if table:
        report |= latency_metrics(topology, table, after, params.layout == "padded")
        shares = [f"{phase} {report[phase]['predicted_share']:.2f}" for phase in PHASES]
        echo(f"predicted of the dense latency on {table.made_on['processor']}: {', '.join(shares)}")
    write_json(metrics, report)
    echo(
        f"hidden {report['hidden_before']:.0f} -> {report['hidden_after']:.0f}, "
        f"sparsity {report['sparsity_before']:.4f} -> {report['sparsity_decoder']:.4f}"
    )
