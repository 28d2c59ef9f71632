"""Adapt the kept dimensions to the hardware's multiples."""

from pathlib import Path
from typing import Annotated

import typer

from stages._errors import clear_errors
from tvaprune.architecture.topology import Topology
from tvaprune.artifacts import read_artifact, write_json
from tvaprune.checkpoint.loading import load_config
from tvaprune.masks.adapt import adapt, adapt_metrics
from tvaprune.masks.latency_table import read_table
from tvaprune.masks.masks import read_masks, write_masks
from tvaprune.masks.measured import adapt_measured, latency_metrics
from tvaprune.params.adapt_dimensions import AdaptDimensionsParams

# The scores order the units well near the sparsity that they were learned at. Beyond this difference the stage warns.
SPARSITY_TOLERANCE = 0.05


def main(
    model: Annotated[Path, typer.Option(help="The dense model's directory; only its config is read.")] = Path(
        "data/model"
    ),
    masks: Annotated[Path, typer.Option(help="Masks artifact to adapt.")] = Path("artifacts/masks"),
    profile: Annotated[
        Path, typer.Option(help="Latency table; read where adapt_dimensions.multiple is measured.")
    ] = Path("artifacts/profile"),
    adapted: Annotated[Path, typer.Option(help="Masks artifact to write, widths in multiples.")] = Path(
        "artifacts/adapted"
    ),
    metrics: Annotated[Path, typer.Option(help="JSON to write.")] = Path("metrics/adapt.json"),
    params_file: Annotated[
        Path, typer.Option("--params", help="Parameters; section adapt_dimensions, sparsity and compact.layout.")
    ] = Path("params.yaml"),
) -> None:
    """Resize the masks.

    Reads data/model/config.json, artifacts/masks and artifacts/profile; writes artifacts/adapted and
    metrics/adapt.json.
    """
    with clear_errors():
        params = AdaptDimensionsParams.load(params_file)
        topology = Topology.of(load_config(model))
        before = read_masks(masks, topology)
        table = None
        if multiples := params.multiples():
            after = adapt(topology, before, params.sparsity, params.rounding, *multiples, layout=params.layout)
        else:
            table = read_table(profile, topology)
            goal = (params.sparsity, params.latency_target, params.slack)
            after = adapt_measured(topology, before, table, params.latency_phase, params.layout, *goal)
        _, meta = read_artifact(masks, "masks")
        write_masks(
            adapted,
            after,
            made_with=meta["made_with"] | params.used(),
            validation_ppl=meta["validation_ppl"],
        )
        report = adapt_metrics(topology, before, after, params.sparsity)
        if table:
            report |= latency_metrics(topology, table, after, params.layout)
            shares = [f"{phase} {report[phase]['predicted_share']:.2f}" for phase in ("prefill", "decode")]
            typer.echo(f"predicted of the dense latency on {table.made_on['processor']}: {', '.join(shares)}")
        write_json(metrics, report)
    reached = report["sparsity_decoder"]
    if params.latency_target is not None and abs(reached - params.sparsity) > SPARSITY_TOLERANCE:
        typer.secho(
            f"warning: this latency needs a sparsity of {reached:.2f}, but the masks were learned for "
            f"{params.sparsity}; set `sparsity` to {reached:.2f} in params.yaml and run again",
            fg="yellow",
            err=True,
        )
    typer.echo(
        f"hidden {report['hidden_before']:.0f} -> {report['hidden_after']:.0f}, "
        f"sparsity {report['sparsity_before']:.4f} -> {report['sparsity_decoder']:.4f}"
    )


if __name__ == "__main__":
    typer.run(main)
