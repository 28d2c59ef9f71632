"""Long measurements in parts of several steps, which go on after a kill: one JSON file a part.

A part runs in a process of its own with a time limit. Its file is renewed after every step, so that a kill loses the
step that runs and nothing else. A later call runs what is not done: steps that were not tried come first.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tvaprune.artifacts import write_json
from tvaprune.errors import in_words

DONE, OVER, FAILED, UNFINISHED, NOT_RUN = "done", "over its limit", "failed", "unfinished", "not run"
_OWN_PACKAGES = ("stages", "tools", "tvaprune")


@dataclass(frozen=True)
class Part:
    """Some steps that are measured in one process."""

    name: str
    about: str
    minutes: float  # about how many on a large GPU, in all
    steps: tuple[str, ...]
    in_order: bool = False  # a step needs all before it


class NotPossibleError(Exception):
    """A step cannot run on this machine; the message says what is missing."""


class Results:
    """The file of a part: its state, and each step's state, seconds, machine and figures or error."""

    def __init__(self, directory: Path, part: Part, settings: dict[str, Any]) -> None:
        """Raises ValueError where the file was made with other settings."""
        self.part, self.path = part, directory / f"{part.name}.json"
        self.content: dict[str, Any] = {"part": part.name, "settings": settings, "running": None, "steps": {}}
        if self.path.is_file():
            self.content = json.loads(self.path.read_text())
            if self.content["settings"] != settings:
                raise ValueError(
                    f"{self.path}: made with {self.content['settings']}, not {settings}; use another directory"
                )
        self.steps: dict[str, dict[str, Any]] = self.content["steps"]

    def state_of(self, step: str) -> str:
        return self.steps[step]["state"] if step in self.steps else UNFINISHED

    @property
    def state(self) -> str:
        states = {self.state_of(step) for step in self.part.steps}
        return next((state for state in (OVER, FAILED, UNFINISHED, NOT_RUN) if state in states), DONE)

    @property
    def seconds(self) -> float:
        return sum(step["seconds"] for step in self.steps.values())

    def left(self) -> list[str]:
        """The steps to run: of those that are not done, first what no call has tried."""
        steps = [step for step in self.part.steps if self.state_of(step) != DONE]
        return steps if self.part.in_order else sorted(steps, key=lambda step: step in self.steps)

    def begin(self, step: str) -> None:
        self.content["running"] = step
        self._write()

    def end(self, step: str, entry: dict[str, Any]) -> None:
        self.steps[step] = entry
        self.content["running"] = None
        self._write()

    def _write(self) -> None:
        self.content |= {"state": self.state, "seconds": self.seconds}
        write_json(self.path, self.content)


def run_steps(results: Results, steps: Sequence[str], measure: Callable[[str], dict[str, Any]], made_on: Any) -> None:
    """Measure steps one after another, in the process of their part. Ends the process after a step that fails.

    The next steps then have a process that nothing is left in, of memory or of errors of the device.
    """
    _end_with_the_parent()
    for step in steps:
        results.begin(step)
        started = time.perf_counter()
        entry: dict[str, Any]
        try:
            entry = {"state": DONE, "figures": measure(step)}
        except NotPossibleError as error:
            entry = {"state": NOT_RUN, "error": str(error)}
        except Exception as error:
            traceback.print_exc()
            package = (getattr(error, "name", None) or "").partition(".")[0]
            lacking = isinstance(error, ModuleNotFoundError) and package not in _OWN_PACKAGES
            entry = {"state": NOT_RUN if lacking else FAILED, "error": in_words(error)}
        results.end(step, {**entry, "seconds": time.perf_counter() - started, "made_on": made_on})
        if entry["state"] == FAILED:
            sys.exit(1)


def _end_with_the_parent() -> None:
    """Make this process the first of a group, which is killed as soon as the parent is there no more."""
    os.setpgid(0, 0)
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


Work = Callable[[Path, str, Any, Sequence[str]], None]


def run_part(directory: Path, part: Part, settings: Any, work: Work, limit_s: float) -> Results:
    """Run what is left of a part, at most `limit_s` seconds, and return its results.

    `work(directory, part's name, settings, steps)` calls `run_steps`; it runs in a process of its own. A step that ends
    the process, or that runs at the limit, is recorded so, and the others are run in a new process.
    """
    started = time.monotonic()
    results = Results(directory, part, settings.recorded())
    steps = results.left()
    while steps and time.monotonic() - started < limit_s:
        process = get_context("spawn").Process(target=work, args=(directory, part.name, settings, steps))
        begun = time.monotonic()
        process.start()
        try:
            process.join(max(0.0, limit_s - (begun - started)))
        finally:
            over = process.is_alive()
            _kill_group(process)
        before, results = results, Results(directory, part, settings.recorded())
        tried = [each for each in steps if results.steps.get(each) != before.steps.get(each)]
        steps = [each for each in steps if each not in tried]
        running = [each for each in steps if each == results.content["running"]]
        broken = next(iter(running or (steps if over or not tried else ())), None)
        if broken:
            note = f"the part's limit of {limit_s:.0f} s" if over else f"its process ended, status {process.exitcode}"
            entry = {"state": OVER if over else FAILED, "error": note}
            results.end(broken, {**entry, "seconds": time.monotonic() - begun, "made_on": None})
            steps.remove(broken)
        if over or (part.in_order and any(results.state_of(each) == FAILED for each in (*tried, broken) if each)):
            break
    return results


def _kill_group(process: BaseProcess) -> None:
    """End the process and all that it started; it may not have become the first of its group yet."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
    process.kill()
    process.join()
