"""Time each block of a decoder layer at every width, on the device that will serve the model."""

from pathlib import Path
from typing import Annotated

import typer

from stages._errors import clear_errors
from tvaprune.architecture.topology import Topology
from tvaprune.artifacts import write_json
from tvaprune.checkpoint.loading import load_config
from tvaprune.checkpoint.random_model import random_models
from tvaprune.device import pick_device, pick_dtype
from tvaprune.masks.latency_table import profile_metrics, write_staircase, write_table
from tvaprune.measures.block_times import candidates, made_on, profile
from tvaprune.measures.latency import Benchmark
from tvaprune.measures.machine import pin_threads
from tvaprune.params.profile_hardware import ProfileHardwareParams
from tvaprune.runtime.packed import pick_runtime


def main(
    model: Annotated[Path, typer.Option(help="The dense model's directory; only its config is read.")] = Path(
        "data/model"
    ),
    out: Annotated[Path, typer.Option(help="Latency table to write.")] = Path("artifacts/profile"),
    metrics: Annotated[Path, typer.Option(help="JSON to write.")] = Path("metrics/profile.json"),
    staircase: Annotated[Path, typer.Option(help="CSV of the MLP's latency by width to write.")] = Path(
        "metrics/profile.csv"
    ),
    params: Annotated[
        Path, typer.Option(help="YAML file; section profile_hardware and adapt_dimensions.multiple.")
    ] = Path("params.yaml"),
) -> None:
    """Make the latency table for adapt_dimensions.multiple: measured; with any other multiple, time nothing.

    Reads data/model/config.json; writes artifacts/profile, metrics/profile.json and metrics/profile.csv.
    """
    with clear_errors():
        settings = ProfileHardwareParams.load(params)
        config, table = load_config(model), None
        topology = Topology.of(config)
        if settings.enabled:
            device = pick_device()
            dtype = pick_dtype(device, settings.dtype)
            pin_threads(settings.threads)
            widths = candidates(topology, settings.hidden_step, settings.intermediate_step, settings.narrowest_hidden)
            benchmark, runtime = Benchmark.of(settings), pick_runtime(settings.runtime, device)
            models = random_models(config, widths.by_model(), dtype, device)
            conditions = made_on(device, dtype, runtime, topology, settings.batch_size, benchmark)
            table = profile(models, widths, benchmark, conditions)
        write_table(out, table)
        write_json(metrics, profile_metrics(table, topology))
        write_staircase(staircase, table)
    typer.echo(f"timed on {table.made_on['processor']}" if table else "multiple is not measured: nothing was timed")


if __name__ == "__main__":
    typer.run(main)
