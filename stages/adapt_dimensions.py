"""Adapt the kept dimensions to the hardware's multiples."""

from pathlib import Path
from typing import Annotated

import typer

from stages._errors import clear_errors
from tvaprune.artifacts import read_artifact, write_json
from tvaprune.checkpoint.loading import load_config
from tvaprune.model.topology import Topology
from tvaprune.params.adapt_dimensions import AdaptDimensionsParams
from tvaprune.widths.adapt import adapt, adapt_metrics
from tvaprune.widths.masks import read_masks, write_masks


def main(
    model: Annotated[Path, typer.Option(help="The dense model's directory; only its config is read.")] = Path(
        "data/model"
    ),
    masks: Annotated[Path, typer.Option(help="Masks artifact to adapt.")] = Path("artifacts/masks"),
    adapted: Annotated[Path, typer.Option(help="Masks artifact to write, widths in multiples.")] = Path(
        "artifacts/adapted"
    ),
    metrics: Annotated[Path, typer.Option(help="JSON to write.")] = Path("metrics/adapt.json"),
    params_file: Annotated[
        Path, typer.Option("--params", help="Parameters; section adapt_dimensions, sparsity and compact.layout.")
    ] = Path("params.yaml"),
) -> None:
    """Resize the masks.

    Reads data/model/config.json and artifacts/masks; writes artifacts/adapted and metrics/adapt.json.
    """
    with clear_errors():
        params = AdaptDimensionsParams.load(params_file)
        topology = Topology.of(load_config(model))
        before = read_masks(masks, topology)
        after = adapt(
            topology,
            before,
            params.sparsity,
            params.rounding,
            params.multiple_of("hidden"),
            params.multiple_of("intermediate"),
            layout=params.layout,
        )
        _, meta = read_artifact(masks, "masks")
        write_masks(
            adapted,
            after,
            made_with=meta["made_with"] | params.used(),
            validation_ppl=meta["validation_ppl"],
        )
        report = adapt_metrics(topology, before, after, params.sparsity)
        write_json(metrics, report)
    typer.echo(
        f"hidden {report['hidden_before']:.0f} -> {report['hidden_after']:.0f}, "
        f"sparsity {report['sparsity_before']:.4f} -> {report['sparsity_decoder']:.4f}"
    )


if __name__ == "__main__":
    typer.run(main)
