"""Figures of the pipeline's metrics, as PNG and SVG.

`python -m tools.figures` draws latency against width from metrics/profile.csv, the benchmark's rounds from
metrics/speed.csv, and, with `--experiments`, speedup against sparsity and quality against latency over the experiments
of the current commit (`dvc exp show`). It names the figures that it has no data for.
"""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from typer import Option, echo

from stages._command import command
from tools.results import measured_experiments, shown_experiments, validation_ppl
from tvaprune.masks.latency_table import PHASES

Panel = Callable[[Axes, Any, str], None]
UNITS = {"prefill": "ms", "decode": "ms a token"}


@dataclass(frozen=True)
class Point:
    """One pruned model of one experiment, and the dense model in the same run."""

    name: str
    method: str
    sparsity: float  # target, a fraction of the decoder's parameters
    speed: dict[str, Any]  # by phase, as in metrics/speed.json
    perplexity: float  # on validation text, of the fine-tuned model if there is one, else of the pruned model
    dense_perplexity: float

    def latency_ms(self, phase: str, model: str = "compact") -> float:
        return self.speed[phase][model]["latency_ms"]


def points(shown: list[dict[str, Any]]) -> list[Point]:
    """The experiments in `dvc exp show --json` that have speed and perplexity, each once."""
    found = []
    for name, params, metrics in measured_experiments(shown):
        if speed := metrics.get("speed"):
            perplexity, method = metrics["perplexity"], params["learn_masks"]["method"]
            best = validation_ppl(perplexity.get("finetuned", perplexity["compact"]))
            point = Point(name, method, params["sparsity"], speed, best, validation_ppl(perplexity["dense"]))
            if point not in found:
                found.append(point)
    return found


def pareto(latency_and_loss: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other point beats in both, fastest first."""
    front: list[tuple[float, float]] = []
    for latency, loss in sorted(latency_and_loss):
        if not front or loss < front[-1][1]:
            front.append((latency, loss))
    return front


def staircase(axes: Axes, rows: list[dict[str, str]], phase: str) -> None:
    """An MLP's latency by intermediate width, with its interquartile range."""
    width = [int(row["intermediate"]) for row in rows]
    milliseconds = [float(row[f"{phase}_ms"]) for row in rows]
    spread = [float(row[f"{phase}_iqr_ms"]) / 2 for row in rows]
    axes.errorbar(width, milliseconds, yerr=spread, marker=".", drawstyle="steps-mid")
    axes.set(title=phase, xlabel="intermediate width", ylabel="ms a layer", ylim=(0, None))


def rounds(axes: Axes, rows: list[dict[str, str]], phase: str) -> None:
    """Every measured round of the first batch size, by model."""
    rows = [row for row in rows if row["phase"] == phase and row["batch"] == rows[0]["batch"]]
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [(int(row["repeat"]), float(row["latency_ms"])) for row in rows if row["model"] == model]
        axes.plot(*zip(*own, strict=True), ".-", label=model)
    axes.set(title=phase, xlabel="round", ylabel=UNITS[phase], ylim=(0, None))
    axes.legend()


def speedups(axes: Axes, measured: list[Point], phase: str) -> None:
    """Speedup against sparsity, by method."""
    plot_methods(axes, measured, lambda point: (point.sparsity, point.speed[phase]["speedup"]))
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(title=phase, xlabel="target sparsity of the decoder", ylabel="speedup")
    axes.legend()


def qualities(axes: Axes, measured: list[Point], phase: str) -> None:
    """Perplexity against latency, by method, and the points that no other beats."""
    plot_methods(axes, measured, lambda point: (point.latency_ms(phase), point.perplexity))
    dense = {(point.latency_ms(phase, "dense"), point.dense_perplexity) for point in measured}
    axes.plot(*zip(*dense, strict=True), "k*", label="dense")
    front = pareto([*dense, *((point.latency_ms(phase), point.perplexity) for point in measured)])
    axes.plot(*zip(*front, strict=True), color="grey", linewidth=0.8, label="best so far", drawstyle="steps-post")
    axes.set(title=phase, xlabel=UNITS[phase], ylabel="validation perplexity", yscale="log")
    axes.legend()


def plot_methods(axes: Axes, measured: list[Point], position: Callable[[Point], tuple[float, float]]) -> None:
    for method in sorted({point.method for point in measured}):
        own = sorted(position(point) for point in measured if point.method == method)
        axes.plot(*zip(*own, strict=True), "o", label=method)


def draw(folder: Path, name: str, panel: Panel, content: Any) -> Figure:
    """Write a figure of two panels, prefill and decode, as NAME.png and NAME.svg."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, phase in zip(figure.subplots(1, 2), PHASES, strict=True):
        panel(axes, content, phase)
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("png", "svg"):
        figure.savefig(folder / f"{name}.{kind}", dpi=150)
    return figure


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none if there is no such file."""
    return list(csv.DictReader(path.read_text().splitlines())) if path.is_file() else []


@command
def main(
    experiments: Annotated[bool, Option(help="Also draw the experiments of this commit.")] = False,
    metrics: Annotated[Path, Option(help="Folder with profile.csv and speed.csv.")] = Path("metrics"),
    out: Annotated[Path, Option(help="Folder to write to.")] = Path("artifacts/figures"),
) -> None:
    """Reads metrics/ and, with --experiments, `dvc exp show --json`; writes PNG and SVG."""
    wanted: list[tuple[str, Panel, Any, str]] = [
        ("latency_by_width", staircase, read_rows(metrics / "profile.csv"), "run dvc repro profile_hardware"),
        ("rounds", rounds, read_rows(metrics / "speed.csv"), "run dvc repro benchmark_speed"),
    ]
    if experiments:
        measured, remedy = points(shown_experiments()), "run dvc exp run; no experiment has speed and perplexity yet"
        wanted.append(("speedup_by_sparsity", speedups, measured, remedy))
        wanted.append(("quality_by_latency", qualities, measured, remedy))
    for name, panel, content, remedy in wanted:
        if content:
            draw(out, name, panel, content)
            echo(f"{out / name}.png and .svg")
        else:
            echo(f"{name}: left out, nothing to draw ({remedy})")
