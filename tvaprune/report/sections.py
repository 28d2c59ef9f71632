"""The sections of a run's report, each from the files that it is about; left out where there are none."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from tvaprune.masks.latency_table import PHASES
from tvaprune.options.inputs import TASK_METRICS, TASK_TITLES
from tvaprune.report import svg
from tvaprune.report.page import Block, Figure, Report, Samples, Section, Table, Tile
from tvaprune.report.run import MODELS, RunFiles, Widths

AXIS_NAMES = {"hidden": "hidden dimensions", "intermediate": "MLP units", "kv_heads": "key-value heads"}
SERIES = {model: n for n, model in enumerate(MODELS)}
SMOOTHED = 10  # steps in a running mean


def report_of(run: RunFiles, prompts: Sequence[str], texts: dict[str, list[str]]) -> Report:
    """The report of one run. `texts`: by model, what it adds to each prompt."""
    parts = [
        ("pruned", "What was pruned", _pruned(run)),
        ("quality", "Quality", quality(run)),
        ("speed", "Speed", speed(run)),
        ("size", "Size", _size(run)),
        ("quantised", "Quantised", _quantised(run)),
        ("text", "Generated text", _samples(prompts, texts)),
        ("training", "Training", _training(run)),
        ("cost", "Cost", _cost(run)),
        ("provenance", "Provenance", _provenance(run)),
    ]
    made = [(name, title, list(blocks)) for name, title, blocks in parts]
    model = _model_name(run)
    compact = run.metrics["compact"]
    summary = (
        f"{model}, structured pruning by “{_made_with(run).get('learn_masks', {}).get('method', 'unknown')}”: "
        f"{millions(compact['params_dense'])} → {millions(compact['params_kept'])} parameters, "
        f"{percent(compact['sparsity_decoder'])} of the decoder removed."
    )
    sections = [Section(name, title, blocks) for name, title, blocks in made if blocks]
    return Report(f"Pruning report: {model}", summary, sections, list(_tiles(run)))


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}%"


def millions(count: float) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,.0f}"


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"


def duration(seconds: float) -> str:
    """Seconds, and minutes where they are many."""
    return f"{seconds:,.1f} s" if seconds < 120 else f"{seconds / 60:,.1f} min"


def _model_name(run: RunFiles) -> str:
    source = run.source
    if name := source.get("repo"):
        return str(name)
    member = str(source.get("member", "")).rpartition("/")[2].removesuffix(".gguf")
    return member or str(source.get("name") or "local model")


def _made_with(run: RunFiles) -> dict[str, Any]:
    return run.made.get("made_with", {})


def _tiles(run: RunFiles) -> Iterator[Tile]:
    metrics = run.metrics
    yield Tile("Decoder parameters removed", percent(metrics["compact"]["sparsity_decoder"]), "of the dense decoder")
    best = list(run.measured("perplexity").items())[-1:]
    for model, shown in best:
        if ratio := metrics["perplexity"][model].get("test_ratio"):
            yield Tile("Test perplexity", f"{ratio:.2f} ×", f"dense; {shown}")
    for phase in PHASES:
        if phase in metrics["speed"]:
            found = metrics["speed"][phase]
            note = f"upper bound {found['limit']:.2f} ×; pruned model"
            yield Tile(f"Speedup, {phase}", f"{found['speedup']:.2f} ×", note)
    scored = list(run.measured("zeroshot").items())
    if scored:
        (model, shown), figures = scored[-1], metrics["zeroshot"]
        note = f"dense {figures['dense']['mean']:.3f}; {shown}"
        yield Tile("Zero-shot accuracy, mean", f"{figures[model]['mean']:.3f}", note)


def _pruned(run: RunFiles) -> Iterator[Block]:
    rows = []
    for axis, widths in run.widths.items():
        total, mean = sum(widths.kept), sum(widths.importance) / len(widths.importance)
        full = widths.full * len(widths.kept)
        narrow = f"{min(widths.kept)} to {max(widths.kept)} of {widths.full}" if len(widths.kept) > 1 else ""
        rows.append([AXIS_NAMES[axis], f"{total:,} of {full:,}", percent(total / full), narrow, percent(mean, 2)])
    yield (
        "Key-value heads are removed with their query heads. A unit's importance is exp(score), as the pruning method "
        "scored it; the last column is its kept share, averaged over layers. A method's scores depend on its "
        "scale: do not compare them between methods."
    )
    yield Table("Kept widths", ["axis", "kept", "share", "in a layer", "kept importance"], rows)
    for axis in ("intermediate", "kv_heads"):
        widths, name = run.widths[axis], AXIS_NAMES[axis]
        note = f"A column is a layer; its frame is the dense width, {widths.full:,}."
        described = f"From {min(widths.kept)} to {max(widths.kept)} of {widths.full} {name} are kept in a layer."
        drawn = svg.columns(f"{name} kept by layer", described, widths.kept, widths.full, "layer")
        yield Figure(f"{name} kept".capitalize().replace("Mlp", "MLP"), note, drawn, _by_layer(name, widths))
    lines = [
        svg.Line(AXIS_NAMES[axis], list(enumerate(run.widths[axis].importance)), n)  # type: ignore[index]
        for n, axis in enumerate(("intermediate", "kv_heads"), start=1)
    ]
    drawn = svg.lines(
        "Kept importance by layer", "Share of each layer's importance that is kept.", lines, ("layer", "")
    )
    rows = [[str(n), *(f"{each.points[n][1]:.4f}" for each in lines)] for n in range(len(lines[0].points))]
    table = Table("Kept importance by layer", ["layer", *(each.name for each in lines)], rows)
    if len(rows) > 1:
        yield Figure("Importance kept", "Share of each layer's importance; 1 = no importance removed.", drawn, table)


def _by_layer(name: str, widths: Widths) -> Table:
    rows = [[str(n), f"{kept:,}", percent(kept / widths.full)] for n, kept in enumerate(widths.kept)]
    return Table(f"{name} kept by layer", ["layer", "kept", "share"], rows)


def quality(run: RunFiles) -> Iterator[Block]:
    """Perplexity by text and zero-shot accuracy by task, of every model."""
    models = run.measured("perplexity")
    if not models:
        return
    measured, rows, groups = run.metrics["perplexity"], [], {}
    for part in ("validation", "test"):
        for text in measured["dense"][part]:
            found = {model: measured[model][part][text] for model in models}
            cells = [f"{each['ppl']:.2f} ± {each['ppl_stderr']:.2f}" for each in found.values()]
            ratios = [f"{each['ratio_to_dense']:.2f}" for model, each in found.items() if model != "dense"]
            rows.append([f"{text}, {part}", f"{measured['tokens'][part][text]:,}", *cells, *ratios])
            label = text if part == "test" else f"{text} (val.)"
            groups[label] = [svg.Dot(SERIES[m], each["ppl"], each["ppl_stderr"]) for m, each in found.items()]
    yield (
        f"Perplexity in windows of {measured['window']:,} tokens, ± one standard error. Use validation text for "
        "decisions, and test text for the final report only."
    )
    pruned = [f"{shown} × dense" for model, shown in models.items() if model != "dense"]
    table = Table("Perplexity by text; lower is better", ["text", "tokens", *models.values(), *pruned], rows)
    yield table
    names = list(models.values())
    described = "; ".join(f"{row[0]}: " + ", ".join(row[2 : 2 + len(names)]) for row in rows)
    drawn = svg.dots("Perplexity by text", described, groups, names, "perplexity; left is better", log=True)
    figures = [Figure("Perplexity", "Lines: ± one standard error.", drawn, table)]
    if run.measured("zeroshot"):
        table, drawn = _zeroshot(run)
        limit = run.metrics["zeroshot"]["limit"]
        note = f"Lines: ± one standard error, on {f'{limit} rows' if limit else 'all rows'} of each task."
        yield table
        figures.append(Figure("Zero-shot accuracy", note, drawn, table))
    yield from figures


def _zeroshot(run: RunFiles) -> tuple[Table, str]:
    """By task, with its own metric."""
    scores, models = run.metrics["zeroshot"], run.measured("zeroshot")
    rows, groups = [], {}
    for task in [*(name for name in scores["dense"] if name in TASK_TITLES), "mean"]:
        metric = TASK_METRICS.get(task, "mean")
        found = {model: scores[model] if task == "mean" else scores[model][task] for model in models}
        values = {model: (each[metric], each[f"{metric}_stderr"]) for model, each in found.items()}
        shown = [f"{value:.3f} ± {error:.3f}" for value, error in values.values()]
        rows.append([TASK_TITLES.get(task, task), metric if task != "mean" else "", *shown])
        groups[TASK_TITLES.get(task, task)] = [svg.Dot(SERIES[model], *value) for model, value in values.items()]
    table = Table("Zero-shot accuracy; higher is better", ["task", "metric", *models.values()], rows)
    described = "; ".join(f"{row[0]}: {', '.join(row[2:])}" for row in rows)
    names = list(models.values())
    return table, svg.dots("Zero-shot accuracy by task", described, groups, names, "accuracy; right is better")


def speed(run: RunFiles) -> Iterator[Block]:
    """Latency of every model, the speedup beside its limit, every measured round, and the profile."""
    timed = run.metrics["speed"]
    if not timed:
        return
    rows, bars = [], []
    for phase in PHASES:
        found = timed[phase]
        for model in [name for name in MODELS if name in found]:
            each = found[model]
            ratio = found["dense"]["latency_ms"] / each["latency_ms"]
            cells = [f"{each['latency_ms']:.2f} ± {each['iqr_ms'] / 2:.2f}", f"{each['tokens_per_s']:,.0f}"]
            rows.append([f"{phase}, {MODELS[model]}", *cells, f"{ratio:.2f} ×"])
        bars.append(svg.Bar(phase, found["speedup"], f"{found['speedup']:.2f} ×", 1, found["limit"]))
    first = next(iter(run.curves.get("speed", [])), {})
    kind = ", ".join(first[key] for key in ("machine", "runtime", "dtype") if first.get(key))
    threads = f"{timed['threads']} threads, " if "threads" in timed else ""  # none on a GPU
    yield (
        f"Measured on {kind or 'this machine'}, batch {timed['batch']}, {threads}"
        f"{timed['repeats']} rounds: a prefill of {timed['prefill_tokens']} tokens, and {timed['decode_tokens']} "
        "tokens decoded one by one. The limit is the ratio of operations for prefill, and of bytes read for decode."
    )
    head = ["phase and model", "ms, median ± half the quartile range", "tokens/s", "speedup"]
    yield Table("Latency; decode is per token", head, rows)
    limits = [
        [phase, f"{found['speedup']:.3f} ×", f"{found['limit']:.3f} ×", percent(found["efficiency"])]
        for phase in PHASES
        if (found := timed[phase])
    ]
    table = Table("Speedup beside its limit", ["phase", "speedup, pruned", "limit", "reached"], limits)
    described = "; ".join(f"{row[0]}: {row[1]} of {row[2]}" for row in limits)
    drawn = svg.bars("Speedup of the pruned model", described, bars, "times the dense model", "limit")
    yield Figure("Speedup of the pruned model", "1 = as fast as the dense model.", drawn, table)
    yield from _rounds(run)
    yield from _staircase(run)


def _rounds(run: RunFiles) -> Iterator[Figure]:
    """Every measured round of the first batch size."""
    rows = run.curves.get("speed", [])
    for phase in PHASES:
        own = [row for row in rows if row["phase"] == phase and row["batch"] == rows[0]["batch"]]
        if not own:
            continue
        points: dict[str, list[tuple[float, float]]] = {}
        for row in own:
            points.setdefault(row["model"], []).append((int(row["repeat"]), float(row["latency_ms"])))
        series = [svg.Line(MODELS[model], found, SERIES[model], True) for model, found in points.items()]
        title = f"Latency by round, {phase}"
        drawn = svg.lines(title, f"Latency in {len(own)} measurements.", series, ("round", "ms"))
        cells = [[MODELS[row["model"]], row["repeat"], f"{float(row['latency_ms']):.3f}"] for row in own]
        yield Figure(title, "One point for each measurement.", drawn, Table(title, ["model", "round", "ms"], cells))


def _staircase(run: RunFiles) -> Iterator[Figure]:
    """Latency of an MLP by its width, where the hardware was profiled."""
    rows = run.curves.get("profile", [])
    for phase in PHASES if len(rows) > 1 else ():
        points = [(int(row["intermediate"]), float(row[f"{phase}_ms"])) for row in rows]
        title = f"An MLP's latency by width, {phase}"
        series = [svg.Line(phase, points, 1, True)]
        drawn = svg.lines(title, "Median latency at each width.", series, ("MLP units", "ms"), zero=True)
        cells = [[row["intermediate"], row[f"{phase}_ms"], row[f"{phase}_iqr_ms"]] for row in rows]
        yield Figure(title, "By profile_hardware.", drawn, Table(title, ["MLP units", "ms", "quartile range"], cells))


def _size(run: RunFiles) -> Iterator[Block]:
    compact = run.metrics["compact"]
    rows = [
        ["parameters", f"{compact['params_dense']:,.0f}", f"{compact['params_kept']:,.0f}"],
        ["bytes of the weights", megabytes(compact["bytes_dense"]), megabytes(compact["bytes_compact"])],
    ]
    yield Table("Size", ["", "dense", "pruned"], rows)
    files = [[name, megabytes(size)] for name, size in run.file_bytes.items()]
    if files:
        bars = [
            svg.Bar(name, size / 1e6, f"{size / 1e6:,.0f}", min(n, 3))
            for n, (name, size) in enumerate(run.file_bytes.items())
        ]
        described = "; ".join(f"{name}: {size}" for name, size in files)
        drawn = svg.bars("Size of the files of weights", described, bars, "MB")
        table = Table("Files of weights", ["model", "size"], files)
        yield Figure("Files of weights", "As stored on disk; 1 MB is a million bytes.", drawn, table)


def _quantised(run: RunFiles) -> Iterator[Block]:
    """Every model in every type, where files were quantised."""
    rows, points = [], []
    for model in [name for name in MODELS if name in run.metrics["quantized"]]:
        for kind, found in run.metrics["quantized"][model].items():
            ratios = [found.get(f"{part}_ratio") for part in ("validation", "test")]
            rates = [found.get(phase, {}).get("tokens_per_s") for phase in PHASES]
            cells = [f"{ratio:.3f}" if ratio else "" for ratio in ratios]
            rate_cells = [f"{rate:,.1f}" if rate else "" for rate in rates]
            name = f"{MODELS[model]}, {kind}"
            rows.append([name, megabytes(found["bytes"]), *cells, f"{found['mean_kl']:.4f}", *rate_cells])
            if shown := ratios[1] or ratios[0]:
                points.append(svg.Point(found["bytes"] / 1e6, shown, kind, SERIES[model]))
    if not rows:
        return
    head = ["model and type", "size", "validation × dense", "test × dense", "mean KL, nats"]
    table = Table("Quantised models, and the models as stored", [*head, *(f"{p}, tokens/s" for p in PHASES)], rows)
    yield "Models as stored and those of torchao (int8_wo) are timed in transformers, GGUF files in llama.cpp."
    yield table
    title, names = "Perplexity by size", list(MODELS.values())
    described = "; ".join(f"{row[0]}: {row[1]}, {row[3] or row[2]} × dense" for row in rows)
    if points:
        front = svg.pareto([(point.x, point.y) for point in points])
        drawn = svg.scatter(title, described, points, front, names, ("MB", "× dense"))
        note = "Lower and further left is better. The dashed line joins the files that no other beats in both."
        yield Figure(title, note, drawn, table)


def _samples(prompts: Sequence[str], texts: dict[str, list[str]]) -> Iterator[Block]:
    if not prompts or not texts:
        return
    yield "What each model adds, by greedy decoding. These are examples, not a measurement."
    for n, prompt in enumerate(prompts):
        yield Samples(prompt, {MODELS.get(model, model): found[n] for model, found in texts.items()})


def _training(run: RunFiles) -> Iterator[Block]:
    masks = _column(run, "mask_training", "sparsity"), _column(run, "mask_training", "target")
    losses = _column(run, "mask_training", "loss")
    if len(masks[0]) > 1:
        for_latency = "target_latency" in run.metrics.get("masks", {})
        series = [svg.Line("latency to remove" if for_latency else "target", masks[1], 0)] if masks[1] else []
        series.append(svg.Line("sparsity", masks[0], 2))
        drawn = svg.lines("Sparsity by step", "Removed share of the decoder.", series, ("step", ""), zero=True)
        table = _curve_table("Sparsity by step", series)
        yield Figure("Sparsity while masks are learned", "Share of the decoder's parameters.", drawn, table)
    for name, points, caption in (
        ("mask_training", losses, "Loss while masks are learned"),
        ("finetune", _column(run, "finetune", "loss"), "Loss while fine-tuning"),
    ):
        if len(points) > SMOOTHED:
            series = [svg.Line("loss", points, 0, thin=True), svg.Line("running mean", _smoothed(points), 1)]
            validation = _column(run, name, "validation_ce")
            if validation:
                series.append(svg.Line("validation", validation, 2, True))
            drawn = svg.lines(caption, f"Loss over {len(points)} steps.", series, ("step", ""))
            note = f"One batch a step, and the mean of {SMOOTHED} steps"
            note += "; validation: cross-entropy alone." if validation else "."
            yield Figure(caption, note, drawn, _curve_table(caption, series))


def _column(run: RunFiles, curve: str, name: str) -> list[tuple[float, float]]:
    """The points (step, value) of a curve that has them."""
    return [(float(row["step"]), float(row[name])) for row in run.curves.get(curve, []) if row.get(name)]


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The mean of the last SMOOTHED values, from the step where there are as many."""
    windows = [points[n - SMOOTHED : n] for n in range(SMOOTHED, len(points) + 1)]
    return [(window[-1][0], sum(value for _, value in window) / SMOOTHED) for window in windows]


def _curve_table(caption: str, series: Sequence[svg.Line]) -> Table:
    """Every value of up to forty steps, spread evenly."""
    steps = sorted({step for each in series for step, _ in each.points})
    shown = steps[:: max(1, len(steps) // 40)]
    values = [dict(each.points) for each in series]
    rows = [[f"{step:g}", *(f"{v[step]:.4f}" if step in v else "" for v in values)] for step in shown]
    return Table(caption, ["step", *(each.name for each in series)], rows)


def _cost(run: RunFiles) -> Iterator[Block]:
    metrics, rows = run.metrics, []
    for stage, name in (("learn_masks", "masks"), ("compact", "compact"), ("finetune_lora", "finetune")):
        found = metrics[name]
        if "seconds" in found:
            memory = found.get("proof_peak_memory_bytes", found.get("peak_memory_bytes"))
            rows.append((stage, found["seconds"], megabytes(memory) if memory else "not measured"))
    if not rows:
        return
    table = Table(
        "Cost of the stages that change the model",
        ["stage", "time", "peak memory"],
        [[stage, duration(seconds), memory] for stage, seconds, memory in rows],
    )
    yield table
    bars = [svg.Bar(stage, seconds, duration(seconds), 1) for stage, seconds, _ in rows]
    described = "; ".join(f"{row[0]}: {row[1]}" for row in table.rows)
    yield Figure("Time by stage", "", svg.bars("Time by stage", described, bars, "seconds"), table)


def _provenance(run: RunFiles) -> Iterator[Block]:
    source = [[key, str(value)] for key, value in run.source.items() if not isinstance(value, dict | list)]
    if source:
        yield Table("The dense model", ["key", "value"], source)
    checks = [_check(name, check) for name, check in run.certificate.get("checks", {}).items()]
    if checks:
        yield Table("Checks of the pruned model", ["check", "result", "figures"], checks)
    if versions := run.certificate.get("versions"):
        yield Table("Versions", ["package", "version"], [[name, str(version)] for name, version in versions.items()])
    rows = [[key, value] for section, content in _made_with(run).items() for key, value in _flat(section, content)]
    if rows:
        yield Table("Parameters used", ["parameter", "value"], rows)


def _check(name: str, check: dict[str, Any]) -> list[str]:
    """A row: of a check that was not run, the reason in place of figures."""
    result = {True: "passed", False: "FAILED", None: "not run"}[check["passed"]]
    figures = (
        f"{key} {value:g}" if isinstance(value, int | float) else value for key, value in check["figures"].items()
    )
    return [name, result, ", ".join(figures)]


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _flat(f"{name}.{key}", each)
    else:
        yield name, value if isinstance(value, str) else json.dumps(value)
