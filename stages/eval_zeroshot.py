"""Zero-shot accuracy of the dense, the compact and the fine-tuned model on the same rows."""

import logging
import os
from pathlib import Path
from typing import Annotated

# Read once, when the hub's client is first imported. Everything is on disk, so nothing may wait for a network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import datasets
import typer
from transformers import AutoTokenizer

from stages._errors import clear_errors
from stages._launch import join_processes, run
from stages._options import Compact, Dense, Finetuned
from tvaprune.artifacts import write_json
from tvaprune.checkpoint.loading import load
from tvaprune.measures.comparison import present_models
from tvaprune.measures.zeroshot import evaluate, select_rows, summarise
from tvaprune.params.eval_zeroshot import EvalZeroshotParams


def main(
    dense: Dense = Path("data/model"),
    compact: Compact = Path("artifacts/compact"),
    finetuned: Finetuned = Path("artifacts/finetuned"),
    zeroshot: Annotated[Path, typer.Option(help="Directory of one JSONL file a task.")] = Path("data/zeroshot"),
    metrics: Annotated[Path, typer.Option(help="JSON to write.")] = Path("metrics/zeroshot.json"),
    params: Annotated[Path, typer.Option(help="YAML file with the section eval_zeroshot.")] = Path("params.yaml"),
) -> None:
    """Measure zero-shot accuracy with lm-eval's prompts.

    Reads the three model directories, with the dense one's tokenizer for all, and data/zeroshot; writes
    metrics/zeroshot.json.
    """
    with clear_errors():
        settings = EvalZeroshotParams.load(params)
        models = present_models(dense, compact, finetuned)
        rows = select_rows(zeroshot, list(settings.tasks), settings.limit)
        datasets.disable_progress_bars()
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of a ready-made model, which is meant
        tokenizer = AutoTokenizer.from_pretrained(dense)
        results = {}
        with join_processes() as process:
            for name, path in models.items():
                model = process.put(load(path, process.dtype))
                results[name] = summarise(evaluate(model, tokenizer, rows, settings.batch_size, name, process.world))
            if not process.world.is_main:
                return
        write_json(metrics, {"limit": settings.limit or 0, **results})
    for name, result in results.items():
        typer.echo(f"{name}: mean accuracy {result['mean_acc']:.3f} ± {result['mean_acc_stderr']:.3f}")


if __name__ == "__main__":
    run(main)
