"""What the machine can do: the tests that need a GPU, and the card's own limits."""

import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import torch
from torch.utils.benchmark import Timer

from tools.gpu.parts import REPOSITORY, Settings
from tools.gpu.resumable import NotPossibleError
from tvaprune.device import pick_device, pick_dtype

_TESTS = "tests/unit/test_cuda.py"
_LINES_KEPT = 60


def tests(step: str, settings: Settings) -> dict[str, Any]:
    """What pytest says of the tests marked gpu."""
    if not torch.cuda.is_available():
        raise NotPossibleError("no CUDA device")
    if find_spec(step) is None:
        raise NotPossibleError(f"{step} is not installed")
    # Without the options of pyproject.toml, which need plugins.
    command = [sys.executable, "-m", step, "-m", "gpu", _TESTS, "-q", "-rfE", "-o", "addopts="]
    done = subprocess.run(
        command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines = done.stdout.splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    summary = lines[-1].strip("= ") if lines else ""
    return {"status": done.returncode, "summary": summary, "failed": failed, "end": lines[-_LINES_KEPT:]}


def bandwidth(step: str, settings: Settings) -> dict[str, Any]:
    """`copy`: bytes read and written a second. `matmul`: FLOPs a second of a square product, in the models' dtype."""
    device = pick_device()
    dtype = pick_dtype(device)
    if step == "copy":
        source = torch.ones(2**20 if settings.tiny else 2**32, dtype=torch.uint8, device=device)
        values = {"source": source, "target": torch.empty_like(source)}
        return {"bytes_per_s": 2 * source.nbytes / _seconds("target.copy_(source)", values, settings)}
    width = 64 if settings.tiny else 8192
    values = {name: torch.randn(width, width, device=device).to(dtype) for name in ("one", "other", "product")}
    seconds = _seconds("torch.mm(one, other, out=product)", values, settings)
    return {"flops_per_s": 2 * width**3 / seconds, "width": width, "dtype": str(dtype).removeprefix("torch.")}


def _seconds(statement: str, values: dict[str, torch.Tensor], settings: Settings) -> float:
    """The median time of a statement; the timer waits for the device."""
    timer = Timer(statement, globals={"torch": torch, **values}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.02 if settings.tiny else 2).median
