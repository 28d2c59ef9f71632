"""Measure the perplexity of the dense model, once for all experiments that prune it."""

from pathlib import Path
from typing import Annotated

from transformers import AutoTokenizer
from typer import Option, echo

from stages._launch import join_processes, process_command
from stages._options import Heldout, Model, ParamsFile
from tvaprune.checkpoint.loading import load
from tvaprune.inputs.documents import load_texts
from tvaprune.measures.comparison import write_reference
from tvaprune.measures.perplexity import evaluate, heldout_windows, plain
from tvaprune.params.eval_perplexity import EvalPerplexityParams


@process_command
def main(
    dense: Model = Path("data/model"),
    heldout: Heldout = Path("data/heldout"),
    out: Annotated[Path, Option(help="JSON to write.")] = Path("artifacts/dense_perplexity.json"),
    params_file: ParamsFile = Path("params.yaml"),
) -> None:
    """Reads data/model, data/heldout and params.yaml (eval_perplexity); writes artifacts/dense_perplexity.json, which
    eval_perplexity compares the pruned models with.
    """
    params = EvalPerplexityParams.load(params_file)
    tokenizer = AutoTokenizer.from_pretrained(dense)
    windows = heldout_windows(load_texts(heldout), tokenizer, params.window, params.validation, params.test)
    with join_processes() as process:
        model = process.put(load(dense, process.dtype))
        found = evaluate(model, windows, params.batch_size, "dense", process.world)
        if process.world.is_main:
            write_reference(out, process.dtype, params.measured(), [dense, heldout], plain(found))
            echo(f"dense: {sum(len(texts) for texts in found.values())} texts measured")
