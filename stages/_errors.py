"""How a stage ends when its parameters or inputs are wrong: one clear line, no traceback."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn errors that name their cause (ValueError and its kin) into one line and exit status 1."""
    try:
        yield
    except (ValueError, FileNotFoundError, BlockingIOError) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise SystemExit(1) from error
