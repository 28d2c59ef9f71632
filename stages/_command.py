"""The command line of a stage: how it starts, and how it ends when its parameters or inputs are wrong."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import getdoc

import typer

from tvaprune.out_of_memory import memory_errors_named


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Make a function, the last of its module, what `python -m MODULE` runs; an import does not run it."""
    main = clear_errors()(main)
    if main.__module__ == "__main__":
        application(main)()
    return main


def application(main: Callable[..., None]) -> typer.Typer:
    """The command line of a `main`; its help is the docstrings of its module and its own.

    Help is plain text, because rich takes square brackets, such as those of shapes, for markup.
    """
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(help=f"{sys.modules[main.__module__].__doc__}\n\n{getdoc(main) or ''}")(main)
    return app


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn errors that name their cause (ValueError and its kin) into one line and exit status 1."""
    try:
        with memory_errors_named():
            yield
    except (ValueError, FileNotFoundError, BlockingIOError) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise SystemExit(1) from error
