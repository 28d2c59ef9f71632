"""Check every parameter of the pipeline before any stage works."""

from pathlib import Path
from typing import Annotated

import typer

from stages._errors import clear_errors
from tvaprune.params.everything import check_everything


def main(
    params_file: Annotated[Path, typer.Option("--params", help="Parameters; every section.")] = Path("params.yaml"),
    out: Annotated[Path, typer.Option(help="Marker to write; always the same, so nothing after it reruns.")] = Path(
        "artifacts/params.ok"
    ),
) -> None:
    """Check the parameters.

    Reads params.yaml; writes artifacts/params.ok. An error anywhere stops `dvc repro` here, before the first download.
    """
    with clear_errors():
        check_everything(params_file)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("every parameter was checked\n")


if __name__ == "__main__":
    typer.run(main)
