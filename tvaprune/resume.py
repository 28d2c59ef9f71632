"""Go on after a kill: state outside the outputs, keyed by everything the result depends on.

DVC deletes a stage's outputs whenever the stage starts, so state lives under the repository's
.resume/ directory ($DVC_ROOT names the original repository also in a queued run's copy).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

import torch
from filelock import FileLock, Timeout


class AnotherWriterError(BlockingIOError):
    """Another live process is making the same output."""


@runtime_checkable
class Saver(Protocol):
    """Where long work keeps its state between two processes; `ResumableRun` is one."""

    def load(self) -> dict[str, Any] | None:
        """The last complete state, or None."""

    def save(self, state: dict[str, Any]) -> None:
        """Replace the state."""


@runtime_checkable
class SavedState(Saver, Protocol):
    """The same, with room for files; `ResumableRun` is one."""

    @property
    def directory(self) -> Path:
        """For files of the same lifetime as the state."""


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
    """A stage's saved state and its locks, as a context manager.

    On a clean exit the state is deleted; after an exception or a kill it stays for the next run with
    the same key. A changed parameter, input or line of code gives another key, so stale state is never
    resumed. Two locks keep a second writer out: one on the state, one on the workspace's outputs (a
    SIGTERM to dvc alone leaves its child running).

    Args:
        stage: the stage's name.
        settings: every parameter that the result depends on (JSON values).
        inputs: files and directories that the result depends on, code included.
        writer: False in all but one of several processes of one run: it reads, takes no lock and deletes nothing.

    Raises:
        AnotherWriterError: on entry, when a live process holds a lock.
    """

    def __init__(self, stage: str, settings: dict[str, Any], inputs: Iterable[Path], writer: bool = True) -> None:
        root = Path(os.environ.get("DVC_ROOT") or Path.cwd()) / ".resume"
        environment = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        identity = json.dumps([stage, settings, environment, hash_files(inputs)], sort_keys=True)
        key = hashlib.sha256(identity.encode()).hexdigest()[:24]
        workspace = hashlib.sha256(str(Path.cwd().resolve()).encode()).hexdigest()[:12]
        root.mkdir(parents=True, exist_ok=True)
        self.stage = stage
        self._writer = writer
        self.directory = root / f"{stage}-{key}"
        self._locks = [FileLock(root / f"{stage}-{name}.lock", timeout=0) for name in (workspace, key)]

    @property
    def _state_path(self) -> Path:
        return self.directory / "state.pt"

    def __enter__(self) -> Self:
        if not self._writer:
            self.directory.mkdir(parents=True, exist_ok=True)
            return self
        for index, lock in enumerate(self._locks):
            try:
                lock.acquire()
            except Timeout:
                for held in self._locks[:index]:
                    held.release()
                raise AnotherWriterError(
                    f"{self.stage}: another process is already making this output (lock {lock.lock_file}). "
                    "Wait for it to end, or stop it, then run dvc repro again."
                ) from None
        self.directory.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._writer:
            return
        if error is None:
            shutil.rmtree(self.directory, ignore_errors=True)
        for lock in reversed(self._locks):
            lock.release()

    def load(self) -> dict[str, Any] | None:
        """The last complete state, or None. A state that does not read back whole is ignored."""
        if not self._state_path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(self._state_path, weights_only=True)
        except Exception:
            return None
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Replace the state atomically: a kill at any moment leaves the old one or the new one."""
        assert self._writer, "one process of a run saves its state"
        unfinished = self._state_path.with_suffix(".unfinished")
        with unfinished.open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.replace(self._state_path)
