"""How a stage starts: as one process, or as the many that TVAPRUNE_NPROC asks for."""

import sys
from collections.abc import Callable

import typer

from stages._errors import clear_errors
from tvaprune.distributed import launch, processes_asked


def run(main: Callable[..., None]) -> None:
    """Run a stage's `main` on the command line's arguments; with TVAPRUNE_NPROC above 1, in so many processes."""
    specification = sys.modules["__main__"].__spec__
    with clear_errors():
        processes = processes_asked()
        if processes > 1 and specification is not None and not {"--help", "--estimate"} & set(sys.argv):
            launch(specification.name, sys.argv[1:], processes)
            return
    typer.run(main)
