"""Measure zero-shot accuracy of the dense, the compact and the fine-tuned model, with lm-eval's prompts."""

from pathlib import Path

from typer import echo

from stages._evaluation import quiet_tokenizer
from stages._launch import join_processes, process_command
from stages._options import Compact, Finetuned, Metrics, Model, ParamsFile, Reference, Zeroshot
from tvaprune.artifacts import write_json
from tvaprune.checkpoint.loading import load
from tvaprune.measures.comparison import present_models, read_reference
from tvaprune.measures.zeroshot import Scores, describe, evaluate, select_rows, summarise
from tvaprune.params.eval_zeroshot import EvalZeroshotParams


@process_command
def main(
    dense: Model = Path("data/model"),
    compact: Compact = Path("artifacts/compact"),
    finetuned: Finetuned = Path("artifacts/finetuned"),
    zeroshot: Zeroshot = Path("data/zeroshot"),
    reference: Reference = Path("artifacts/dense_zeroshot.json"),
    metrics: Metrics = Path("metrics/zeroshot.json"),
    params_file: ParamsFile = Path("params.yaml"),
) -> None:
    """Reads the three model directories, with the dense one's tokenizer for all, data/zeroshot,
    artifacts/dense_zeroshot.json and params.yaml (eval_zeroshot); writes metrics/zeroshot.json.
    """
    params = EvalZeroshotParams.load(params_file)
    models = present_models(dense, compact, finetuned)
    rows = select_rows(zeroshot, list(params.tasks), params.limit)
    tokenizer = quiet_tokenizer(dense)
    measured: dict[str, Scores] = {}
    inputs = [dense, zeroshot]
    with join_processes() as process:
        for name, path in models.items():
            known = read_reference(reference, process.dtype, params.measured(), inputs) if name == "dense" else None
            if known is not None:
                measured[name] = Scores(**known)
                continue
            # Without a name of its own a model is freed before the next one is loaded.
            measured[name] = evaluate(
                process.put(load(path, process.dtype)), tokenizer, rows, params.batch_size, name, process.world
            )
        if not process.world.is_main:
            return
    results = {
        name: summarise(scores, params.mean_of, None if name == "dense" else measured["dense"])
        for name, scores in measured.items()
    }
    write_json(metrics, {"limit": params.limit or 0, **results})
    for name, result in results.items():
        echo(describe(name, result))
