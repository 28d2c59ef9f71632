"""Check the parameters that only a model's sizes can judge, before anything is learned."""

from pathlib import Path

from typer import secho

from stages._command import command
from stages._options import Config, Marker, ParamsFile
from tvaprune.architecture.topology import Topology
from tvaprune.checkpoint.loading import load_config
from tvaprune.masks.adapt import check_multiples
from tvaprune.methods import check_request
from tvaprune.params.adapt_dimensions import AdaptDimensionsParams
from tvaprune.params.learn_masks import LearnMasksParams


@command
def main(
    model: Config = Path("data/model"),
    out: Marker = Path("artifacts/model.ok"),
    params_file: ParamsFile = Path("params.yaml"),
) -> None:
    """Reads data/model/config.json and params.yaml (learn_masks, adapt_dimensions, sparsity, seed); writes
    artifacts/model.ok. A sparsity that no mask reaches, axes that the method cannot prune, or a multiple that does not
    divide a width stops `dvc repro` here, not after the learning.
    """
    learn, adapt = LearnMasksParams.load(params_file), AdaptDimensionsParams.load(params_file)
    topology = Topology.of(load_config(model))
    check_request(learn.request(), topology)
    if multiples := adapt.multiples():
        check_multiples(topology, *multiples)
    if adapt.layout == "uniform" and learn.method == "tva" and not learn.tva.uniform_layers:
        secho(
            "warning: compact.layout = uniform with masks learned for layers of different widths loses quality; set "
            "learn_masks.tva.uniform_layers to true, or compact.layout to uneven or padded",
            fg="yellow",
            err=True,
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("the parameters fit the model\n")
