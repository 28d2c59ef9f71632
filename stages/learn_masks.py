"""Learn which units stay: gates on three axes over frozen weights, projected onto the target sparsity."""

from pathlib import Path
from typing import Annotated

import typer

from stages._errors import clear_errors
from stages._launch import join_processes, run
from tvaprune.architecture.topology import Topology
from tvaprune.artifacts import read_artifact, write_json
from tvaprune.checkpoint.loading import load, load_config
from tvaprune.gates.memory import memory_table
from tvaprune.gates.state import GateTraining
from tvaprune.masks.masks import write_masks
from tvaprune.masks.update import write_update
from tvaprune.methods import GATE_METHODS, check_method, find_masks, masks_metrics, write_curve, write_widths
from tvaprune.params.learn_masks import LearnMasksParams
from tvaprune.params.sample_calibration import SampleCalibrationParams


def main(
    model: Annotated[Path, typer.Option(help="The dense model's directory.")] = Path("data/model"),
    calibration: Annotated[Path, typer.Option(help="Artifact with input_ids, int32 [samples, seq_len].")] = Path(
        "artifacts/calibration"
    ),
    masks: Annotated[Path, typer.Option(help="Masks artifact to write.")] = Path("artifacts/masks"),
    means: Annotated[Path, typer.Option(help="Artifact of the learned means and biases to write.")] = Path(
        "artifacts/means"
    ),
    metrics: Annotated[Path, typer.Option(help="JSON to write.")] = Path("metrics/masks.json"),
    curve: Annotated[Path, typer.Option(help="CSV of loss, sparsity and target by step to write.")] = Path(
        "metrics/mask_training.csv"
    ),
    widths: Annotated[Path, typer.Option(help="CSV of kept widths by layer to write.")] = Path("metrics/widths.csv"),
    params_file: Annotated[
        Path, typer.Option("--params", help="Parameters; section learn_masks, and top-level sparsity and seed.")
    ] = Path("params.yaml"),
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Print how much memory the gates' training takes, and do nothing else.")
    ] = False,
) -> None:
    """Find the masks.

    Reads data/model and artifacts/calibration; writes artifacts/masks, artifacts/means, metrics/masks.json,
    metrics/mask_training.csv and metrics/widths.csv. Killed and run again, it goes on where it was.
    With --estimate it reads data/model/config.json alone and writes nothing.
    """
    with clear_errors():
        params = LearnMasksParams.load(params_file)
        gates = GateTraining(**params.gates.model_dump())
        if estimate:
            typer.echo(memory_table(load_config(model), gates, SampleCalibrationParams.load(params_file).seq_len))
            return
        check_method(params.method, params.axes, params.sparsity, Topology.of(load_config(model)))
        with join_processes() as process:
            if params.method not in GATE_METHODS and not process.world.is_main:
                return  # the baselines' work is not shared
            ids, _ = read_artifact(calibration, "calibration")
            with process.saved("learn_masks", params.model_dump(mode="json"), [model, calibration]) as saved:
                dense = process.put(load(model, dtype=process.dtype))
                found = find_masks(
                    dense,
                    ids["input_ids"],
                    ids["validation_ids"],
                    params.sparsity,
                    gates,
                    params.baseline_options(),
                    method=params.method,
                    axes=params.axes,
                    seed=params.seed,
                    gradient_checkpointing=params.gradient_checkpointing,
                    saver=saved,
                    world=process.world,
                )
            if not process.world.is_main:
                return
        report = masks_metrics(found, dense.config, params.sparsity)
        meta = {"made_with": params.used(), "validation_ppl": report["validation_ppl"]}
        write_masks(masks, found.masks, **meta)
        write_update(means, found.update, **meta)
        write_json(metrics, report)
        write_curve(curve, found.curve)
        write_widths(widths, found.masks)
    typer.echo(f"sparsity {report['sparsity_decoder']:.4f} of the decoder, target {params.sparsity}")


if __name__ == "__main__":
    run(main)
