"""Prefill and decode speed of the dense and the pruned models in llama.cpp.

`python -m tools.llama_cpp_speed` writes each model as a GGUF file of each type into a temporary directory, times them
in turn in one process and prints a row for each type and phase. It needs `pip install 'tvaprune[gguf]'` and an
otherwise idle machine.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
from gguf import GGUFReader
from typer import Option, echo

from stages._command import command
from stages._options import Compact, Finetuned, Model, ParamsFile
from tvaprune.checkpoint.loading import load
from tvaprune.export.gguf import GgufDtype, write_gguf
from tvaprune.masks.latency_table import PHASES
from tvaprune.measures import markdown
from tvaprune.measures.comparison import present_models
from tvaprune.measures.latency import Phase, interleave, prefill_flops, random_prompt, without_garbage_collection
from tvaprune.measures.machine import machine_name, pin_threads
from tvaprune.measures.markdown import SPEEDUP, speedup_cells
from tvaprune.measures.speed_report import speed_metrics
from tvaprune.params.benchmark_speed import BenchmarkSpeedParams
from tvaprune.proof.gguf_runtime import timed


def bytes_read(file: Path) -> int:
    """Bytes of the weights that a decode step reads: all, except the embedding where the output matrix is its own."""
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(file).tensors}
    return sum(size for name, size in sizes.items() if name != "token_embd.weight" or "output.weight" not in sizes)


def compare(
    directories: dict[str, Path], dtype: GgufDtype, settings: BenchmarkSpeedParams, folder: Path
) -> tuple[Phase, Phase]:
    """Prefill and decode of model directories by name, one "dense", as GGUF files of one type in the folder."""
    files = {name: folder / f"{name}-{dtype}.gguf" for name in directories}
    flops: dict[str, float] = {}
    prefills: dict[str, Callable[[], float]] = {}
    decodes: dict[str, Callable[[], float]] = {}
    for name, directory in directories.items():
        write_gguf(directory, files[name], dtype)
        model = load(directory, torch.bfloat16)
        flops[name] = float(prefill_flops(model, 1, settings.prefill_tokens))
        prompt = random_prompt(model, 1, settings.prefill_tokens)[0].tolist()
        read = timed(files[name], prompt, 1)
        generate = timed(files[name], prompt[: settings.decode_prompt_tokens], settings.decode_tokens)
        prefills[name] = lambda read=read: read().prefill_ms  # type: ignore[misc]
        decodes[name] = lambda generate=generate: generate().decode_ms  # type: ignore[misc]
    rounds = settings.repeats, settings.max_warmup
    with without_garbage_collection():
        first = interleave(prefills, *rounds, f"{dtype}: prefill")
        then = interleave(decodes, *rounds, f"{dtype}: decode")
    sizes = {name: float(bytes_read(file)) for name, file in files.items()}
    return Phase(first, settings.prefill_tokens, flops), Phase(then, 1, sizes)


@command
def main(
    dense: Model = Path("data/model"),
    compact: Compact = Path("artifacts/compact"),
    finetuned: Finetuned = Path("artifacts/finetuned"),
    dtypes: Annotated[str, Option(help="Types of the GGUF files, of f32, f16, bf16, q8_0.")] = "bf16,q8_0",
    params_file: ParamsFile = Path("params.yaml"),
) -> None:
    """Reads params.yaml (benchmark_speed: lengths, repeats and threads); prints the table, in Markdown."""
    settings = BenchmarkSpeedParams.load(params_file)
    directories = present_models(dense, compact, finetuned)
    pin_threads(settings.threads)
    rows = []
    for dtype in dtypes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            phases = compare(directories, dtype, settings, Path(folder))  # type: ignore[arg-type]
        metrics = speed_metrics({1: phases})
        for name in PHASES:
            of_models = [metrics[name][model] for model in directories]
            rates = [f"{of['tokens_per_s']:.0f} ± {of['iqr_ms'] / of['latency_ms'] / 2:.0%}" for of in of_models]
            rows.append([dtype, name, *rates, *speedup_cells(metrics[name])])
    echo(f"Tokens a second ± half the interquartile range, batch 1, {machine_name(torch.device('cpu'))}.\n")
    echo(markdown.table(["", "", *directories, *SPEEDUP], rows))
