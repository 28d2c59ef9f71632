"""Perplexity of the dense, the compact and the fine-tuned model on the same held-out text."""

from pathlib import Path
from typing import Annotated

import typer
from transformers import AutoTokenizer

from stages._errors import clear_errors
from tvaprune.artifacts import write_json
from tvaprune.checkpoint.loading import load
from tvaprune.device import pick_device, pick_dtype
from tvaprune.measures.comparison import present_models
from tvaprune.measures.perplexity import evaluate, heldout_windows, read_texts, report
from tvaprune.params.eval_perplexity import EvalPerplexityParams


def main(
    dense: Annotated[Path, typer.Option(help="Model directory before pruning; its tokenizer serves all.")] = Path(
        "data/model"
    ),
    compact: Annotated[Path, typer.Option(help="Model directory after pruning.")] = Path("artifacts/compact"),
    finetuned: Annotated[Path, typer.Option(help="Model directory after fine-tuning; skipped if empty.")] = Path(
        "artifacts/finetuned"
    ),
    heldout: Annotated[Path, typer.Option(help='Directory of JSONL files of {"id", "text"}.')] = Path("data/heldout"),
    metrics: Annotated[Path, typer.Option(help="JSON to write.")] = Path("metrics/perplexity.json"),
    params: Annotated[Path, typer.Option(help="YAML file with the section eval_perplexity.")] = Path("params.yaml"),
) -> None:
    """Measure perplexity on held-out text.

    Reads the three model directories and data/heldout; writes metrics/perplexity.json.
    """
    with clear_errors():
        settings = EvalPerplexityParams.load(params)
        models = present_models(dense, compact, finetuned)
        device = pick_device()
        windows = heldout_windows(
            read_texts(heldout), AutoTokenizer.from_pretrained(dense), settings.window, settings.windows
        )
        results = {
            name: evaluate(load(path, pick_dtype(device), device), windows, settings.batch_size, progress=name)
            for name, path in models.items()
        }
        write_json(metrics, report(results, settings.window))
    for name, result in results.items():
        typer.echo(f"{name}: perplexity {result.ppl:.2f} ± {result.ppl_stderr:.2f}")


if __name__ == "__main__":
    typer.run(main)
