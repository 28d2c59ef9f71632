"""The columns of result tables: each takes one figure out of a saved run.

A saved run is the content of metrics/results/NAME.json. Columns of a model's figures take them of `dense`, `compact`
(pruned) or `finetuned` (pruned + LoRA); a name with `lora_` before it takes them of `finetuned`.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvaprune.masks.latency_table import PHASES
from tvaprune.options.axes import AXES
from tvaprune.options.inputs import GUESSING, TASK_METRICS, TASK_TITLES

SavedRun = dict[str, Any]
Value = float | str | None
Take = Callable[[SavedRun, str], Value]  # a figure of a model


@dataclass(frozen=True)
class Column:
    """What a column is headed, its value in a saved run for a model, and how a number is written.

    Attributes:
        error: the value's standard error in a saved run, shown after it.
    """

    head: str
    value: Take
    write: Callable[[float], str] = "{:.2f}".format
    error: Take | None = None


def cell(column: Column, runs: Sequence[SavedRun], model: str) -> str:
    """The value in one run; in several their mean ± sample standard deviation. Empty where a run lacks it."""
    values = [column.value(run, model) for run in runs]
    numbers = [value for value in values if isinstance(value, int | float)]
    if len(numbers) < len(values) or not values:
        return " ".join(dict.fromkeys(str(value) for value in values if isinstance(value, str)))
    text = column.write(statistics.fmean(numbers))
    if len(numbers) > 1:
        return f"{text} ± {statistics.stdev(numbers):.2g}"
    error = column.error(runs[0], model) if column.error else None
    return f"{text} ± {column.write(error).lstrip('+')}" if isinstance(error, int | float) else text


def _of_finetuned(take: Take) -> Take:
    return lambda run, _: take(run, "finetuned")


def column(name: str) -> Column:
    """The column of a name. Raises ValueError if there is none."""
    if name.startswith("lora_"):
        found = column(name.removeprefix("lora_"))
        error = _of_finetuned(found.error) if found.error else None
        return Column(f"+ LoRA {found.head}", _of_finetuned(found.value), found.write, error)
    if name.startswith(("params.", "metrics.")):
        return Column(name.rpartition(".")[2].replace("_", " "), lambda run, _: _plain(value_at(run, name)), _number)
    if name.startswith(("validation_ratio.", "test_ratio.")):
        part, _, label = name.partition("_ratio.")
        return Column(f"{label} × dense", lambda run, model: _ratio(run, model, f"{part}.{label}"), _large)
    if name.startswith("quantized."):
        _, kind, key = name.split(".")
        if key in QUANTIZED:
            title, path, scale, write = QUANTIZED[key]
            head = title if kind == ROW_TYPE else f"{kind} {title}"
            return Column(head, at(f"quantized.{{model}}.{kind}.{path}", scale), write)
    if name not in COLUMNS:
        raise ValueError(
            f"no column {name}; columns are {', '.join(COLUMNS)}, validation_ratio.LABEL, test_ratio.LABEL, "
            f"quantized.TYPE.{{{','.join(QUANTIZED)}}}, params.KEY, metrics.KEY"
        )
    return COLUMNS[name]


def at(path: str, scale: float = 1) -> Callable[[SavedRun, str], Value]:
    """The number under a dotted path of the metrics, `{model}` in it replaced; not there: None."""

    def value(run: SavedRun, model: str) -> Value:
        found = value_at(run["metrics"], path.format(model=model))
        return found * scale if isinstance(found, int | float) else None

    return value


def value_at(content: dict[str, Any], key: str, default: Any = None) -> Any:
    """The value under a dotted key; the default where there is none."""
    found: Any = content
    for part in key.split("."):
        if not isinstance(found, dict) or part not in found:
            return default
        found = found[part]
    return found


def _validation(run: SavedRun, model: str) -> Value:
    """The perplexity on the validation text; of several texts the geometric mean."""
    texts = value_at(run["metrics"], f"perplexity.{model}.validation")
    return statistics.geometric_mean(text["ppl"] for text in texts.values()) if texts else None


def _ratio(run: SavedRun, model: str, part: str) -> Value:
    """A perplexity over the dense model's; of a set of texts the geometric mean. `part` is validation or test.LABEL."""
    if model == "dense":
        return 1.0 if value_at(run["metrics"], f"perplexity.dense.{part}") else None
    path = f"{part}_ratio" if "." not in part else f"{part}.ratio_to_dense"
    return at(f"perplexity.{{model}}.{path}")(run, model)


def _recovered(part: str) -> Callable[[SavedRun, str], Value]:
    """The share of the log-likelihood lost by pruning that fine-tuning brought back."""

    def value(run: SavedRun, _model: str) -> Value:
        pruned, finetuned = (_ratio(run, model, part) for model in ("compact", "finetuned"))
        if not isinstance(pruned, int | float) or not isinstance(finetuned, int | float) or pruned == 1:
            return None
        return 1 - math.log(finetuned) / math.log(pruned)

    return value


def _params_count(run: SavedRun, model: str) -> Value:
    return at("compact.params_dense" if model == "dense" else "compact.params_kept", 1e-6)(run, model)


def _heads(run: SavedRun, model: str) -> Value:
    """Key-value heads that are kept, over all layers."""
    return at("adapt.kv_heads_kept")(run, model)


def _axes(run: SavedRun, _model: str) -> Value:
    axes = value_at(run["params"], "learn_masks.axes") or []
    return "all" if len(axes) == len(AXES) else ", ".join(axes)


def _rate(phase: str) -> Callable[[SavedRun, str], Value]:
    """Tokens a second, and in brackets the speedup over the dense model in the same rounds."""

    def value(run: SavedRun, model: str) -> Value:
        rate = value_at(run["metrics"], f"speed.{phase}.{model}.tokens_per_s")
        speedup = 1 if model == "dense" else value_at(run["metrics"], f"speed.{phase}.{model}.speedup_paired")
        return f"{rate:.{0 if rate >= 10 else 2}f} ({speedup:.2f}×)" if rate and speedup else None

    return value


def _mean_of_dense(run: SavedRun, model: str, guessed: float = 0) -> Value:
    mean, dense = (value_at(run["metrics"], f"zeroshot.{each}.mean") for each in (model, "dense"))
    return (mean - guessed) / (dense - guessed) if mean and dense else None


def _margin_of_dense(run: SavedRun, model: str) -> Value:
    """What the mean has above guessing, as a share of the same of the dense model."""
    tasks = value_at(run["params"], "eval_zeroshot.mean_of") or []
    return _mean_of_dense(run, model, statistics.fmean(GUESSING[task] for task in tasks)) if tasks else None


def _large(value: float) -> str:
    """Perplexities and ratios: two decimals below 10, one below 1000, then none."""
    return f"{value:.2f}" if value < 9.995 else f"{value:,.1f}" if value < 999.95 else f"{value:,.0f}"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _plain(value: Any) -> Value:
    """A parameter as a cell: numbers stay, everything else is text."""
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _zeroshot() -> dict[str, Column]:
    columns = {"mean": Column("mean", at("zeroshot.{model}.mean"), "{:.3f}".format)}
    error = {"mean": at("zeroshot.{model}.mean_stderr")}
    for task, title in TASK_TITLES.items():
        metric = TASK_METRICS[task]
        path = f"zeroshot.{{model}}.{task}.{metric}"
        columns[task] = Column(f"{title} ({metric})", at(path), "{:.3f}".format)
        error[task] = at(f"{path}_stderr")
    both = {f"{name}_stderr": Column(each.head, each.value, each.write, error[name]) for name, each in columns.items()}
    path = "zeroshot.{model}.mean_minus_dense"
    shares = {
        "mean_minus_dense": Column("mean - dense", at(path), "{:+.3f}".format, at(f"{path}_stderr")),
        "mean_of_dense": Column("mean, of dense", _mean_of_dense),
        "margin_of_dense": Column("above guessing, of dense", _margin_of_dense),
    }
    return columns | both | shares


def _speed() -> dict[str, Column]:
    columns: dict[str, Column] = {}
    for phase in PHASES:
        columns[phase] = Column(phase, at(f"speed.{phase}.speedup"), "{:.2f}×".format)
        columns[f"{phase}_limit"] = Column(f"{phase} limit", at(f"speed.{phase}.limit"), "{:.2f}×".format)
        columns[f"{phase}_efficiency"] = Column(f"{phase} efficiency", at(f"speed.{phase}.efficiency"))
        columns[f"{phase}_ms"] = Column(f"{phase} ms", at(f"speed.{phase}.{{model}}.latency_ms"), "{:,.1f}".format)
        columns[f"{phase}_rate"] = Column(f"{phase} tok/s", _rate(phase))
    return columns


ROW_TYPE = "{type}"  # in the name of a column: the type that each row of the table has
# Of a model in one type: head, path under metrics/quantized.json's model and type, scale, format.
QUANTIZED: dict[str, tuple[str, str, float, Callable[[float], str]]] = {
    "size": ("MB", "bytes", 1e-6, "{:.0f}".format),
    "validation_ratio": ("× dense", "validation_ratio", 1, "{:.2f}".format),
    "test_ratio": ("test × dense", "test_ratio", 1, "{:.2f}".format),
    "mean_kl": ("KL", "mean_kl", 1, "{:.4f}".format),
    "decode": ("decode tok/s", "decode.tokens_per_s", 1, "{:.0f}".format),
    "prefill": ("prefill tok/s", "prefill.tokens_per_s", 1, "{:.0f}".format),
}

_share = "{:.0%}".format
COLUMNS: dict[str, Column] = {
    "method": Column("method", lambda run, _: value_at(run["params"], "learn_masks.method")),
    "axes": Column("axes", _axes),
    "sparsity": Column("target", lambda run, _: str(run["params"]["sparsity"])),
    "seeds": Column("seeds", lambda run, _: str(run["seed"])),
    # Perplexity: of the validation text, which decisions were made on, and of the test texts, which none was.
    "validation": Column("validation ppl", _validation, _large),
    "validation_ratio": Column("× dense", lambda run, model: _ratio(run, model, "validation"), _large),
    "test_ratio": Column("test × dense", lambda run, model: _ratio(run, model, "test"), _large),
    "recovered_validation": Column("recovered, validation", _recovered("validation"), _share),
    "recovered_test": Column("recovered, test", _recovered("test"), _share),
    "recovered_in_domain": Column("recovered, in domain", at("finetune.recovered.share"), _share),
    "finetune_steps": Column("LoRA steps", at("finetune.steps"), "{:.0f}".format),
    "finetune_minutes": Column("LoRA min", at("finetune.seconds", 1 / 60), "{:.1f}".format),
    # Mask learning.
    "seconds": Column("s", at("masks.seconds"), "{:,.0f}".format),
    "peak_gb": Column("GB", at("masks.peak_memory_bytes", 1e-9), "{:.1f}".format),
    "steps": Column("steps", at("masks.steps"), "{:.0f}".format),
    "sparsity_learned": Column("learned sparsity", at("masks.sparsity_learned"), "{:.4f}".format),
    # Sizes.
    "params": Column("parameters", _params_count, "{:.1f} M".format),
    "heads": Column("heads", _heads, "{:.0f}".format),
    "hidden": Column("hidden", at("adapt.hidden_after"), "{:.0f}".format),
    "intermediate": Column("intermediate", at("adapt.intermediate_mean_after"), "{:.1f}".format),
    "sparsity_decoder": Column("removed, decoder", at("compact.sparsity_decoder"), "{:.1%}".format),
    "sparsity_model": Column("removed, model", at("compact.sparsity_model"), "{:.1%}".format),
    **_zeroshot(),
    **_speed(),
}
