"""Parts whose steps succeed, fail, end their process and hang, for test_measure_gpu.py; its processes import this."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.gpu.resumable import NotPossibleError, Part, Results, run_steps

STEPS = Part("steps", "", 1, ("good", "lacking", "wrong", "deadly", "last"))
HANGING = Part("hanging", "", 1, ("hangs", "after"))
ORDERED = Part("ordered", "", 1, ("good", "wrong", "last"), in_order=True)


@dataclass(frozen=True)
class Settings:
    name: str = "some"

    def recorded(self) -> dict[str, Any]:
        return {"name": self.name}


def work(directory: Path, name: str, settings: Settings, steps: Sequence[str]) -> None:
    part = {each.name: each for each in (STEPS, HANGING, ORDERED)}[name]
    run_steps(Results(directory, part, settings.recorded()), steps, measure, {"device": "some"})


def measure(step: str) -> dict[str, Any]:
    if step == "lacking":
        raise NotPossibleError("no such device")
    if step == "wrong":
        raise KeyError("cause")
    if step == "deadly":
        os._exit(3)
    if step == "hangs":
        time.sleep(3600)
    return {"value": step}
