"""Tables in Markdown of what the parts' files hold; each names the device that its figures are of."""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tools.gpu.resumable import DONE, Results
from tvaprune.masks.latency_table import PHASES
from tvaprune.measures import markdown
from tvaprune.measures.markdown import SPEEDUP, speedup_cells

Figures = dict[str, dict[str, Any]]  # by step
Rows = tuple[Sequence[str], list[list[str]]]


def tables(parts: Iterable[Results]) -> str:
    """All parts, one table for each device, version and commit that figures are of; then what has none, and why."""
    limits: dict[str, dict[str, Any]] = {}
    blocks = []
    for results in parts:
        groups: dict[str, Figures] = {}
        for name in results.part.steps:
            step = results.steps.get(name, {})
            if step.get("state") == DONE:
                groups.setdefault(json.dumps(step["made_on"]), {})[name] = step["figures"]
        shapes = "" if results.content["settings"]["shapes"] == "full" else f", {results.content['settings']['shapes']}"
        for machine, figures in groups.items():
            made_on = json.loads(machine)
            if results.part.name == "bandwidth":
                limits[made_on["device"]] = {key: value for each in figures.values() for key, value in each.items()}
            where = ", ".join([made_on.pop("device"), *(f"{key} {value}" for key, value in made_on.items())])
            head, rows = _ROWS[results.part.name](figures, limits.get(json.loads(machine)["device"], {}))
            blocks.append(f"### {results.part.name}: {results.part.about}{shapes}\n\n{where}\n")
            blocks.append(markdown.table(head, rows) + "\n")
        blocks += [f"{results.part.name}, {line}\n" for line in _without_figures(results)]
    return "\n".join(blocks)


def _without_figures(results: Results) -> list[str]:
    found = {name: step for name, step in results.steps.items() if step["state"] != DONE}
    return [f"{name}: {step['state']} ({' '.join(step['error'].split())})" for name, step in found.items()]


def _tests(figures: Figures, limits: dict[str, Any]) -> Rows:
    return ["tests", "failed"], [[each["summary"], " ".join(each["failed"])] for each in figures.values()]


def _bandwidth(figures: Figures, limits: dict[str, Any]) -> Rows:
    rows = []
    if "copy" in figures:
        rows.append(["copy, bytes read and written", f"{figures['copy']['bytes_per_s'] / 1e9:.0f} GB/s"])
    if each := figures.get("matmul"):
        rows.append([f"product of {each['width']}² in {each['dtype']}", f"{each['flops_per_s'] / 1e12:.0f} TFLOP/s"])
    return ["", "measured"], rows


def _speed(figures: Figures, limits: dict[str, Any]) -> Rows:
    """A row a phase and model; `of the card` is the share of what the card copies, or multiplies, a second."""
    head = ["", "", "removed", "hidden", "intermediate", "kv heads", "ms", "iqr", *SPEEDUP, "of the card"]
    rows = []
    for step, each in figures.items():
        lengths = {"prefill": f"prefill of {each['prefill_tokens']}", "decode": "decode"}
        for phase, rate in zip(PHASES, ("flops_per_s", "bytes_per_s"), strict=True):
            done = {"flops_per_s": "flops_per_s", "bytes_per_s": "bytes_read_per_s"}[rate]
            for name, found in each[phase].items():
                widths = each["widths"][name]
                shape = [f"{widths['sparsity']:.3f}", f"{widths['hidden']}"]
                shape += [f"{widths['intermediate']:.0f}", f"{widths['kv_heads']:.2f}"]
                times = [f"{found['latency_ms']:.2f}", f"{found['iqr_ms']:.2f}", *speedup_cells(found)]
                share = f"{found[done] / limits[rate]:.2f}" if rate in limits else ""
                rows.append([f"{step}, {lengths[phase]}", name, *shape, *times, share])
    return head, rows


def _steps(figures: Figures, limits: dict[str, Any]) -> Rows:
    head = [
        "",
        "s a step",
        "without",
        "× without",
        "minutes of all steps",
        "peak GB",
        "estimated",
    ]
    rows = []
    for step, each in figures.items():
        if "gates_s" in each:
            seconds, without, lacking = each["gates_s"], each["bare_s"], "gates"
        else:
            seconds, without, lacking = each["step_s"], each["alone_s"], "a teacher"
        cells = [f"{seconds:.3f}", f"{without:.3f} without {lacking}", f"{seconds / without:.2f}"]
        cells += [f"{seconds * each['steps'] / 60:.1f} for {each['steps']}", *_memory(each, "peak_memory_bytes")]
        rows.append([step, *cells])
    return head, rows


def _whole(figures: Figures, limits: dict[str, Any]) -> Rows:
    head = ["stage", "minutes", "host GB", "device GB in use", "device GB estimated"]
    rows = []
    for step, each in figures.items():
        host = f"{each['host_memory_bytes'] / 1e9:.1f}" if "host_memory_bytes" in each else ""
        rows.append([step, f"{each['seconds'] / 60:.2f}", host, *_memory(each, "device_memory_bytes")])
    rows.append(["all", f"{sum(each['seconds'] for each in figures.values()) / 60:.2f}", "", "", ""])
    return head, rows


def _memory(figures: dict[str, Any], name: str) -> list[str]:
    """What was used and what was estimated, in GB."""
    return [f"{figures[key] / 1e9:.2f}" if figures.get(key) else "" for key in (name, "estimated_memory_bytes")]


def _vllm(figures: Figures, limits: dict[str, Any]) -> Rows:
    from tools.vllm_speed import row

    (each,) = figures.values()
    times = {int(requests): found for requests, found in each["times"].items()}
    rows = [row(found, requests, each["new_tokens"]) for requests, found in times.items()]
    return ["requests", *next(iter(times.values()))], rows


_ROWS: dict[str, Callable[[Figures, dict[str, Any]], Rows]] = {
    "tests": _tests,
    "bandwidth": _bandwidth,
    "decode": _speed,
    "multiples": _speed,
    "axes": _speed,
    "steps": _steps,
    "whole": _whole,
    "vllm": _vllm,
}
