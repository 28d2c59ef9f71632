"""Measure the perplexity of the dense, the compact and the fine-tuned model on the same validation and test text."""

from pathlib import Path

from transformers import AutoTokenizer
from typer import echo

from stages._launch import join_processes, process_command
from stages._options import Compact, Finetuned, Heldout, Metrics, Model, ParamsFile, Reference
from tvaprune.artifacts import write_json
from tvaprune.checkpoint.loading import load
from tvaprune.inputs.documents import load_texts
from tvaprune.measures.comparison import present_models, read_reference
from tvaprune.measures.perplexity import describe, evaluate, from_plain, heldout_windows, report
from tvaprune.params.eval_perplexity import EvalPerplexityParams


@process_command
def main(
    dense: Model = Path("data/model"),
    compact: Compact = Path("artifacts/compact"),
    finetuned: Finetuned = Path("artifacts/finetuned"),
    heldout: Heldout = Path("data/heldout"),
    reference: Reference = Path("artifacts/dense_perplexity.json"),
    metrics: Metrics = Path("metrics/perplexity.json"),
    params_file: ParamsFile = Path("params.yaml"),
) -> None:
    """Reads the three model directories, with the dense one's tokenizer for all, data/heldout,
    artifacts/dense_perplexity.json and params.yaml (eval_perplexity); writes metrics/perplexity.json.
    """
    params = EvalPerplexityParams.load(params_file)
    models = present_models(dense, compact, finetuned)
    tokenizer = AutoTokenizer.from_pretrained(dense)
    windows = heldout_windows(load_texts(heldout), tokenizer, params.window, params.validation, params.test)
    results, inputs = {}, [dense, heldout]
    with join_processes() as process:
        for name, path in models.items():
            if name == "dense" and (figures := read_reference(reference, process.dtype, params.measured(), inputs)):
                results[name] = from_plain(figures)
            else:
                # Without a name of its own a model is freed before the next one is loaded.
                results[name] = evaluate(
                    process.put(load(path, process.dtype)), windows, params.batch_size, name, process.world
                )
        if not process.world.is_main:
            return
    measured = report(results, params.window)
    write_json(metrics, measured)
    for name in results:
        echo(describe(name, measured[name]))
