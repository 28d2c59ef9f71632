"""Resume a stage after a kill: state outside the outputs, identified by everything the result depends on.

DVC deletes a stage's outputs whenever the stage starts, so state is kept in the repository's .resume/ directory
($DVC_ROOT names the original repository, also in a queued run's copy).
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

import torch
from filelock import FileLock, Timeout

from tvaprune import states_directory
from tvaprune.out_of_memory import is_out_of_memory


class StateInUseError(BlockingIOError):
    """Another process computes the same result and saves its state."""


@runtime_checkable
class Saver(Protocol):
    """Storage for the state of long work between two processes, such as `ResumableRun`."""

    def load(self) -> dict[str, Any] | None:
        """The last complete state, or None."""

    def save(self, state: dict[str, Any]) -> None:
        """Replace the state."""


@runtime_checkable
class SavedState(Saver, Protocol):
    """A `Saver` that also has a directory for files."""

    @property
    def directory(self) -> Path:
        """For files that live as long as the state."""


@dataclass(frozen=True)
class NoState:
    """A `SavedState` that keeps nothing: each run starts from the beginning."""

    directory: Path

    def load(self) -> None:
        return None

    def save(self, state: dict[str, Any]) -> None:
        pass


def hash_files(paths: Iterable[Path]) -> str:
    """SHA-256 over the contents and relative names of files, or of all files below directories."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        for file in files:
            digest.update(str(file.relative_to(path)).encode() + b"\0")
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


class ResumableRun:
    """A stage's saved state and its lock, as a context manager.

    A clean exit deletes the state; after an exception or a kill it stays for the next run with the same settings and
    inputs. Any change in a parameter, an input or the code starts without a state. Experiments in copies of the
    workspace share the directory of states; by the lock, a second one with the same settings and inputs waits.

    Args:
        settings: every parameter that the result depends on (JSON values).
        inputs: files and directories that the result depends on, code included.
        writer: True in one of the processes of a run; the others only read, take no lock and delete nothing.
        waits: whether entry waits while another run holds the lock. Not where processes share a run: its readers
            would have read that run's state.

    Raises:
        StateInUseError: on entry, when another run holds the lock and this one does not wait.
    """

    def __init__(
        self,
        stage: str,
        settings: dict[str, Any],
        inputs: Iterable[Path],
        writer: bool = True,
        waits: bool = True,
    ) -> None:
        root = states_directory()
        identity = json.dumps([stage, settings, torch.__version__, hash_files(inputs)], sort_keys=True)
        key = hashlib.sha256(identity.encode()).hexdigest()[:24]
        root.mkdir(parents=True, exist_ok=True)
        self.directory = root / f"{stage}-{key}"
        self._stage = stage
        self._writer = writer
        self._waits = waits
        self._state_path = self.directory / "state.pt"
        self._lock = FileLock(root / f"{stage}-{key}.lock", timeout=0)

    def __enter__(self) -> Self:
        if self._writer:
            try:
                self._lock.acquire()
            except Timeout:
                busy = f"{self._stage}: another process is computing the same result (lock {self._lock.lock_file})"
                if not self._waits:
                    raise StateInUseError(f"{busy}. Wait for it to end, or stop it, then run this again.") from None
                print(f"{busy}; waiting for it to end", file=sys.stderr, flush=True)
                self._lock.acquire(timeout=-1)
        self.directory.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer and error is None:
            shutil.rmtree(self.directory, ignore_errors=True)
        self._lock.release()

    def load(self) -> dict[str, Any] | None:
        """The last complete state; None if there is none, or if it is damaged, which is said."""
        try:
            return torch.load(self._state_path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            return None
        except Exception as error:  # a damaged file raises almost anything
            if isinstance(error, OSError) or is_out_of_memory(error):
                raise
            damage = f"{self._state_path}: damaged ({' '.join(str(error).split())[:200]})"
            print(f"{damage}; {self._stage} starts from the beginning", file=sys.stderr, flush=True)
            return None

    def save(self, state: dict[str, Any]) -> None:
        """Replace the state atomically: a kill at any moment leaves the old one or the new one."""
        assert self._writer, "only the writer saves"
        unfinished = self._state_path.with_suffix(".unfinished")
        with unfinished.open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.replace(self._state_path)
