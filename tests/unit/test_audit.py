"""The audit of the lock files against a service that answers, one that does not, and one that answers otherwise."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from tools.audit import vulnerabilities

REPOSITORY = Path(__file__).resolve().parents[2]


@contextmanager
def service(vulnerable: str = "", answer: bytes | None = None) -> Iterator[str]:
    """A server that knows a vulnerability of one package, or that gives this answer."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["queries"]
            results: list[dict[str, Any]] = [
                {"vulns": [{"id": "PYSEC-1"}]} if each["package"] == {"name": vulnerable, "ecosystem": "PyPI"} else {}
                for each in asked
            ]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"results": results}).encode() if answer is None else answer)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


def audit(address: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.audit", "--service", address]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


def test_a_vulnerable_pin_is_named_and_fails() -> None:
    with service(vulnerable="torch") as address:
        done = audit(address)
    assert done.returncode == 1
    assert done.stdout.startswith("torch==")
    assert ": PYSEC-1\n" in done.stdout
    assert done.stdout.endswith("packages checked, 1 with a known vulnerability\n")


def test_a_service_that_cannot_be_reached_is_no_clean_audit() -> None:
    with service() as address:
        assert audit(address).returncode == 0
    done = audit(address)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {address} cannot be reached, so nothing was checked: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("answer", [b"<html>", b"[]", b'{"results": [1]}', b'{"error": "no"}'])
def test_another_answer_is_no_clean_audit(answer: bytes) -> None:
    with service(answer=answer) as address, pytest.raises(ValueError, match="gave no answer of the OSV API"):
        vulnerabilities([("a", "1")], address)
    with service(answer=b'{"results": []}') as address, pytest.raises(ValueError, match="answered for 0 of 1 packages"):
        vulnerabilities([("a", "1")], address)
