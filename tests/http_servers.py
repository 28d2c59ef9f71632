"""Servers of models in processes of their own, and what they answer over HTTP."""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

READY_S = 300


@contextmanager
def serving(command: list[str], directory: Path, **variables: str) -> Iterator[str]:
    """The address of a server that is started in `directory`, once it answers /health; it is killed with its workers.

    `command` takes --host and --port; `variables` are added to the environment. Raises AssertionError, with what the
    server printed, where it ends or does not answer within READY_S.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    logs, address = directory / "server.log", f"http://127.0.0.1:{port}"
    command = [*command, "--host", "127.0.0.1", "--port", str(port)]
    with logs.open("w") as log:
        process = subprocess.Popen(
            command, cwd=directory, env={**os.environ, **variables}, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + READY_S
        while not _answers(f"{address}/health"):
            assert process.poll() is None, logs.read_text()
            assert time.monotonic() < deadline, logs.read_text()
            time.sleep(0.5)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def post(url: str, **content: Any) -> Any:
    """What a server answers to a request of JSON."""
    request = urllib.request.Request(url, json.dumps(content).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except OSError:
        return False
    return True
