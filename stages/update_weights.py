"""Turn what the gates learned into an update of the weights."""

from pathlib import Path
from typing import Annotated

import typer

from stages._errors import clear_errors
from tvaprune.architecture.topology import Topology
from tvaprune.artifacts import read_artifact
from tvaprune.checkpoint.fold import weight_update, write_update
from tvaprune.checkpoint.loading import load_config
from tvaprune.masks.masks import read_masks
from tvaprune.params.update_weights import UpdateWeightsParams


def main(
    model: Annotated[Path, typer.Option(help="The dense model's directory; only its config is read.")] = Path(
        "data/model"
    ),
    adapted: Annotated[Path, typer.Option(help="Adapted masks.")] = Path("artifacts/adapted"),
    update: Annotated[Path, typer.Option(help="Update artifact to write: a scale per unit.")] = Path(
        "artifacts/update"
    ),
    params_file: Annotated[Path, typer.Option("--params", help="Parameters; section update_weights.")] = Path(
        "params.yaml"
    ),
) -> None:
    """Make the update.

    Reads data/model/config.json and artifacts/adapted; writes artifacts/update.
    """
    with clear_errors():
        params = UpdateWeightsParams.load(params_file)
        masks = read_masks(adapted, Topology.of(load_config(model)))
        _, meta = read_artifact(adapted, "masks")
        write_update(
            update,
            weight_update(masks, params.method),
            made_with=meta["made_with"] | params.used(),
            validation_ppl=meta["validation_ppl"],
        )
    typer.echo(f"update: {params.method}")


if __name__ == "__main__":
    typer.run(main)
