"""Check by n-grams of words that no evaluation text is in the text that is learned from."""

from pathlib import Path
from typing import Annotated

from typer import Option, echo, secho

from stages._command import command
from stages._options import Heldout, Marker, Metrics, ParamsFile, Windows, Zeroshot
from tvaprune.artifacts import read_artifact, write_json
from tvaprune.inputs.calibration import load_tokenizer
from tvaprune.inputs.leaks import check_leaks, check_limit, declare_sources, evaluation_documents, report, short_texts
from tvaprune.params.check_leaks import CheckLeaksParams


@command
def main(
    windows: Windows = Path("artifacts/calibration"),
    model: Annotated[Path, Option(help="Directory of the windows' tokenizer.")] = Path("data/model"),
    calibration: Annotated[Path, Option(help="Directory of the windows' texts.")] = Path("data/calibration"),
    heldout: Heldout = Path("data/heldout"),
    zeroshot: Zeroshot = Path("data/zeroshot"),
    metrics: Metrics = Path("metrics/leaks.json"),
    out: Marker = Path("artifacts/leaks.ok"),
    params_file: ParamsFile = Path("params.yaml"),
) -> None:
    """Reads artifacts/calibration, the tokenizer in data/model, data/calibration/meta.json, data/heldout, data/zeroshot
    and params.yaml (check_leaks); writes metrics/leaks.json, also when the check fails, and artifacts/leaks.ok. A leak
    stops `dvc repro` here, before anything is learned.
    """
    params = CheckLeaksParams.load(params_file)
    ids, meta = read_artifact(windows, "calibration")
    found = check_leaks(ids, load_tokenizer(model), evaluation_documents(heldout, zeroshot), params.ngram)
    write_json(metrics, report(found, params.ngram, declare_sources(meta["windows"], calibration, heldout)))
    check_limit(found, params.ngram, params.max_overlap)
    for text in short_texts(found, params.ngram):
        secho(f"warning: {text}", fg="yellow", err=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("no evaluation text is in the text that is learned from\n")
    echo(f"largest share of an evaluation set's {params.ngram}-grams in the windows: {found.largest:.2e}")
