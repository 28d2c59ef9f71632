"""Turn what the gates learned into an update of the weights."""

from pathlib import Path
from typing import Annotated

import typer

from stages._errors import clear_errors
from tvaprune.architecture.topology import Topology
from tvaprune.artifacts import read_artifact
from tvaprune.checkpoint.loading import load_config
from tvaprune.masks.update import read_update, weight_update, write_update
from tvaprune.params.update_weights import UpdateWeightsParams


def main(
    model: Annotated[Path, typer.Option(help="The dense model's directory; only its config is read.")] = Path(
        "data/model"
    ),
    means: Annotated[Path, typer.Option(help="What learn_masks learned beside the masks.")] = Path("artifacts/means"),
    update: Annotated[Path, typer.Option(help="Update artifact to write: a scale per unit.")] = Path(
        "artifacts/update"
    ),
    params_file: Annotated[Path, typer.Option("--params", help="Parameters; section update_weights.")] = Path(
        "params.yaml"
    ),
) -> None:
    """Make the update.

    Reads data/model/config.json and artifacts/means; writes artifacts/update.
    """
    with clear_errors():
        params = UpdateWeightsParams.load(params_file)
        topology = Topology.of(load_config(model))
        learned = read_update(means, topology)
        _, meta = read_artifact(means, "update")
        write_update(
            update,
            weight_update(topology, learned, params.method),
            made_with=meta["made_with"] | params.used(),
            validation_ppl=meta["validation_ppl"],
        )
    typer.echo(f"update: {params.method}")


if __name__ == "__main__":
    typer.run(main)
