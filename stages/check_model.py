"""Check the parameters that only a model's sizes can judge, before anything is learned."""

from pathlib import Path
from typing import Annotated

import typer

from stages._errors import clear_errors
from tvaprune.architecture.topology import Topology
from tvaprune.checkpoint.loading import load_config
from tvaprune.masks.adapt import check_multiples
from tvaprune.methods import check_request
from tvaprune.params.adapt_dimensions import AdaptDimensionsParams
from tvaprune.params.learn_masks import LearnMasksParams


def main(
    model: Annotated[Path, typer.Option(help="The dense model's directory; only its config is read.")] = Path(
        "data/model"
    ),
    out: Annotated[Path, typer.Option(help="Marker to write; always the same, so nothing after it reruns.")] = Path(
        "artifacts/model.ok"
    ),
    params_file: Annotated[
        Path, typer.Option("--params", help="Parameters; sections learn_masks and adapt_dimensions, sparsity, seed.")
    ] = Path("params.yaml"),
) -> None:
    """Check the parameters against the model.

    Reads data/model/config.json and params.yaml; writes artifacts/model.ok. A sparsity that no mask reaches, axes that
    the method cannot prune, or a multiple that does not divide a width stops `dvc repro` here, not after the learning.
    """
    with clear_errors():
        learn, adapt = LearnMasksParams.load(params_file), AdaptDimensionsParams.load(params_file)
        topology = Topology.of(load_config(model))
        check_request(learn.request(), topology)
        if multiples := adapt.multiples():
            check_multiples(topology, *multiples)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("the parameters fit the model\n")


if __name__ == "__main__":
    typer.run(main)
