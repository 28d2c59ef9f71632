"""Time prefill and decode of the dense, the compact and the fine-tuned model, on an otherwise idle machine."""

from functools import partial
from pathlib import Path
from typing import Annotated

from typer import Option, echo

from stages._command import command
from stages._options import Compact, Finetuned, Metrics, Model, ParamsFile
from tvaprune.artifacts import write_json
from tvaprune.checkpoint.loading import load
from tvaprune.cost import peak_memory_bytes
from tvaprune.device import pick_device, pick_dtype
from tvaprune.measures.comparison import present_models
from tvaprune.measures.latency import Benchmark, checkpoint_bytes, compare, load_timed, together
from tvaprune.measures.machine import machine_name, machine_numbers, pin_threads
from tvaprune.measures.speed_report import speed_metrics, write_rounds
from tvaprune.params.benchmark_speed import BenchmarkSpeedParams
from tvaprune.runtime.packed import pick_runtime


@command
def main(
    dense: Model = Path("data/model"),
    compact: Compact = Path("artifacts/compact"),
    finetuned: Finetuned = Path("artifacts/finetuned"),
    metrics: Metrics = Path("metrics/speed.json"),
    rounds: Annotated[Path, Option(help="CSV to write, a row for each measurement.")] = Path("metrics/speed.csv"),
    params_file: ParamsFile = Path("params.yaml"),
) -> None:
    """Reads the three model directories and params.yaml (benchmark_speed); writes metrics/speed.json and
    metrics/speed.csv.
    """
    params = BenchmarkSpeedParams.load(params_file)
    directories = present_models(dense, compact, finetuned)
    device = pick_device()
    dtype = pick_dtype(device, params.dtype)
    pin_threads(params.threads)
    runtime = pick_runtime(params.runtime, device)
    groups = [directories] if params.interleave else [{name: path} for name, path in directories.items()]
    parts, load_s = [], dict[str, float]()
    for group in groups:
        models, seconds = load_timed({name: partial(load, path, dtype, device) for name, path in group.items()})
        parts.append(compare(models, params.batch_sizes, Benchmark.of(params), runtime))
        load_s |= seconds
        del models  # before the next one is loaded
    phases = together(parts)
    speeds = speed_metrics(phases)
    sizes = {name: {"load_s": load_s[name], "bytes": checkpoint_bytes(path)} for name, path in directories.items()}
    conditions = {
        **params.model_dump(include={"prefill_tokens", "decode_prompt_tokens", "decode_tokens", "repeats"}),
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
        echo(
            f"{phase}: {result['dense']['latency_ms']:.1f} ms dense, {result['compact']['latency_ms']:.1f} ms compact, "
            f"speedup {result['speedup']:.2f} of a limit of {result['limit']:.2f}"
        )
