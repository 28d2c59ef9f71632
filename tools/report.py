"""Compare runs in one page, and draw the pictures of the README.

`python -m tools.report` reads the saved runs of metrics/results, the workspace's run and the experiments that `dvc exp`
keeps, and writes one HTML page: quality by sparsity, and quality against latency with the runs that no other beats. It
names the runs that it has no figures for. It is no stage: a stage that depends on other runs would rerun after each of
them. `--pictures docs/pictures` draws the last run's figures from metrics/ as SVG files instead.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from typer import Option, echo

from stages._command import command
from tools.saved_runs import Run, experiment_refs, read_saved, record
from tvaprune.artifacts import ArtifactError
from tvaprune.masks.latency_table import PHASES
from tvaprune.measures.columns import value_at
from tvaprune.report import svg
from tvaprune.report.page import Figure, Report, Section, Table, html
from tvaprune.report.run import CURVES, METRICS, RunFiles, read_csv, read_json
from tvaprune.report.sections import quality, speed

PICTURES = {"Perplexity": "perplexity", "Speedup of the pruned model": "speedup"}


@dataclass(frozen=True)
class Compared:
    """One run's figures, each relative to the dense model in the same run.

    Attributes:
        sparsity: target, a fraction of the decoder's parameters.
        ratio: test perplexity over the dense model's, of the fine-tuned model if there is one.
        latency: by phase, the pruned model's share of the dense latency; empty where speed was not measured.
    """

    name: str
    method: str
    sparsity: float
    finetuned: bool
    ratio: float
    latency: dict[str, float]


def compared(runs: dict[str, dict[str, Any]]) -> list[Compared]:
    """The runs that have perplexity on test text, in the order of their names."""
    found = []
    for name, run in sorted(runs.items()):
        metrics, params = run["metrics"], run["params"]
        finetuned = "finetuned" in metrics.get("perplexity", {})
        ratio = value_at(metrics, f"perplexity.{'finetuned' if finetuned else 'compact'}.test_ratio")
        if ratio is not None:
            latency = {str(p): 1 / metrics["speed"][p]["speedup"] for p in PHASES} if "speed" in metrics else {}
            method = params["learn_masks"]["method"]
            found.append(Compared(name, method, params["sparsity"], finetuned, ratio, latency))
    return found


def experiments() -> dict[str, Run]:
    """The runs that `dvc exp` keeps, and the workspace's. A name that several have is followed by its commit."""
    refs = experiment_refs()
    counts = Counter(ref.rpartition("/")[2] for ref in refs)
    found = {"workspace": Run.of_workspace()}
    for ref in refs:
        run, name = Run.of_ref(ref), ref.rpartition("/")[2]
        found[name if counts[name] == 1 else f"{name} ({run.commit[:7]})"] = run
    return found


def comparison(runs: list[Compared]) -> Report:
    """The page. A run is a number beside its point; the table names it."""
    rows = []
    for n, run in enumerate(runs, start=1):
        latency = [f"{run.latency[phase]:.3f}" if run.latency else "" for phase in PHASES]
        tuned = "yes" if run.finetuned else "no"
        rows.append([str(n), run.name, run.method, f"{run.sparsity:g}", tuned, f"{run.ratio:.3f}", *latency])
    head = ["number", "run", "method", "target sparsity", "fine-tuned", "test perplexity × dense"]
    table = Table("Runs", [*head, *(f"{phase} latency ÷ dense" for phase in PHASES)], rows)
    sections = [Section("runs", "Runs", [table]), Section("front", "Quality", list(_figures(runs, table)))]
    summary = f"{len(runs)} runs, each relative to the dense model in the same run. Lower is better."
    return Report("Comparison of runs", summary, sections)


def _figures(runs: list[Compared], table: Table) -> Iterator[Figure]:
    names = ["dense", "pruned", "pruned + LoRA"]
    numbered = list(enumerate(runs, start=1))
    points = [svg.Point(run.sparsity, run.ratio, str(n), 1 + run.finetuned) for n, run in numbered]
    title, note = "Quality by sparsity", "Numbers are those of the table."
    yield Figure(title, note, svg.scatter(title, note, points, [], names, ("target sparsity", "× dense")), table)
    for phase in PHASES:
        points = [
            svg.Point(run.latency[phase], run.ratio, str(n), 1 + run.finetuned) for n, run in numbered if run.latency
        ]
        if points:
            title = f"Quality against latency, {phase}"
            points.append(svg.Point(1, 1, "dense", 0))
            front = svg.pareto([(point.x, point.y) for point in points])
            note = "The dashed line joins the runs that no other beats in both."
            labels = ("latency ÷ dense", "× dense")
            yield Figure(title, note, svg.scatter(title, note, points, front, names, labels), table)


def pictures(metrics: Path) -> dict[str, str]:
    """The figures of PICTURES as SVG files' content, by name, from the last run's metrics."""
    run = RunFiles(
        {name: read_json(metrics / f"{name}.json") for name in METRICS},
        {name: read_csv(metrics / f"{name}.csv") for name in CURVES},
    )
    blocks = [*quality(run), *speed(run)]
    drawn = {block.caption: svg.standalone(block.svg) for block in blocks if isinstance(block, Figure)}
    return {name: drawn[caption] for caption, name in PICTURES.items() if caption in drawn}


@command
def main(
    metrics: Annotated[Path, Option(help="Folder of the metrics; its results/ has the saved runs.")] = Path("metrics"),
    out: Annotated[Path, Option(help="HTML file to write.")] = Path("artifacts/comparison.html"),
    drawn: Annotated[
        Path | None, Option("--pictures", help="Folder to draw the README's pictures in, in place of the page.")
    ] = None,
) -> None:
    """Reads metrics/ and the experiments in git; writes an HTML page, or SVG pictures."""
    if drawn:
        drawn.mkdir(parents=True, exist_ok=True)
        for name, content in pictures(metrics).items():
            (drawn / f"{name}.svg").write_text(content, encoding="utf-8")
            echo(str(drawn / f"{name}.svg"))
        return
    saved = read_saved(metrics / "results")
    for name, run in experiments().items():
        try:
            saved[name], _ = record(name, run)
        except (ValueError, FileNotFoundError) as error:
            echo(f"{name}: left out, {error}", err=True)
    found = compared(saved)
    if not found:
        raise ArtifactError("no run has perplexity on test text; run dvc repro")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html(comparison(found)), encoding="utf-8")
    echo(f"{out}: {len(found)} runs")
    for name in sorted(set(saved) - {run.name for run in found}):
        echo(f"{name}: left out, has no perplexity on test text", err=True)
