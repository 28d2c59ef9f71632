"""What a benchmark ran on: processor, threads, memory, and how fast it reads."""

import contextlib
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch


def pin_threads(threads: int | None) -> None:
    """Compute with so many CPU threads, kept to as many processors where the system can; None changes nothing."""
    if threads is None:
        return
    torch.set_num_threads(threads)
    if hasattr(os, "sched_setaffinity"):  # Linux
        os.sched_setaffinity(0, one_a_core(os.sched_getaffinity(0))[:threads])


def one_a_core(processors: Iterable[int], topology: Path = Path("/sys/devices/system/cpu")) -> list[int]:
    """The first hardware thread of every core in ascending order, then the second ones, and so on.

    Two hardware threads share a core's units. Where the system does not say, every processor counts as a core.
    """
    before: Counter[tuple[str, str]] = Counter()
    places = []
    for processor in sorted(processors):
        package, core = (topology / f"cpu{processor}/topology" / name for name in ("physical_package_id", "core_id"))
        known = package.is_file() and core.is_file()
        owner = (package.read_text(), core.read_text()) if known else ("", str(processor))
        places.append((before[owner], processor))
        before[owner] += 1
    return [processor for _, processor in sorted(places)]


def machine_name(device: torch.device) -> str:
    """The GPU's or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine_numbers(device: torch.device) -> dict[str, float]:
    """Threads, processors that they may run on, and how fast memory is read; on CUDA clock and power instead."""
    if device.type == "cuda":
        numbers: dict[str, float] = {}
        # Both need NVIDIA's management library, which not every machine has.
        with contextlib.suppress(ModuleNotFoundError, RuntimeError):
            numbers["clock_mhz"] = torch.cuda.clock_rate(device)
            numbers["power_w"] = torch.cuda.power_draw(device) / 1000
        return numbers
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"threads": torch.get_num_threads(), "processors": allowed, "read_bytes_per_s": read_bytes_per_s()}


def read_bytes_per_s(megabytes: int = 256, repeats: int = 5) -> float:
    """How fast the CPU's threads read memory that no cache holds: a sum over it, the median of some."""
    values = torch.ones(megabytes * 2**18)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        values.sum()
        seconds.append(time.perf_counter() - start)
    return values.nbytes / statistics.median(seconds[1:])
