"""Time every block of a decoder layer at every width, on the device that will serve the model."""

from pathlib import Path
from typing import Annotated

import typer

from stages._errors import clear_errors
from tvaprune.architecture.topology import Topology
from tvaprune.artifacts import write_json
from tvaprune.checkpoint.loading import load_config
from tvaprune.checkpoint.random_model import LayerWidths, random_models
from tvaprune.device import pick_device, pick_dtype
from tvaprune.masks.latency_table import profile_metrics, write_staircase, write_table
from tvaprune.measures.block_times import Lengths, candidates, made_on, profile
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
    """Make the table that adapt_dimensions.multiple: measured needs; where that is not asked for, say so and end.

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
            steps = settings.hidden_step, settings.intermediate_step
            widths = candidates(topology, *steps, settings.narrowest_hidden)
            lengths = Lengths(
                settings.batch_size, settings.prefill_tokens, settings.decode_prompt_tokens, settings.decode_tokens
            )
            models = random_models(config, [LayerWidths(*each) for each in widths.by_model()], dtype, device)
            where = made_on(device, dtype, pick_runtime(settings.runtime, device), topology, lengths)
            table = profile(models, widths, lengths, settings.repeats, settings.max_warmup, where)
        write_table(out, table)
        write_json(metrics, profile_metrics(table, topology))
        write_staircase(staircase, table)
    typer.echo(f"timed on {table.made_on['processor']}" if table else "multiple is not measured: nothing was timed")


if __name__ == "__main__":
    typer.run(main)
