"""Learn which units stay: gates on three axes over frozen weights, projected onto the target sparsity."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from typer import Option, echo, secho

from stages._launch import join_processes, process_command
from stages._options import Curve, Metrics, Model, ParamsFile, Windows
from tvaprune.architecture.topology import Topology
from tvaprune.artifacts import read_windows, write_json
from tvaprune.checkpoint.config import load_config
from tvaprune.checkpoint.loading import load
from tvaprune.device import require_trainable
from tvaprune.distributed import ALONE
from tvaprune.masks.latency_table import read_table
from tvaprune.masks.masks import write_masks
from tvaprune.masks.update import write_update
from tvaprune.methods import (
    check_request,
    find_masks,
    learned_message,
    masks_metrics,
    projection_warning,
    write_curve,
    write_widths,
)
from tvaprune.params.learn_masks import LearnMasksParams


@process_command
def main(
    model: Model = Path("data/model"),
    calibration: Windows = Path("artifacts/calibration"),
    profile: Annotated[Path, Option(help="Latency table, for a latency budget.")] = Path("artifacts/learning_profile"),
    masks: Annotated[Path, Option(help="Masks artifact to write.")] = Path("artifacts/masks"),
    means: Annotated[Path, Option(help="Artifact of learned means and biases to write.")] = Path("artifacts/means"),
    metrics: Metrics = Path("metrics/masks.json"),
    curve: Curve = Path("metrics/mask_training.csv"),
    widths: Annotated[Path, Option(help="CSV of kept widths by layer to write.")] = Path("metrics/widths.csv"),
    params_file: ParamsFile = Path("params.yaml"),
) -> None:
    """Reads data/model, artifacts/calibration (input_ids, validation_ids), artifacts/learning_profile if the budget is
    latency, and params.yaml (learn_masks, sparsity, seed); writes artifacts/masks, artifacts/means, metrics/masks.json,
    metrics/mask_training.csv and metrics/widths.csv. Killed and run again, it goes on with the training of
    gates and means where it was; a baseline scores again.
    """
    params = LearnMasksParams.load(params_file)
    request = params.request()
    settings = params.used() | {"gradient_checkpointing": request.gradient_checkpointing}
    topology = Topology.of(load_config(model))
    check_request(request, topology)
    table = read_table(profile, topology).rising() if request.latency else None
    with join_processes() as process:
        if not request.trains_gates:  # the baselines' work is not shared
            if not process.world.is_main:
                return
            process = replace(process, world=ALONE, sharded=False)
        require_trainable(process.dtype)
        vocabulary = load_config(model).vocab_size
        ids = read_windows(calibration, vocabulary, "input_ids", "validation_ids")
        with process.saved("learn_masks", settings, [model, calibration, profile]) as saved:
            dense = process.put(load(model, dtype=process.dtype))
            windows = ids["input_ids"], ids["validation_ids"]
            found = find_masks(dense, *windows, request, saved, world=process.world, table=table)
            if not process.world.is_main:
                return
            # The state stays until all is written, so that a full disk loses nothing.
            report = masks_metrics(found, dense.config, request, table)
            meta = {"made_with": params.used(), "validation_ppl": report["validation_ppl"]}
            write_masks(masks, found.masks, **meta)
            write_update(means, found.update, **meta)
            write_json(metrics, report)
            write_curve(curve, found.curve)
            write_widths(widths, found.masks)
    if warning := projection_warning(report):
        secho(f"warning: {warning}", fg="yellow", err=True)
    echo(learned_message(report, request))
