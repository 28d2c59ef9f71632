"""The figures of a workspace's last run in one table: dense, pruned, and fine-tuned."""

import json
import os
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tvaprune.measures import markdown
from tvaprune.measures.columns import SavedRun, cell, column, value_at
from tvaprune.params.loading import read_yaml

WORKSPACE = "default"  # the name of the workspace's own run in tables; nothing is saved under it
COLUMNS = [
    "params", "validation", "test_ratio", "prefill_rate", "decode_rate",
    "piqa", "hellaswag", "arc_easy", "arc_challenge", "winogrande", "boolq", "mean",
]  # fmt: skip
ROWS = {"dense": "dense", "pruned": "compact", "pruned + LoRA": "finetuned"}  # label -> model of the metrics
NOTES = ("sizes", "texts", "speed", "zeroshot", "learning")
# Model directories that a run leaves, and what they are.
MODELS = {"artifacts/compact": "the pruned model", "artifacts/finetuned": "the pruned model, fine-tuned"}


def workspace_run(directory: Path = Path()) -> SavedRun:
    """metrics/*.json and params.yaml as a saved run; of the default run where they are as in git.

    Without the metrics `of_another_run`, which `left_out` names.
    """
    params, old = read_yaml(directory / "params.yaml"), of_another_run(directory)
    files = [path for path in (directory / "metrics").glob("*.json") if path.stem not in old]
    metrics = {path.stem: json.loads(path.read_text()) for path in files}
    return {"name": WORKSPACE, "seed": params["seed"], "params": params, "metrics": metrics, "left_out": old}


def of_another_run(directory: Path = Path()) -> list[str]:
    """The metrics of stages that ran on other artifacts than those that are here, by dvc.lock; sorted.

    So where a parameter was changed and only a part of the pipeline ran again.
    """
    lock = directory / "dvc.lock"
    stages = read_yaml(lock)["stages"] if lock.is_file() else {}
    made = {out["path"]: (name, out["md5"]) for name, stage in stages.items() for out in stage.get("outs", [])}

    @cache
    def old(name: str) -> bool:
        read = [(made[dep["path"]], dep["md5"]) for dep in stages[name].get("deps", []) if dep["path"] in made]
        return any(md5 != found or old(maker) for (maker, found), md5 in read)

    return sorted(
        Path(path).stem for path, (name, _) in made.items() if Path(path).match("metrics/*.json") and old(name)
    )


def own_table(run: SavedRun) -> str:
    """A row a model in Markdown, without columns that the run has nothing for, and what the figures are of.

    Raises:
        ValueError: the run has no figures at all.
    """
    cells = {name: [cell(column(name), [run], model) for model in ROWS.values()] for name in COLUMNS}
    shown = {name: column_cells for name, column_cells in cells.items() if any(column_cells)}
    if not shown:
        raise ValueError("metrics/ has no figures of a run; run dvc repro first")
    rows = [[label, *row] for label, row in zip(ROWS, zip(*shown.values(), strict=True), strict=True) if any(row)]
    table = markdown.table(["", *(column(name).head for name in shown)], rows)
    return "\n\n".join([table, " ".join(note for kind in NOTES for note in sentences(kind, [run]))]).strip()


def what_to_do_next(directory: Path = Path()) -> Iterator[str]:
    """The models that are there, and a command for each thing to do with them, a line each."""
    made = {path: what for path, what in MODELS.items() if (directory / path / "config.json").is_file()}
    for path, what in made.items():
        yield f"{path}: {what}"
    if not made:
        return
    best = list(made)[-1]
    verb = "tvaprune" if shutil.which("tvaprune") else "python -m tvaprune"
    commands = {
        f'{verb} generate {best} "The river"': "let it write",
        f"{verb} verify {best}": "repeat its checks, here or on a copy elsewhere",
        "dvc exp run -S sparsity=0.5": "prune more; dvc exp show compares",
    }
    if (directory / ".venv/bin/activate").is_file() and "VIRTUAL_ENV" not in os.environ:
        commands = {"source .venv/bin/activate": "once a terminal", **commands}
    width = max(map(len, commands))
    yield from ("", *(f"{command:{width}}  # {what}" for command, what in commands.items()))


def sentences(kind: str, runs: list[SavedRun]) -> Iterator[str]:
    metrics = runs[0]["metrics"]
    if kind == "sizes" and (compact := metrics.get("compact")):
        decoder, model = compact["sparsity_decoder"], compact["sparsity_model"]
        yield f"{decoder:.1%} of the decoder removed ({model:.1%} of the model)."
        difference = f"{compact['max_abs_logit_diff']:.0e}"
        yield f"The compact model's logits differ from the masked model's by at most {difference}."
    if kind == "texts" and isinstance(tokens := value_at(metrics, "perplexity.tokens"), dict):
        counts = [f"{sum(tokens[part].values()):,} {part} tokens" for part in ("validation", "test") if part in tokens]
        yield f"Perplexity on {' and '.join(counts)} in windows of {metrics['perplexity']['window']}."
        if error := value_at(metrics, "perplexity.compact.test_ratio_stderr"):
            yield f"Test × dense of the pruned model has a standard error of {error:.2f} over the windows."
    if kind == "speed" and (speed := metrics.get("speed")):
        yield (
            f"Rates are medians of {speed['repeats']} rounds; in brackets, the median of the speedups over the dense "
            "model in the same round."
        )
    if kind == "zeroshot" and (error := value_at(metrics, "zeroshot.dense.mean_stderr")):
        rows = f"{limit:.0f}" if (limit := metrics["zeroshot"]["limit"]) else "all"
        yield f"Zero-shot on {rows} rows of each task (standard error of the mean about {error:.3f})."
        names = {"compact": "pruning", "finetuned": "pruning and LoRA"}
        changes = [
            f"{value_at(metrics, f'zeroshot.{model}.mean_minus_dense'):+.3f} ± {stderr:.3f} by {name}"
            for model, name in names.items()
            if (stderr := value_at(metrics, f"zeroshot.{model}.mean_minus_dense_stderr"))
        ]
        if changes:
            yield f"The mean changes by {' and '.join(changes)}, where the rows of both models are paired."
    if kind == "learning" and "masks" in metrics:
        yield f"Masks learned in {metrics['masks']['seconds']:.0f} s."
    if kind == "machine":
        machines = [run["machine"] for run in runs if "machine" in run]
        found = (
            f"{each['processor']}, {each['threads']} of {each['logical_cores']} cores, {each['dtype']}, "
            f"torch {each['torch']}, transformers {each['transformers']}"
            for each in machines
        )
        if machines:
            yield f"Computed on {'; '.join(dict.fromkeys(found))}."
