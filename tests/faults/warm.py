"""DVC and stages without their start: a server imports the libraries once and forks a process for each program.

Importing torch and transformers takes most of a tiny stage's time, and nothing is written meanwhile. A forked stage
imports `stages` and `tvaprune` from its own directory, as a fresh one does. It has its own process, in the process
group of whoever started it, so that it is killed like any other. `python` and `dvc` of `Warm.programs` are for PATH.
"""

import atexit
import importlib
import json
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tests.pipeline.workspace import REPOSITORY, environment

CLIENT = Path(__file__).with_name("warm_client.py")
OWN = ("stages", "tvaprune", "tests", "tools")
# What the programs import, and what these import only when they run.
LIST_MODULES = """
import importlib, pathlib, sys
for path in sorted(pathlib.Path("stages").glob("[!_]*.py")):
    importlib.import_module(f"stages.{path.stem}")
import dvc.cli, dvc.commands.repro, dvc.repo.reproduce, dvc.stage.cache, dvc.stage.run, dvc_data.hashfile.build
import transformers.models.llama.modeling_llama, transformers.generation, peft.tuners.lora
print("\\n".join(sys.modules))
"""


@dataclass(frozen=True)
class Warm:
    """A running server.

    Attributes:
        programs: directory with `python` and `dvc`.
        running: directory with the process id of each program's last start, by its name, such as `compact` or `dvc`.
    """

    programs: Path
    running: Path

    def variables(self) -> dict[str, str]:
        """What a process finds in its environment, to start programs here."""
        return {"PATH": f"{self.programs}{os.pathsep}{environment()['PATH']}", "WARM_RUNNING": str(self.running)}

    def forget(self, name: str) -> None:
        (self.running / name).unlink(missing_ok=True)

    def process_id(self, name: str) -> int | None:
        """Of the program's last start since `forget`."""
        with suppress(FileNotFoundError, ValueError):
            return int((self.running / name).read_text())
        return None


@contextmanager
def warm_programs(directory: Path, hash_seed: int = 1) -> Iterator[Warm]:
    """A server for the duration of the block; all its programs have the same PYTHONHASHSEED."""
    programs, running, address = directory / "programs", directory / "running", directory / "socket"
    for folder in (programs, running):
        folder.mkdir(parents=True, exist_ok=True)
    address.unlink(missing_ok=True)
    for name in ("python", "dvc"):
        command = [sys.executable, "-IS", str(CLIENT), str(address), name]
        (programs / name).write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        (programs / name).chmod(0o755)
    variables = environment() | {"PYTHONHASHSEED": str(hash_seed), "WARM_PYTHON": str(programs / "python")}
    with (directory / "server.log").open("w") as log:
        command = [sys.executable, "-m", "tests.faults.warm", str(address)]
        server = subprocess.Popen(
            command, cwd=REPOSITORY, env=variables, stdin=subprocess.PIPE, stdout=log, stderr=log, process_group=0
        )
        try:
            while not address.exists():
                if server.poll() is not None:
                    raise AssertionError((directory / "server.log").read_text())
                time.sleep(0.05)
            yield Warm(programs, running)
        finally:
            server.kill()
            server.wait()


def serve(address: str) -> None:
    """Fork a process for each request, until standard input is closed."""
    listed = subprocess.run([sys.executable, "-c", LIST_MODULES], capture_output=True, text=True, check=True).stdout
    for name in listed.split():
        if name.partition(".")[0] not in {*OWN, "__main__"}:
            with suppress(Exception):
                importlib.import_module(name)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{address}.unfinished")
        listener.listen(64)
        Path(f"{address}.unfinished").rename(address)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [])
            if sys.stdin in ready:
                return
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                attend(connection)
            connection.close()


def attend(connection: socket.socket) -> NoReturn:
    """Start what one client asks for, and tell it how that ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, files, _, _ = socket.recv_fds(connection, 1, 3)
    request = json.loads(connection.makefile().readline())
    child = os.fork()
    if child == 0:
        connection.close()
        become(request, files)
    for file in files:
        os.close(file)
    _, status = os.waitpid(child, 0)
    with suppress(OSError):
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def become(request: dict[str, Any], files: list[int]) -> NoReturn:
    """Run the program in this process, and end as a fresh interpreter would."""
    os.setpgid(0, request["group"])
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["directory"])
    python = os.environ["WARM_PYTHON"]
    os.environ.clear()
    os.environ.update(request["environment"])
    program, *arguments = request["command"]
    status = 0
    try:
        if program == "dvc":
            note("dvc")
            from dvc.cli import main

            status = main(arguments)
        else:
            sys.executable = python  # what the stage starts in turn
            run_python(arguments)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run_python(arguments: list[str]) -> None:
    """`-m MODULE ...` or `[-P] FILE ...`, the two ways that the pipeline starts Python."""
    if arguments[0] == "-m":
        sys.path[0] = str(Path.cwd())
        note(arguments[1].rpartition(".")[2])
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        arguments = arguments[arguments[0] == "-P" :]
        sys.path[0] = str(Path.cwd())
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def note(name: str) -> None:
    """Where this program's process id is looked for."""
    if directory := os.environ.get("WARM_RUNNING"):
        unfinished = Path(directory, f"{name}.{os.getpid()}")
        unfinished.write_text(str(os.getpid()))
        unfinished.rename(Path(directory, name))


if __name__ == "__main__":
    serve(sys.argv[1])
