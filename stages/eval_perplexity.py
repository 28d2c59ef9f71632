"""Measure the perplexity of the dense, the compact and the fine-tuned model on the same validation and test text."""

from pathlib import Path

from transformers import AutoTokenizer
from typer import echo

from stages._launch import join_processes, process_command
from stages._options import Compact, Finetuned, Heldout, Metrics, Model, ParamsFile
from tvaprune.artifacts import write_json
from tvaprune.checkpoint.loading import load
from tvaprune.measures.comparison import present_models
from tvaprune.measures.perplexity import describe, evaluate, heldout_windows, read_texts, report
from tvaprune.params.eval_perplexity import EvalPerplexityParams


@process_command
def main(
    dense: Model = Path("data/model"),
    compact: Compact = Path("artifacts/compact"),
    finetuned: Finetuned = Path("artifacts/finetuned"),
    heldout: Heldout = Path("data/heldout"),
    metrics: Metrics = Path("metrics/perplexity.json"),
    params_file: ParamsFile = Path("params.yaml"),
) -> None:
    """Reads the three model directories, with the dense one's tokenizer for all, data/heldout and params.yaml
    (eval_perplexity); writes metrics/perplexity.json.
    """
    params = EvalPerplexityParams.load(params_file)
    models = present_models(dense, compact, finetuned)
    tokenizer = AutoTokenizer.from_pretrained(dense)
    windows = heldout_windows(read_texts(heldout), tokenizer, params.window, params.validation, params.test)
    results = {}
    with join_processes() as process:
        for name, path in models.items():
            results[name] = evaluate(
                process.put(load(path, process.dtype)), windows, params.batch_size, name, process.world
            )
        if not process.world.is_main:
            return
    measured = report(results, params.window)
    write_json(metrics, measured)
    for name in results:
        echo(describe(name, measured[name]))
