"""Measure the zero-shot accuracy of the dense model, once for all experiments that prune it."""

from pathlib import Path
from typing import Annotated

from typer import Option, echo

from stages._evaluation import quiet_tokenizer
from stages._launch import join_processes, process_command
from stages._options import Model, ParamsFile, Zeroshot
from tvaprune.checkpoint.loading import load
from tvaprune.measures.comparison import write_reference
from tvaprune.measures.zeroshot import evaluate, select_rows
from tvaprune.params.eval_zeroshot import EvalZeroshotParams


@process_command
def main(
    dense: Model = Path("data/model"),
    zeroshot: Zeroshot = Path("data/zeroshot"),
    out: Annotated[Path, Option(help="JSON to write.")] = Path("artifacts/dense_zeroshot.json"),
    params_file: ParamsFile = Path("params.yaml"),
) -> None:
    """Reads data/model, data/zeroshot and params.yaml (eval_zeroshot); writes artifacts/dense_zeroshot.json, which
    eval_zeroshot compares the pruned models with.
    """
    params = EvalZeroshotParams.load(params_file)
    rows, tokenizer = select_rows(zeroshot, list(params.tasks), params.limit), quiet_tokenizer(dense)
    with join_processes() as process:
        model = process.put(load(dense, process.dtype))
        found = evaluate(model, tokenizer, rows, params.batch_size, "dense", process.world)
        if process.world.is_main:
            write_reference(out, process.dtype, params.measured(), [dense, zeroshot], found._asdict())
            echo(f"dense: {len(found.figures)} tasks measured")
