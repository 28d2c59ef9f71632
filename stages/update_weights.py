"""Turn what the gates learned into an update of the weights."""

from pathlib import Path
from typing import Annotated

from typer import Option, echo

from stages._command import command
from stages._options import Config, ParamsFile
from tvaprune.architecture.topology import Topology
from tvaprune.artifacts import read_artifact
from tvaprune.checkpoint.config import load_config
from tvaprune.masks.update import perplexities_after, read_update, weight_update, write_update
from tvaprune.params.update_weights import UpdateWeightsParams


@command
def main(
    model: Config = Path("data/model"),
    means: Annotated[Path, Option(help="What learn_masks learned beside the masks.")] = Path("artifacts/means"),
    update: Annotated[Path, Option(help="Artifact to write: a scale per unit.")] = Path("artifacts/update"),
    params_file: ParamsFile = Path("params.yaml"),
) -> None:
    """Reads data/model/config.json, artifacts/means and params.yaml (update_weights); writes artifacts/update."""
    params = UpdateWeightsParams.load(params_file)
    topology = Topology.of(load_config(model))
    learned = read_update(means, topology)
    folded = weight_update(topology, learned, params.method)
    _, meta = read_artifact(means, "update")
    measured = perplexities_after(meta["validation_ppl"], learned, folded)
    write_update(update, folded, made_with=meta["made_with"] | params.used(), validation_ppl=measured)
    echo(f"update: {params.method}")
