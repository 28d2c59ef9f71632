"""How a command ends when its parameters, its inputs or the machine are wrong: one line on stderr, exit status 1."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from tvaprune.out_of_memory import memory_errors_named

TRACEBACK = "TVAPRUNE_TRACEBACK"  # in the environment, not empty: errors keep their traceback

_FULL = "; make room, then run it again"
_IN_THE_WAY = ", and is not a directory"
_REMEDIES = {errno.ENOSPC: _FULL, errno.EDQUOT: _FULL, errno.EFBIG: _FULL, errno.EEXIST: _IN_THE_WAY}


class MissingPackageError(ModuleNotFoundError, ValueError):
    """An optional package is not installed; the message says how to install it."""


@contextmanager
def clear_errors(unexpected_too: bool = False) -> Iterator[None]:
    """Turn errors that name their cause, such as a ValueError or a full disk, into a line.

    Args:
        unexpected_too: other errors as well, with how to get their traceback.
    """
    expected = (ValueError, OSError, SafetensorError)
    try:
        with memory_errors_named():
            yield
    except Exception as error:
        if os.environ.get(TRACEBACK) or not (unexpected_too or isinstance(error, expected)):
            raise
        hint = "" if isinstance(error, expected) else f" (set {TRACEBACK}=1 to see where)"
        print(f"error: {in_words(error)}{hint}", file=sys.stderr)
        raise SystemExit(1) from error


def in_words(error: Exception) -> str:
    """The message; of the operating system's errors the path and the reason; of unexpected ones the kind as well."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        remedy = _REMEDIES.get(error.errno or 0, "")
        return f"{where}{error.strerror}{remedy}"
    if isinstance(error, ValueError | OSError | SafetensorError):
        return str(error)
    return f"{type(error).__name__}: {error}".strip()
