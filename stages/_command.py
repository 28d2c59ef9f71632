"""The command line of a stage: how it starts, once at a time."""

import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import getdoc
from pathlib import Path

import typer
from filelock import FileLock, Timeout

from tvaprune import states_directory
from tvaprune.errors import clear_errors


class AnotherWriterError(BlockingIOError):
    """Another process runs the same stage in this workspace."""


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Make a function, the last of its module, what `python -m MODULE` runs; an import does not run it."""
    main = clear_errors()(main)
    if main.__module__ == "__main__":
        with clear_errors(), only_writer():
            application(main)()
    return main


@contextmanager
def only_writer() -> Iterator[None]:
    """Keep a stage's other processes out of this workspace for the duration of the block.

    A SIGTERM to DVC alone leaves its stage running, and the next `dvc repro` starts the stage again. The lock is a
    file in .resume/ of the repository, one a stage and workspace; it ends with its process. Tools take none, nor do
    the processes of several that write nothing.

    Raises:
        AnotherWriterError: another process holds the lock.
    """
    specification = sys.modules["__main__"].__spec__
    package, _, stage = (specification.name if specification else "").partition(".")
    if package != "stages" or "--help" in sys.argv or os.environ.get("RANK", "0") != "0":
        yield
        return
    root = states_directory()
    workspace = hashlib.sha256(str(Path.cwd().resolve()).encode()).hexdigest()[:12]
    root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(root / f"{stage}-{workspace}.lock", timeout=0)
    try:
        held = lock.acquire()
    except Timeout:
        raise AnotherWriterError(
            f"{stage}: another process is already making this output (lock {lock.lock_file}). "
            "Wait for it to end, or stop it, then run dvc repro again."
        ) from None
    with held:
        yield


def application(main: Callable[..., None]) -> typer.Typer:
    """The command line of a `main`; its help is the docstrings of its module and its own.

    Help is plain text, because rich takes square brackets, such as those of shapes, for markup.
    """
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(help=f"{sys.modules[main.__module__].__doc__}\n\n{getdoc(main) or ''}")(main)
    return app
