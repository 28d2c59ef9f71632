"""Check every parameter of the pipeline before any stage works."""

from pathlib import Path

from stages._command import command
from stages._options import Marker, ParamsFile
from tvaprune.params.everything import check_everything


@command
def main(params_file: ParamsFile = Path("params.yaml"), out: Marker = Path("artifacts/params.ok")) -> None:
    """Reads params.yaml; writes artifacts/params.ok. An error anywhere stops `dvc repro` here, before the first
    download.
    """
    check_everything(params_file)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("every parameter was checked\n")
