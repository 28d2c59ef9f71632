"""The tables of docs/results.md, from the metrics that the pipeline wrote.

`python -m tools.results` prints the workspace's own table; with `--experiments` also one row for each experiment of the
current commit (`dvc exp show`), and one for each setting that ran with several seeds.
"""

import json
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

METRICS = Path("metrics")
TASKS = (("piqa", "acc"), ("hellaswag", "acc_norm"), ("arc_easy", "acc"))
NAMES = {"dense": "dense", "compact": "pruned", "finetuned": "pruned + LoRA"}
# Sections that the pruned model does not depend on.
AFTER_PRUNING = ("finetune_lora.", "benchmark_speed.", "eval_zeroshot.")


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
    shown = subprocess.run(
        [sys.executable, "-m", "dvc", "exp", "show", "--json"], check=True, capture_output=True, text=True
    )
    return json.loads(shown.stdout)


def measured_experiments(shown: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name, parameters and metrics by file name of every experiment in `dvc exp show --json` that was evaluated.

    One that failed, waits or still runs is left out: it holds the commit's metrics beside its own parameters.
    """
    for revision in shown:
        for experiment in [revision, *(revision.get("experiments") or [])]:
            if (experiment.get("executor") or {}).get("state", "success") != "success":
                continue
            for one in experiment.get("revs") or [experiment]:
                data = one.get("data") or {}
                metrics = {
                    Path(path).stem: content.get("data") or {} for path, content in (data.get("metrics") or {}).items()
                }
                params = ((data.get("params") or {}).get("params.yaml") or {}).get("data") or {}
                if not one.get("error") and {"perplexity", "masks"} <= {
                    name for name, content in metrics.items() if content
                }:
                    yield str(one.get("name") or one["rev"][:7]), params, metrics


def experiments_table(shown: list[dict[str, Any]]) -> str:
    """One row for each experiment with metrics, sorted by sparsity and perplexity.

    `changed` names the parameters that differ from the workspace's, but for sparsity, method and axes, which have
    columns of their own. An experiment that did not run the benchmark holds the commit's speeds, which are left out.
    """
    measured = list(measured_experiments(shown))
    rows = []
    for _name, params, metrics in measured:
        speed = metrics.get("speed") or {}
        own = params == measured[0][1] or speed != measured[0][2].get("speed")
        row = _experiment_row(params, metrics, speed if own else {}, _changed(params, measured[0][1]))
        if row not in rows:
            rows.append(row)
    head = (
        "| method | axes | changed | sparsity | pruned ppl | + LoRA | × dense | learning s | prefill | decode |\n"
        "|---|---|---|---|---|---|---|---|---|---|"
    )
    return "\n".join([head, *("| " + " | ".join(row[2:]) + " |" for row in sorted(rows))])


def seeds_table(shown: list[dict[str, Any]]) -> str:
    """One row for each setting that ran with several seeds: mean and sample standard deviation of the perplexity."""
    measured = list(measured_experiments(shown))
    settings: dict[tuple[float, str, str, str], dict[int, float]] = defaultdict(dict)
    for _name, params, metrics in measured:
        changed = _changed(params, measured[0][1], but=("seed", *AFTER_PRUNING))
        method, axes = params["learn_masks"]["method"], " ".join(params["learn_masks"]["axes"])
        settings[params["sparsity"], method, axes, changed][params["seed"]] = metrics["perplexity"]["compact"]["ppl"]
    rows = [
        "| method | axes | changed | sparsity | seeds | pruned ppl, mean | standard deviation | of the mean |",
        "|---" * 8 + "|",
    ]
    for (sparsity, method, axes, changed), by_seed in sorted(settings.items()):
        if len(by_seed) < 2:
            continue
        mean, deviation = statistics.mean(by_seed.values()), statistics.stdev(by_seed.values())
        seeds = " ".join(map(str, sorted(by_seed)))
        cells = [method, axes, changed, str(sparsity), seeds, f"{mean:.1f}", f"{deviation:.2f}"]
        rows.append("| " + " | ".join([*cells, f"{deviation / mean:.1%}"]) + " |")
    return "\n".join(rows)


def _changed(params: dict[str, Any], base: dict[str, Any], but: tuple[str, ...] = ()) -> str:
    """`section.key=value` of what differs between two sets of parameters and has no column.

    Args:
        but: names, or sections with their dot, to leave out.
    """
    ours, theirs = dict(_leaves(params)), dict(_leaves(base))
    columns = ("sparsity", "learn_masks.method", "learn_masks.axes", *but)
    differ = [name for name in ours if not name.startswith(columns) and ours[name] != theirs.get(name)]
    return " ".join(f"{name}={ours[name]}" for name in sorted(differ))


def _leaves(params: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in params.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _experiment_row(
    params: dict[str, Any], metrics: dict[str, Any], speed: dict[str, Any], changed: str
) -> tuple[Any, ...]:
    perplexity = metrics["perplexity"]
    finetuned = perplexity.get("finetuned", {}).get("ppl")
    compact = perplexity["compact"]["ppl"]
    return (
        params["sparsity"],
        compact,
        params["learn_masks"]["method"],
        " ".join(params["learn_masks"]["axes"]),
        changed,
        str(params["sparsity"]),
        f"{compact:.1f}",
        "" if finetuned is None else f"{finetuned:.1f}",
        f"{compact / perplexity['dense']['ppl']:.2f}",
        f"{metrics['masks']['seconds']:.0f}",
        *(f"{speed[phase]['speedup']:.2f}×" if phase in speed else "" for phase in ("prefill", "decode")),
    )


def main(
    experiments: Annotated[
        bool, typer.Option(help="Add one row for each experiment of this commit and each setting.")
    ] = False,
) -> None:
    """Print the tables as Markdown. Reads metrics/ and, when asked, `dvc exp show --json`."""
    typer.echo(workspace_table(read_metrics(METRICS)))
    if experiments:
        shown = shown_experiments()
        typer.echo("\n" + experiments_table(shown))
        typer.echo("\n" + seeds_table(shown))


if __name__ == "__main__":
    typer.run(main)
