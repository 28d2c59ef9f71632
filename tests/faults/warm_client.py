"""Stands in for `python` and `dvc`: a server that has imported the libraries forks the program. See warm.py.

Run as `python -IS warm_client.py SOCKET PROGRAM ARGUMENTS`; it ends as the program ends, also by a signal.
"""

import json
import os
import signal
import socket
import sys
from pathlib import Path


def main(address: str, *command: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    request = {"command": command, "directory": str(Path.cwd()), "environment": dict(os.environ), "group": os.getpgrp()}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        socket.send_fds(connection, [b"."], [0, 1, 2])
        connection.sendall(json.dumps(request).encode() + b"\n")
        answer = connection.makefile().readline()
    status = int(answer or 70)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
        os.kill(os.getpid(), -status)
    sys.exit(status)


if __name__ == "__main__":
    main(*sys.argv[1:])
