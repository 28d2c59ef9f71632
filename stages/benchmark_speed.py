"""Prefill and decode speed of the dense, the compact and the fine-tuned model."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from stages._errors import clear_errors
from stages._options import Compact, Dense, Finetuned
from tvaprune.artifacts import write_json
from tvaprune.checkpoint.loading import load
from tvaprune.cost import peak_memory_bytes
from tvaprune.device import pick_device, pick_dtype
from tvaprune.measures.comparison import present_models
from tvaprune.measures.latency import Benchmark, checkpoint_bytes, compare, load_timed
from tvaprune.measures.machine import machine_name, machine_numbers, pin_threads
from tvaprune.measures.speed_report import speed_metrics, write_rounds
from tvaprune.params.benchmark_speed import BenchmarkSpeedParams
from tvaprune.runtime.packed import pick_runtime


def main(
    dense: Dense = Path("data/model"),
    compact: Compact = Path("artifacts/compact"),
    finetuned: Finetuned = Path("artifacts/finetuned"),
    metrics: Annotated[Path, typer.Option(help="JSON to write.")] = Path("metrics/speed.json"),
    rounds: Annotated[Path, typer.Option(help="CSV to write, a row for each measurement.")] = Path("metrics/speed.csv"),
    params: Annotated[Path, typer.Option(help="YAML file with the section benchmark_speed.")] = Path("params.yaml"),
) -> None:
    """Time prefill and decode, on an otherwise idle machine.

    Reads the three model directories; writes metrics/speed.json and metrics/speed.csv.
    """
    with clear_errors():
        settings = BenchmarkSpeedParams.load(params)
        directories = present_models(dense, compact, finetuned)
        device = pick_device()
        dtype = pick_dtype(device, settings.dtype)
        pin_threads(settings.threads)
        runtime = pick_runtime(settings.runtime, device)
        models, load_s = load_timed({name: partial(load, path, dtype, device) for name, path in directories.items()})
        phases = compare(models, settings.batch_sizes, Benchmark.of(settings), runtime)
        speeds = speed_metrics(phases)
        sizes = {name: {"load_s": load_s[name], "bytes": checkpoint_bytes(path)} for name, path in directories.items()}
        conditions = {
            **settings.model_dump(include={"prefill_tokens", "decode_prompt_tokens", "decode_tokens", "repeats"}),
            "dtype_bits": dtype.itemsize * 8,
            "device_is_cuda": int(device.type == "cuda"),
            "peak_memory_bytes": peak_memory_bytes(device),
            **machine_numbers(device),
        }
        write_json(metrics, {**speeds, "models": sizes, **conditions})
        labels = {"runtime": runtime, "dtype": str(dtype).removeprefix("torch."), "machine": machine_name(device)}
        write_rounds(rounds, phases, labels)
    for phase in ("prefill", "decode"):
        result = speeds[phase]
        typer.echo(
            f"{phase}: {result['dense']['latency_ms']:.1f} ms dense, {result['compact']['latency_ms']:.1f} ms compact, "
            f"speedup {result['speedup']:.2f} of a limit of {result['limit']:.2f}"
        )


if __name__ == "__main__":
    typer.run(main)
