"""Perplexity of the dense, the compact and the fine-tuned model on the same held-out text."""

from pathlib import Path
from typing import Annotated

import typer
from transformers import AutoTokenizer

from stages._errors import clear_errors
from stages._launch import join_processes, run
from stages._options import Compact, Dense, Finetuned
from tvaprune.artifacts import write_json
from tvaprune.checkpoint.loading import load
from tvaprune.measures.comparison import present_models
from tvaprune.measures.perplexity import evaluate, heldout_windows, read_texts, report
from tvaprune.params.eval_perplexity import EvalPerplexityParams


def main(
    dense: Dense = Path("data/model"),
    compact: Compact = Path("artifacts/compact"),
    finetuned: Finetuned = Path("artifacts/finetuned"),
    heldout: Annotated[Path, typer.Option(help='Directory of JSONL files of {"id", "text"}.')] = Path("data/heldout"),
    metrics: Annotated[Path, typer.Option(help="JSON to write.")] = Path("metrics/perplexity.json"),
    params: Annotated[Path, typer.Option(help="YAML file with the section eval_perplexity.")] = Path("params.yaml"),
) -> None:
    """Measure perplexity on held-out text.

    Reads the three model directories, with the dense one's tokenizer for all, and data/heldout; writes
    metrics/perplexity.json.
    """
    with clear_errors():
        settings = EvalPerplexityParams.load(params)
        models = present_models(dense, compact, finetuned)
        windows = heldout_windows(
            read_texts(heldout), AutoTokenizer.from_pretrained(dense), settings.window, settings.windows
        )
        with join_processes() as process:
            results = {
                name: evaluate(
                    process.put(load(path, process.dtype)), windows, settings.batch_size, name, process.world
                )
                for name, path in models.items()
            }
            if not process.world.is_main:
                return
        write_json(metrics, report(results, settings.window))
    for name, result in results.items():
        typer.echo(f"{name}: perplexity {result.ppl:.2f} ± {result.ppl_stderr:.2f}")


if __name__ == "__main__":
    run(main)
