"""Time each block of a decoder layer at every width, on the device that will serve the model."""

from pathlib import Path
from typing import Annotated

from typer import Option, echo

from stages._command import command
from stages._options import Config, Metrics, ParamsFile
from tvaprune.architecture.topology import Topology
from tvaprune.artifacts import write_json
from tvaprune.checkpoint.config import load_config
from tvaprune.checkpoint.random_model import random_models
from tvaprune.device import pick_device, pick_dtype
from tvaprune.masks.latency_table import profile_metrics, write_staircase, write_table
from tvaprune.measures.block_times import candidates, made_on, profile
from tvaprune.measures.latency import Benchmark
from tvaprune.measures.machine import pin_threads
from tvaprune.params.profile_hardware import ProfileHardwareParams
from tvaprune.runtime.packed import pick_runtime


@command
def main(
    model: Config = Path("data/model"),
    out: Annotated[Path, Option(help="Latency table to write.")] = Path("artifacts/profile"),
    learning: Annotated[Path, Option(help="The same table to write, for learn_masks.")] = Path(
        "artifacts/learning_profile"
    ),
    metrics: Metrics = Path("metrics/profile.json"),
    staircase: Annotated[Path, Option(help="CSV of the MLP's latency to write.")] = Path("metrics/profile.csv"),
    params_file: ParamsFile = Path("params.yaml"),
) -> None:
    """Reads data/model/config.json and params.yaml (profile_hardware, adapt_dimensions.multiple, learn_masks.budget);
    writes artifacts/profile, metrics/profile.json and metrics/profile.csv, an MLP's latency by width. Nothing is timed
    unless the multiple is measured or the budget latency. It also writes artifacts/learning_profile, which holds the
    table only if the budget is latency, so that another multiple does not rerun learn_masks without that budget.
    """
    params = ProfileHardwareParams.load(params_file)
    config, table = load_config(model), None
    topology = Topology.of(config)
    if params.enabled:
        device = pick_device()
        dtype = pick_dtype(device, params.dtype)
        pin_threads(params.threads)
        widths = candidates(topology, params.hidden_step, params.intermediate_step, params.narrowest_hidden)
        benchmark, runtime = Benchmark.of(params), pick_runtime(params.runtime, device)
        models = random_models(config, widths.by_model(), dtype, device)
        conditions = made_on(device, dtype, runtime, topology, params.batch_size, benchmark)
        table = profile(models, widths, benchmark, conditions)
    write_table(out, table)
    write_table(learning, table if params.learns else None)
    write_json(metrics, profile_metrics(table, topology))
    write_staircase(staircase, table)
    echo(f"timed on {table.made_on['processor']}" if table else "no stage needs a table: nothing was timed")
