"""Prefill and decode of the dense and the pruned model in llama.cpp, which many serve with on a CPU.

`python -m tools.llama_cpp_speed` writes both as GGUF files of each type into a temporary directory, times them
alternately in one process and prints a row for each type and phase. Needs `pip install 'tvaprune[gguf]'` and a machine
that does nothing else.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from gguf import GGUFReader

from tvaprune.checkpoint.loading import load
from tvaprune.export.gguf import GgufDtype, write_gguf
from tvaprune.measures.comparison import present_models
from tvaprune.measures.latency import Phase, interleave, prefill_flops, random_prompt, without_garbage_collection
from tvaprune.measures.machine import machine_name, pin_threads
from tvaprune.measures.speed_report import summarise
from tvaprune.params.benchmark_speed import BenchmarkSpeedParams
from tvaprune.proof.gguf_runtime import timed


def bytes_read(file: Path) -> int:
    """Bytes of the weights that a decoded token reads; an embedding beside an output matrix is read by single rows."""
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(file).tensors}
    return sum(size for name, size in sizes.items() if name != "token_embd.weight" or "output.weight" not in sizes)


def compare(
    directories: dict[str, Path], dtype: GgufDtype, settings: BenchmarkSpeedParams, folder: Path
) -> tuple[Phase, Phase]:
    """Prefill and decode of model directories as GGUF files of one type.

    Args:
        directories: by name; "dense" and whatever else.
        folder: where the files go.
    """
    files = {name: folder / f"{name}-{dtype}.gguf" for name in directories}
    flops, prefills, decodes = {}, {}, {}
    for name, directory in directories.items():
        write_gguf(directory, files[name], dtype)
        model = load(directory, torch.bfloat16)
        flops[name] = float(prefill_flops(model, 1, settings.prefill_tokens))
        long = random_prompt(model, 1, settings.prefill_tokens)[0].tolist()
        prefills[name] = timed(files[name], long, 1)
        decodes[name] = timed(files[name], long[: settings.decode_prompt_tokens], settings.decode_tokens)
    rounds = settings.repeats, settings.max_warmup

    def prefill(name: str) -> Callable[[], float]:
        return lambda: prefills[name]().prefill_ms

    def decode(name: str) -> Callable[[], float]:
        return lambda: decodes[name]().decode_ms

    with without_garbage_collection():
        first = interleave({name: prefill(name) for name in files}, *rounds, f"{dtype}: prefill")
        then = interleave({name: decode(name) for name in files}, *rounds, f"{dtype}: decode")
    sizes = {name: float(bytes_read(file)) for name, file in files.items()}
    return Phase(first, settings.prefill_tokens, flops), Phase(then, 1, sizes)


def main(
    dense: Annotated[Path, typer.Option(help="Model directory before pruning.")] = Path("data/model"),
    compact: Annotated[Path, typer.Option(help="Model directory after pruning.")] = Path("artifacts/compact"),
    finetuned: Annotated[Path, typer.Option(help="Model directory after fine-tuning; skipped if empty.")] = Path(
        "artifacts/finetuned"
    ),
    dtypes: Annotated[str, typer.Option(help="Types of the GGUF files, of f32, f16, bf16, q8_0.")] = "bf16,q8_0",
    params: Annotated[
        Path, typer.Option(help="YAML file; lengths, repeats and threads of its section benchmark_speed.")
    ] = Path("params.yaml"),
) -> None:
    """Print the table, in Markdown."""
    settings = BenchmarkSpeedParams.load(params)
    directories = present_models(dense, compact, finetuned)
    pin_threads(settings.threads)
    rows = []
    for dtype in dtypes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            phases = compare(directories, dtype, settings, Path(folder))  # type: ignore[arg-type]
        for name, work, phase in zip(("prefill", "decode"), ("flops", "bytes_read"), phases, strict=True):
            found = summarise(phase, work)
            rates = [f"{found[model]['tokens_per_s']:.0f} ± {spread(found[model]):.0%}" for model in directories]
            cells = [f"{found['speedup']:.2f}×", f"{found['limit']:.2f}×", f"{found['efficiency']:.2f}"]
            rows.append("| " + " | ".join([dtype, name, *rates, *cells]) + " |")
    typer.echo(f"Tokens a second ± half the interquartile range, batch 1, {machine_name(torch.device('cpu'))}.\n")
    typer.echo("| | | " + " | ".join(directories) + " | speedup | limit | efficiency |")
    typer.echo("|---|---|" + "---|" * (len(directories) + 3))
    typer.echo("\n".join(rows))


def spread(found: dict[str, float]) -> float:
    """Half the interquartile range as a share of the median."""
    return found["iqr_ms"] / found["latency_ms"] / 2


if __name__ == "__main__":
    typer.run(main)
