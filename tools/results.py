"""The tables of docs/results.md, from the metrics that the pipeline wrote.

`python -m tools.results` prints the workspace's table; with `--experiments` also one row for each experiment of the
current commit (`dvc exp show`), and one for each setting that ran with several seeds.
"""

import json
import math
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from typer import Option, echo

from stages._command import command
from tools import markdown
from tvaprune.masks.latency_table import PHASES
from tvaprune.options.inputs import TASK_METRICS, TaskName

METRICS = Path("metrics")
TASKS: tuple[TaskName, ...] = ("piqa", "hellaswag", "arc_easy")
NAMES = {"dense": "dense", "compact": "pruned", "finetuned": "pruned + LoRA"}
# Sections that the pruned model does not depend on.
AFTER_PRUNING = ("finetune_lora.", "benchmark_speed.", "eval_zeroshot.")


def validation_ppl(measured: dict[str, Any]) -> float:
    """Geometric mean of a model's perplexities on validation text, from its part of metrics/perplexity.json."""
    texts = measured["validation"].values()
    return math.prod(text["ppl"] for text in texts) ** (1 / len(texts))


def workspace_table(metrics: dict[str, Any]) -> str:
    """One row for each model that was measured, from the contents of metrics/NAME.json by NAME."""
    compact, perplexity, zeroshot = metrics["compact"], metrics["perplexity"], metrics["zeroshot"]
    rows = []
    for key in filter(perplexity.__contains__, NAMES):
        parameters = compact["params_dense" if key == "dense" else "params_kept"]
        cells = [NAMES[key], f"{parameters / 1e6:.1f} M", f"{validation_ppl(perplexity[key]):.1f}"]
        for phase in PHASES:
            rate, dense = (metrics["speed"][phase][model]["tokens_per_s"] for model in (key, "dense"))
            cells.append(f"{rate:.0f} ({rate / dense:.2f}×)")
        scores = zeroshot[key]
        rows.append([*cells, *(f"{scores[task][TASK_METRICS[task]]:.3f}" for task in TASKS), f"{scores['mean']:.3f}"])
    head = ["", "parameters", "perplexity", *(f"{phase} tok/s" for phase in PHASES)]
    table = markdown.table([*head, "PIQA", "HellaSwag", "ARC-easy", "mean"], rows)
    tokens = sum(perplexity["tokens"]["validation"].values())
    rows_scored = f"{zeroshot['limit']:.0f}" if zeroshot["limit"] else "all"
    return (
        f"{table}\n\n{compact['sparsity_decoder']:.1%} of the decoder removed ({compact['sparsity_model']:.1%} of the "
        f"model). Perplexity on {tokens:.0f} validation tokens in windows of {perplexity['window']:.0f}; "
        f"zero-shot on {rows_scored} rows of each task (standard error about "
        f"{zeroshot['dense']['mean_stderr']:.3f} of the mean); masks learned in "
        f"{metrics['masks']['seconds']:.0f} s, masked = compact to {compact['max_abs_logit_diff']:.0e} in logits."
    )


def shown_experiments() -> list[dict[str, Any]]:
    """The output of `dvc exp show --json` for the current commit."""
    command = [sys.executable, "-m", "dvc", "exp", "show", "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measured_experiments(shown: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name, parameters and metrics by file name of every experiment in `dvc exp show --json` that was evaluated.

    Experiments that failed, wait or still run are left out: they show the commit's metrics beside their own parameters.
    """
    for experiment in (one for revision in shown for one in [revision, *(revision.get("experiments") or [])]):
        if (experiment.get("executor") or {}).get("state", "success") != "success":
            continue
        for one in experiment.get("revs") or [experiment]:
            data = one.get("data") or {}
            metrics = {Path(path).stem: file.get("data") or {} for path, file in (data.get("metrics") or {}).items()}
            if not one.get("error") and metrics.get("perplexity") and metrics.get("masks"):
                params = ((data.get("params") or {}).get("params.yaml") or {}).get("data") or {}
                yield str(one.get("name") or one["rev"][:7]), params, metrics


def experiments_table(shown: list[dict[str, Any]]) -> str:
    """One row for each experiment with metrics, sorted by sparsity and perplexity.

    `changed` names the parameters that differ from the workspace's and have no column. The speeds of an experiment that
    did not run the benchmark are the commit's, and left out.
    """
    measured = list(measured_experiments(shown))
    rows = set()
    for _name, params, metrics in measured:
        _, base, base_metrics = measured[0]
        speed = metrics.get("speed") or {}
        if params != base and speed == base_metrics.get("speed"):
            speed = {}
        perplexity = metrics["perplexity"]
        compact = validation_ppl(perplexity["compact"])
        cells = (
            *_setting(params, base),
            str(params["sparsity"]),
            f"{compact:.1f}",
            f"{validation_ppl(perplexity['finetuned']):.1f}" if "finetuned" in perplexity else "",
            f"{compact / validation_ppl(perplexity['dense']):.2f}",
            f"{metrics['masks']['seconds']:.0f}",
            *(f"{speed[phase]['speedup']:.2f}×" if phase in speed else "" for phase in PHASES),
        )
        rows.add((params["sparsity"], compact, cells))
    head = ["method", "axes", "changed", "sparsity", "pruned ppl", "+ LoRA", "× dense", "learning s", *PHASES]
    return markdown.table(head, [cells for *_, cells in sorted(rows)])


def seeds_table(shown: list[dict[str, Any]]) -> str:
    """One row for each setting that ran with several seeds: mean and sample standard deviation of the perplexity."""
    measured = list(measured_experiments(shown))
    settings: dict[tuple[Any, ...], dict[int, float]] = defaultdict(dict)
    for _name, params, metrics in measured:
        setting = _setting(params, measured[0][1], "seed", *AFTER_PRUNING)
        settings[params["sparsity"], *setting][params["seed"]] = validation_ppl(metrics["perplexity"]["compact"])
    rows = []
    for (sparsity, *names), by_seed in sorted(settings.items()):
        if len(by_seed) > 1:
            mean, deviation = statistics.mean(by_seed.values()), statistics.stdev(by_seed.values())
            figures = [f"{mean:.1f}", f"{deviation:.2f}", f"{deviation / mean:.1%}"]
            rows.append([*names, str(sparsity), " ".join(map(str, sorted(by_seed))), *figures])
    head = ["method", "axes", "changed", "sparsity", "seeds", "pruned ppl, mean", "standard deviation", "of the mean"]
    return markdown.table(head, rows)


def _setting(params: dict[str, Any], base: dict[str, Any], *ignored: str) -> tuple[str, str, str]:
    """Method, axes, and `section.key=value` of the other parameters that differ from the base.

    `ignored` are names, or sections with their dot, to leave out.
    """
    ours, theirs = dict(_leaves(params)), dict(_leaves(base))
    columns = ("sparsity", "learn_masks.method", "learn_masks.axes", *ignored)
    differ = [name for name in ours if not name.startswith(columns) and ours[name] != theirs.get(name)]
    learn = params["learn_masks"]
    return learn["method"], " ".join(learn["axes"]), " ".join(f"{name}={ours[name]}" for name in sorted(differ))


def _leaves(params: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in params.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


@command
def main(
    experiments: Annotated[bool, Option(help="Add the experiments of this commit, and their settings.")] = False,
) -> None:
    """Reads metrics/ and, with --experiments, `dvc exp show --json`; prints the tables as Markdown."""
    echo(workspace_table({path.stem: json.loads(path.read_text()) for path in METRICS.glob("*.json")}))
    if experiments:
        shown = shown_experiments()
        echo(f"\n{experiments_table(shown)}\n\n{seeds_table(shown)}")
