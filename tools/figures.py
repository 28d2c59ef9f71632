"""Pictures of what the pipeline wrote, as PNG and SVG.

`python -m tools.figures` draws latency against width from metrics/profile.csv, the benchmark's rounds from
metrics/speed.csv, and, with `--experiments`, speedup against sparsity and quality against latency over the experiments
of the current commit (`dvc exp show`). What is not there yet is left out, and said.
"""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.results import measured_experiments, shown_experiments

PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class Point:
    """One pruned model of one experiment, and what it is compared with.

    Attributes:
        sparsity: target fraction of the decoder removed.
        latency_ms, speedup: by phase.
        perplexity: of the recovered model where there is one, else of the pruned.
        dense_ms, dense_perplexity: of the model before pruning, in the same run.
    """

    name: str
    method: str
    sparsity: float
    latency_ms: dict[str, float]
    speedup: dict[str, float]
    perplexity: float
    dense_ms: dict[str, float]
    dense_perplexity: float


def points(shown: list[dict[str, Any]]) -> list[Point]:
    """The experiments in `dvc exp show --json` that have speed and perplexity, each once."""
    found = []
    for name, params, metrics in measured_experiments(shown):
        if not metrics.get("speed"):
            continue
        speed, perplexity = metrics["speed"], metrics["perplexity"]
        point = Point(
            name=name,
            method=params["learn_masks"]["method"],
            sparsity=params["sparsity"],
            latency_ms={phase: speed[phase]["compact"]["latency_ms"] for phase in PHASES},
            speedup={phase: speed[phase]["speedup"] for phase in PHASES},
            perplexity=perplexity.get("finetuned", perplexity["compact"])["ppl"],
            dense_ms={phase: speed[phase]["dense"]["latency_ms"] for phase in PHASES},
            dense_perplexity=perplexity["dense"]["ppl"],
        )
        if point not in found:
            found.append(point)
    return found


def pareto(latency_and_loss: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other beats in both, fastest first."""
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
        own = [row for row in rows if row["model"] == model]
        axes.plot([int(row["repeat"]) for row in own], [float(row["latency_ms"]) for row in own], ".-", label=model)
    axes.set(title=phase, xlabel="round", ylabel="ms" if phase == "prefill" else "ms a token", ylim=(0, None))
    axes.legend()


def speedups(axes: Axes, measured: list[Point], phase: str) -> None:
    for method in sorted({point.method for point in measured}):
        own = sorted((point.sparsity, point.speedup[phase]) for point in measured if point.method == method)
        axes.plot(*zip(*own, strict=True), "o", label=method)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(title=phase, xlabel="target sparsity of the decoder", ylabel="speedup")
    axes.legend()


def qualities(axes: Axes, measured: list[Point], phase: str) -> None:
    for method in sorted({point.method for point in measured}):
        own = [(point.latency_ms[phase], point.perplexity) for point in measured if point.method == method]
        axes.plot(*zip(*own, strict=True), "o", label=method)
    dense = {(point.dense_ms[phase], point.dense_perplexity) for point in measured}
    axes.plot(*zip(*dense, strict=True), "k*", label="dense")
    front = pareto([*dense, *((point.latency_ms[phase], point.perplexity) for point in measured)])
    axes.plot(*zip(*front, strict=True), color="grey", linewidth=0.8, label="best so far", drawstyle="steps-post")
    unit = "ms" if phase == "prefill" else "ms a token"
    axes.set(title=phase, xlabel=unit, ylabel="held-out perplexity", yscale="log")
    axes.legend()


def draw(folder: Path, name: str, panel: Callable[[Axes, Any, str], None], content: Any) -> None:
    """One picture of two panels, prefill and decode, as NAME.png and NAME.svg."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, phase in zip(figure.subplots(1, 2), PHASES, strict=True):
        panel(axes, content, phase)
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("png", "svg"):
        figure.savefig(folder / f"{name}.{kind}", dpi=150)


def read_rows(path: Path) -> list[dict[str, str]]:
    """A CSV's rows; none where there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def main(
    experiments: Annotated[bool, typer.Option(help="Draw the experiments of this commit too.")] = False,
    metrics: Annotated[Path, typer.Option(help="Folder with profile.csv and speed.csv.")] = Path("metrics"),
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("artifacts/figures"),
) -> None:
    """Draw the figures. Reads metrics/ and, when asked, `dvc exp show --json`; writes PNG and SVG."""
    wanted = [
        ("latency_by_width", staircase, read_rows(metrics / "profile.csv"), "run dvc repro profile_hardware"),
        ("rounds", rounds, read_rows(metrics / "speed.csv"), "run dvc repro benchmark_speed"),
    ]
    if experiments:
        measured = points(shown_experiments())
        for name, panel in (("speedup_by_sparsity", speedups), ("quality_by_latency", qualities)):
            wanted.append((name, panel, measured, "run dvc exp run; no experiment has speed and perplexity yet"))
    for name, panel, content, remedy in wanted:
        if content:
            draw(out, name, panel, content)
            typer.echo(f"{out / name}.png and .svg")
        else:
            typer.echo(f"{name}: left out, nothing to draw ({remedy})")


if __name__ == "__main__":
    typer.run(main)
