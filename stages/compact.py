"""Cut the model down to the kept units, and prove that the result is the masked model."""

from pathlib import Path
from typing import Annotated

import typer

from stages._errors import clear_errors
from tvaprune.artifacts import write_json
from tvaprune.checkpoint.compact import compact
from tvaprune.checkpoint.loading import load_config
from tvaprune.checkpoint.report import compact_metrics, measured
from tvaprune.checkpoint.update import read_update
from tvaprune.model.topology import Topology
from tvaprune.params.compact import CompactParams
from tvaprune.widths.masks import read_masks


def main(
    model: Annotated[Path, typer.Option(help="The dense model's directory.")] = Path("data/model"),
    adapted: Annotated[Path, typer.Option(help="Adapted masks.")] = Path("artifacts/adapted"),
    update: Annotated[Path, typer.Option(help="Weight update.")] = Path("artifacts/update"),
    out: Annotated[Path, typer.Option(help="Model directory to write.")] = Path("artifacts/compact"),
    metrics: Annotated[Path, typer.Option(help="JSON to write.")] = Path("metrics/compact.json"),
    params_file: Annotated[Path, typer.Option("--params", help="Parameters; section compact.")] = Path("params.yaml"),
) -> None:
    """Write the smaller model.

    Reads data/model, artifacts/adapted and artifacts/update; writes artifacts/compact, a Hugging Face directory with
    its own modeling file, and metrics/compact.json. Fails where compact and masked logits differ by more than
    compact.max_abs_logit_diff.
    """
    with clear_errors():
        params = CompactParams.load(params_file)
        masks = read_masks(adapted, Topology.of(load_config(model)))
        folded = read_update(update)
        size, cost = measured(lambda: compact(model, masks, folded, out))
        report = compact_metrics(model, masks, folded, out, size, cost, prompt_tokens=params.prompt_tokens)
        write_json(metrics, report)
        difference = report["max_abs_logit_diff"]
        if difference > params.max_abs_logit_diff:
            raise ValueError(
                f"masked and compact logits differ by {difference:.2e}, more than compact.max_abs_logit_diff = "
                f"{params.max_abs_logit_diff:.0e}: this checkpoint is not the masked model, do not use it"
            )
    typer.echo(f"{report['params_kept']} parameters, masked = compact to {difference:.1e}")


if __name__ == "__main__":
    typer.run(main)
