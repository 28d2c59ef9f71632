"""Check that no evaluation text is in the text that is learned from."""

from pathlib import Path
from typing import Annotated

import typer

from stages._errors import clear_errors
from tvaprune.artifacts import read_artifact, write_json
from tvaprune.inputs.calibration import load_tokenizer
from tvaprune.inputs.leaks import check_leaks, check_limit, declare_sources, evaluation_documents, report
from tvaprune.params.check_leaks import CheckLeaksParams


def main(
    windows: Annotated[Path, typer.Option(help="Artifact with the windows to learn from.")] = Path(
        "artifacts/calibration"
    ),
    model: Annotated[Path, typer.Option(help="Directory of the tokenizer that the windows were made with.")] = Path(
        "data/model"
    ),
    calibration: Annotated[Path, typer.Option(help="Directory of the windows' texts; only meta.json is read.")] = (
        Path("data/calibration")
    ),
    heldout: Annotated[Path, typer.Option(help="Directory of the texts that perplexity is measured on.")] = Path(
        "data/heldout"
    ),
    zeroshot: Annotated[Path, typer.Option(help="Directory of one JSONL file a task.")] = Path("data/zeroshot"),
    metrics: Annotated[Path, typer.Option(help="JSON to write, also when the check fails.")] = Path(
        "metrics/leaks.json"
    ),
    out: Annotated[Path, typer.Option(help="Marker to write; always the same, so nothing after it reruns.")] = Path(
        "artifacts/leaks.ok"
    ),
    params_file: Annotated[Path, typer.Option("--params", help="Parameters; section check_leaks.")] = Path(
        "params.yaml"
    ),
) -> None:
    """Compare the evaluation text with the text that is learned from, by n-grams of words.

    Reads artifacts/calibration, the tokenizer in data/model, data/calibration, data/heldout and data/zeroshot; writes
    metrics/leaks.json and artifacts/leaks.ok. A leak stops `dvc repro` here, before anything is learned.
    """
    with clear_errors():
        params = CheckLeaksParams.load(params_file)
        ids, meta = read_artifact(windows, "calibration")
        found = check_leaks(ids, load_tokenizer(model), evaluation_documents(heldout, zeroshot), params.ngram)
        write_json(metrics, report(found, params.ngram, declare_sources(meta["windows"], calibration, heldout)))
        check_limit(found, params.ngram, params.max_overlap)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("no evaluation text is in the text that is learned from\n")
    typer.echo(f"largest share of an evaluation set's {params.ngram}-grams in the windows: {found.largest:.2e}")


if __name__ == "__main__":
    typer.run(main)
