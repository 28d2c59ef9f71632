"""The tables of docs/results.md, from the metrics that the pipeline wrote.

`python -m tools.results` prints the workspace's own table; with `--experiments` also one row for each experiment of the
current commit (`dvc exp show`).
"""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

METRICS = Path("metrics")
TASKS = (("piqa", "acc"), ("hellaswag", "acc_norm"), ("arc_easy", "acc"))
NAMES = {"dense": "dense", "compact": "pruned", "finetuned": "pruned + LoRA"}


def read_metrics(folder: Path) -> dict[str, Any]:
    """metrics/NAME.json by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def workspace_table(metrics: dict[str, Any]) -> str:
    """Dense, pruned and recovered side by side."""
    rows = [
        "| | parameters | perplexity | prefill tok/s | decode tok/s | PIQA | HellaSwag | ARC-easy | mean of six |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    compact = metrics["compact"]
    for key, name in NAMES.items():
        if key not in metrics["perplexity"]:
            continue
        parameters = compact["params_dense" if key == "dense" else "params_kept"]
        cells = [name, f"{parameters / 1e6:.1f} M", f"{metrics['perplexity'][key]['ppl']:.1f}"]
        for phase in ("prefill", "decode"):
            speed = metrics["speed"][phase]
            gain = speed[key]["tokens_per_s"] / speed["dense"]["tokens_per_s"]
            cells.append(f"{speed[key]['tokens_per_s']:.0f} ({gain:.2f}×)")
        scores = metrics["zeroshot"][key]
        cells += [f"{scores[task][kind]:.3f}" for task, kind in TASKS] + [f"{scores['mean_acc']:.3f}"]
        rows.append("| " + " | ".join(cells) + " |")
    limit = metrics["zeroshot"]["limit"]
    rows_used = "all" if not limit else f"{limit:.0f}"
    rows.append(
        f"\n{compact['sparsity_decoder']:.1%} of the decoder removed ({compact['sparsity_model']:.1%} of the model). "
        f"Perplexity on {metrics['perplexity']['tokens']:.0f} held-out tokens in windows of "
        f"{metrics['perplexity']['window']:.0f}; zero-shot on {rows_used} rows of each task "
        f"(standard error about {metrics['zeroshot']['dense']['mean_acc_stderr']:.3f} of the mean); masks learned in "
        f"{metrics['masks']['seconds']:.0f} s, masked = compact to {compact['max_abs_logit_diff']:.0e} in logits."
    )
    return "\n".join(rows)


def shown_experiments() -> list[dict[str, Any]]:
    """What `dvc exp show --json` says of the current commit."""
    shown = subprocess.run(["dvc", "exp", "show", "--json"], check=True, capture_output=True, text=True)
    return json.loads(shown.stdout)


def measured_experiments(shown: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name, parameters and metrics by file name of every experiment in `dvc exp show --json` that was evaluated."""
    for revision in shown:
        for experiment in [revision, *(revision.get("experiments") or [])]:
            for one in experiment.get("revs") or [experiment]:
                data = one.get("data") or {}
                metrics = {
                    Path(path).stem: content.get("data") or {} for path, content in (data.get("metrics") or {}).items()
                }
                params = ((data.get("params") or {}).get("params.yaml") or {}).get("data") or {}
                if {"perplexity", "masks"} <= {name for name, content in metrics.items() if content}:
                    yield str(one.get("name") or one["rev"][:7]), params, metrics


def experiments_table(shown: list[dict[str, Any]]) -> str:
    """One row for each experiment with metrics, sorted by sparsity and perplexity."""
    rows = []
    for name, params, metrics in measured_experiments(shown):
        row = _experiment_row(name, params, metrics)
        if row not in rows:
            rows.append(row)
    head = (
        "| experiment | method | axes | sparsity | pruned ppl | + LoRA | × dense | learning s | prefill | decode |\n"
        "|---|---|---|---|---|---|---|---|---|---|"
    )
    return "\n".join([head, *("| " + " | ".join(row[2:]) + " |" for row in sorted(rows))])


def _experiment_row(name: str, params: dict[str, Any], metrics: dict[str, Any]) -> tuple[Any, ...]:
    perplexity, speed = metrics["perplexity"], metrics.get("speed") or {}
    finetuned = perplexity.get("finetuned", {}).get("ppl")
    compact = perplexity["compact"]["ppl"]
    return (
        params["sparsity"],
        compact,
        name,
        params["learn_masks"]["method"],
        " ".join(params["learn_masks"]["axes"]),
        str(params["sparsity"]),
        f"{compact:.1f}",
        "" if finetuned is None else f"{finetuned:.1f}",
        f"{compact / perplexity['dense']['ppl']:.2f}",
        f"{metrics['masks']['seconds']:.0f}",
        *(f"{speed[phase]['speedup']:.2f}×" if phase in speed else "" for phase in ("prefill", "decode")),
    )


def main(
    experiments: Annotated[bool, typer.Option(help="Add one row for each experiment of this commit.")] = False,
) -> None:
    """Print the tables as Markdown. Reads metrics/ and, when asked, `dvc exp show --json`."""
    typer.echo(workspace_table(read_metrics(METRICS)))
    if experiments:
        typer.echo("\n" + experiments_table(shown_experiments()))


if __name__ == "__main__":
    typer.run(main)
