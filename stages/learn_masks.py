"""Learn which units stay: gates on three axes over frozen weights, projected onto the target sparsity."""

from pathlib import Path
from typing import Annotated

import typer

from stages._errors import clear_errors
from tvaprune.artifacts import read_artifact, write_json
from tvaprune.checkpoint.loading import load, load_config
from tvaprune.device import pick_device, pick_dtype
from tvaprune.gates.baselines.registry import BaselineOptions
from tvaprune.gates.report import masks_metrics, write_curve, write_widths
from tvaprune.gates.run import check_method, find_masks
from tvaprune.gates.state import GateTraining
from tvaprune.model.topology import Topology
from tvaprune.params.learn_masks import LearnMasksParams
from tvaprune.resume import ResumableRun
from tvaprune.widths.masks import write_masks


def main(
    model: Annotated[Path, typer.Option(help="The dense model's directory.")] = Path("data/model"),
    calibration: Annotated[Path, typer.Option(help="Artifact with input_ids, int32 [samples, seq_len].")] = Path(
        "artifacts/calibration"
    ),
    masks: Annotated[Path, typer.Option(help="Masks artifact to write.")] = Path("artifacts/masks"),
    metrics: Annotated[Path, typer.Option(help="JSON to write.")] = Path("metrics/masks.json"),
    curve: Annotated[Path, typer.Option(help="CSV of loss, sparsity and target by step to write.")] = Path(
        "metrics/mask_training.csv"
    ),
    widths: Annotated[Path, typer.Option(help="CSV of kept widths by layer to write.")] = Path("metrics/widths.csv"),
    params_file: Annotated[
        Path, typer.Option("--params", help="Parameters; section learn_masks, and top-level sparsity and seed.")
    ] = Path("params.yaml"),
) -> None:
    """Find the masks.

    Reads data/model and artifacts/calibration; writes artifacts/masks, metrics/masks.json,
    metrics/mask_training.csv and metrics/widths.csv. Killed and run again, it goes on where it was.
    """
    with clear_errors():
        params = LearnMasksParams.load(params_file)
        check_method(params.method, params.axes, params.sparsity, Topology.of(load_config(model)))
        ids, _ = read_artifact(calibration, "calibration")
        device = pick_device()
        dtype = pick_dtype(device)
        settings = params.model_dump(mode="json") | {"device": str(device), "dtype": str(dtype)}
        code = [*Path("tvaprune").rglob("*.py"), Path(__file__)]
        with ResumableRun("learn_masks", settings, [model, calibration, *code]) as run:
            dense = load(model, dtype=dtype, device=device)
            found = find_masks(
                dense,
                ids["input_ids"],
                ids["validation_ids"],
                params.sparsity,
                GateTraining(**params.gates.model_dump()),
                BaselineOptions(**params.baseline.model_dump()),
                method=params.method,
                axes=params.axes,
                seed=params.seed,
                gradient_checkpointing=params.gradient_checkpointing,
                saver=run,
            )
        report = masks_metrics(found, dense.config, params.sparsity)
        write_masks(masks, found.masks, made_with=params.used(), validation_ppl=report["validation_ppl"])
        write_json(metrics, report)
        write_curve(curve, found.curve)
        write_widths(widths, found.masks)
    typer.echo(f"sparsity {report['sparsity_decoder']:.4f} of the decoder, target {params.sparsity}")


if __name__ == "__main__":
    typer.run(main)
