"""What a command takes: seconds and memory."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any


def run_measured(
    command: Sequence[str], cwd: Path, out: IO[str] | None = None, env: dict[str, str] | None = None
) -> tuple[int, dict[str, Any]]:
    """A command's exit status, its seconds, and the largest resident set among its process and those it waited for.

    That is never less than this process's own: the new one shares its memory until the command starts, and the system
    counts that.

    Args:
        out: where its output and messages go; None: to this process's own.
        env: in place of this process's variables.
    """
    started = time.perf_counter()
    errors = None if out is None else subprocess.STDOUT
    process = subprocess.Popen(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=errors)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    scale = 1 if sys.platform == "darwin" else 1024
    figures = {"seconds": time.perf_counter() - started, "host_memory_bytes": usage.ru_maxrss * scale}
    return process.returncode, figures
