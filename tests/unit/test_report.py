"""The report holds the figures of the files, the same bytes for the same files, and opens in a browser."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.tiny_models import save_tiny_model, tiny_model, tiny_tokenizer
from tools import report as tool
from tools.saved_runs import Run
from tvaprune.architecture.topology import Topology
from tvaprune.checkpoint.loading import load
from tvaprune.conversation import Speaker
from tvaprune.masks.masks import Masks
from tvaprune.options.axes import AXES, Axis
from tvaprune.report import svg
from tvaprune.report.generation import continuations
from tvaprune.report.page import Report, html, markdown
from tvaprune.report.run import CURVES, METRICS, RunFiles, Widths, read_csv, read_json, read_run
from tvaprune.report.sections import report_of

REPOSITORY = Path(__file__).resolve().parents[2]
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
HOSTILE = "</p><script>document.title = 'executed'</script><img src=x onerror=\"document.title = 'executed'\"> a|b"
CPU_NUMBERS = ("threads", "processors", "read_bytes_per_s")
PROMPTS = ("The river", "def f(n):")
TEXTS = {"dense": [" flows", " return n"], "compact": [HOSTILE, " return"], "finetuned": [" runs", ""]}
QUANTISED = {"bytes": 2.5e6, "mean_kl": 0.0125, "test_ratio": 1.0625, "decode": {"tokens_per_s": 61.5}}
WIDTHS: dict[Axis, Widths] = {
    "hidden": Widths([576], 576, [1.0]),
    "intermediate": Widths([1536, 64], 1536, [1.0, 0.25]),
    "kv_heads": Widths([3, 0], 3, [1.0, 0.0]),
}


def complete() -> RunFiles:
    """The default run's metrics, which are in git, with small widths."""
    folder = REPOSITORY / "metrics"
    kinds = {"stored": {"bytes": 5e6, "mean_kl": 0.0, "test_ratio": 1.0}, "q8_0": QUANTISED}
    return RunFiles(
        {**{name: read_json(folder / f"{name}.json") for name in METRICS}, "quantized": {"enabled": 1, "dense": kinds}},
        {name: read_csv(folder / f"{name}.csv") for name in CURVES},
        WIDTHS,
        source={"source": "hub", "repo": "someone/some-model", "revision": "0123abc"},
        made={"made_with": {"learn_masks": {"method": "tva", "seed": 7}}},
        certificate={"versions": {"torch": "9.9"}, "checks": {"a = b": {"passed": True, "figures": {"kl": 0.5}}}},
        file_bytes={"dense": 3_000_000, "pruned, GGUF": 1_000_000},
    )


def minimal() -> RunFiles:
    """Without fine-tuning, speed, curves, provenance and text."""
    run = complete()
    perplexity, zeroshot = ({**run.metrics[name]} for name in ("perplexity", "zeroshot"))
    del perplexity["finetuned"], zeroshot["finetuned"]
    metrics = {
        **run.metrics,
        "perplexity": perplexity,
        "zeroshot": zeroshot,
        "finetune": {"enabled": 0},
        "speed": {},
        "quantized": {},
    }
    return RunFiles(metrics, {name: [] for name in CURVES}, WIDTHS)


@pytest.fixture(scope="module")
def whole() -> Report:
    return report_of(complete(), PROMPTS, TEXTS)


def test_a_run_on_a_gpu_and_a_check_that_was_not_run_have_a_report() -> None:
    """Its numbers of the machine are others than those of a CPU (`measures.machine`)."""
    run = complete()
    speed = {key: value for key, value in run.metrics["speed"].items() if key not in CPU_NUMBERS} | {"clock_mhz": 1980}
    skipped = {"passed": None, "figures": {"skipped": "xllamacpp is not installed (pip install xllamacpp)"}}
    certificate = {"versions": {}, "checks": {"llama.cpp from model.gguf": skipped}}
    page = words(
        html(report_of(replace(run, metrics={**run.metrics, "speed": speed}, certificate=certificate), (), {}))
    )
    assert "llama.cpp from model.gguf not run xllamacpp is not installed" in page
    assert " threads," not in page


def words(page: str) -> str:
    """The page's text without its figures."""
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", re.sub(r"<(svg|style).*?</\1>", "", page, flags=re.S))).split())


def test_the_page_and_the_table_hold_the_figures_of_the_files(whole: Report) -> None:
    metrics = complete().metrics
    page, table = words(html(whole)), markdown(whole)
    for model in ("dense", "compact", "finetuned"):
        for text, found in metrics["perplexity"][model]["test"].items():
            shown = f"{found['ppl']:.2f} ± {found['ppl_stderr']:.2f}"
            assert shown in page, (model, text)
            assert shown in table, (model, text)
        assert f"{metrics['zeroshot'][model]['piqa']['acc']:.3f} ± " in page
        assert f"{metrics['speed']['decode'][model]['latency_ms']:.2f} ± " in page
    for phase in ("prefill", "decode"):
        speedup, limit = metrics["speed"][phase]["speedup"], metrics["speed"][phase]["limit"]
        assert f"{phase} {speedup:.3f} × {limit:.3f} ×" in page
    for expected in (
        "1,600 of 3,072", "64 to 1536 of 1536", "62.50%",  # MLP units, and the mean of their kept importance
        f"{metrics['masks']['seconds'] / 60:,.1f} min", f"{metrics['masks']['peak_memory_bytes'] / 1e6:,.1f} MB",
        "someone/some-model", "0123abc", "learn_masks.seed 7", "torch 9.9", "a = b passed kl 0.5", "3.0 MB",
        "dense, q8_0 2.5 MB 1.062 0.0125 61.5",
    ):  # fmt: skip
        assert expected in page, expected


def test_figures_have_names_descriptions_and_their_numbers(whole: Report) -> None:
    page = html(whole)
    drawn = re.findall(r"<figure>.*?</figure>", page, re.S)
    assert len(drawn) >= 10
    for figure in drawn:
        assert re.search(r'<svg [^>]*role="img" aria-label="[^"]+"', figure)
        assert re.search(r"<title>[^<]+</title><desc>[^<]+</desc>", figure)
        assert re.search(r"<details>.*<caption>.*<td", figure, re.S)
    assert page.count("<svg") == len(drawn)
    assert re.findall(r"(?:src|href)=\"(?!#|data:)", page) == []
    assert len(page) < 1_000_000


def test_a_run_without_the_stages_that_may_be_off_has_a_report() -> None:
    page = html(report_of(minimal(), (), {}))
    assert "pruned × dense" in page
    assert "LoRA" not in page
    for left_out in ("Latency", "Quantised", "Generated text", "Training", "Versions"):
        assert left_out not in page
    assert "What was pruned" in page


def test_equal_files_make_equal_bytes(whole: Report) -> None:
    again = report_of(complete(), PROMPTS, TEXTS)
    assert html(again) == html(whole)
    assert markdown(again) == markdown(whole)
    assert str(REPOSITORY) not in html(whole)


def test_generated_text_is_text(whole: Report) -> None:
    page, table = html(whole), markdown(whole)
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;" in page
    assert "<script" not in table
    assert r"a\|b" in table


def test_each_token_is_the_likeliest_whatever_the_checkpoint_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tokenizer may also return token_type_ids, which the models do not take."""
    monkeypatch.setenv("TVAPRUNE_DTYPE", "float32")
    monkeypatch.setenv("TVAPRUNE_DEVICE", "cpu")
    tiny_tokenizer(save_tiny_model("llama", tmp_path))
    settings = {"repetition_penalty": 4.0, "no_repeat_ngram_size": 1, "num_beams": 3}
    settings |= {"suppress_tokens": list(range(0, 100, 2)), "min_new_tokens": 3}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.save_pretrained(tmp_path)
    assert "token_type_ids" in tokenizer("The bank")
    model, ids = load(tmp_path), tokenizer("The bank", return_tensors="pt").input_ids
    length = ids.shape[1]
    for _ in range(40):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    likeliest = tokenizer.decode(ids[0, length:], skip_special_tokens=True)
    shown = continuations({"dense": tmp_path}, tokenizer, ["The bank"], 40, torch.float32, torch.device("cpu"))
    assert shown == {"dense": [likeliest]}
    assert Speaker(tmp_path, new_tokens=40, temperature=0).go_on("The bank") == likeliest


def test_a_conversation_leaves_out_its_oldest_lines_where_the_context_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TVAPRUNE_DEVICE", "cpu")
    tiny_tokenizer(save_tiny_model("llama", tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    context = load(tmp_path).config.max_position_embeddings
    line = "the bank of the river and "
    tokens = len(tokenizer(line)["input_ids"])
    seen: list[int] = []

    def watched(model: Any, tokenizer: Any, prompt: Any, new_tokens: int, *rest: Any) -> str:
        seen.append(prompt["input_ids"].shape[1])
        return line

    speaker = Speaker(tmp_path, new_tokens=8, temperature=0)
    monkeypatch.setattr("tvaprune.conversation.continuation", watched)
    speaker.converse([line] * (context // tokens))
    assert seen[0] < seen[1] < context
    assert max(seen) + 8 <= context < max(seen) + 8 + 4 * tokens
    monkeypatch.undo()
    monkeypatch.setenv("TVAPRUNE_DEVICE", "cpu")
    with pytest.raises(ValueError, match=rf"the prompt has \d+ tokens, and the model's context {context}; shorten the"):
        speaker.go_on(line * context)


def test_widths_and_kept_importance_are_those_of_the_masks(tmp_path: Path) -> None:
    topology = Topology.of(tiny_model("llama").config)
    masks = Masks.dense(topology)
    keep = {axis: masks.keep[axis].clone() for axis in AXES}
    keep["intermediate"][1, 1:] = False
    masks.score["intermediate"][1, 0] = 1 + torch.log(torch.tensor(3.0))
    for name in ("dense", "compact"):
        (tmp_path / name).mkdir()
    models = {name: tmp_path / name for name in ("dense", "compact")}
    found = read_run(tmp_path, models, replace(masks, keep=keep), topology).widths["intermediate"]
    full = topology.width("intermediate")
    assert (found.kept[:2], found.full) == ([full, 1], full)
    assert found.importance[:2] == pytest.approx([1.0, 3 / (3 + full - 1)])


@pytest.mark.parametrize(("low", "high", "log"), [(0, 1, False), (3.9, 40, True), (0.98, 1, False), (900, 1e6, True)])
def test_ticks_are_few_and_within_their_scale(low: float, high: float, log: bool) -> None:
    ticks = svg.Scale(low, high, 0, 100, log).ticks()
    assert 2 <= len(ticks) <= 8
    assert all(low <= tick <= high for tick in ticks)


def saved(
    method: str, sparsity: float, compact: float, finetuned: float | None, speedup: float | None
) -> dict[str, Any]:
    perplexity = {"dense": {}, "compact": {"test_ratio": compact}}
    perplexity |= {"finetuned": {"test_ratio": finetuned}} if finetuned else {}
    metrics: dict[str, Any] = {"perplexity": perplexity}
    if speedup:
        metrics["speed"] = {phase: {"speedup": speedup} for phase in ("prefill", "decode")}
    return {"params": {"sparsity": sparsity, "learn_masks": {"method": method}}, "metrics": metrics}


def test_runs_are_compared_by_their_own_figures() -> None:
    runs = {
        "b": saved("flap", 0.5, 9.0, None, 1.5),
        "a": saved("tva", 0.2, 1.6, 1.25, 1.25),
        "c": saved("tva", 0.5, 4.0, None, None),
    }
    runs["d"] = {"params": {}, "metrics": {}}
    found = tool.compared(runs)
    assert [(run.name, run.ratio, run.finetuned) for run in found] == [
        ("a", 1.25, True),
        ("b", 9.0, False),
        ("c", 4.0, False),
    ]
    assert found[0].latency["decode"] == pytest.approx(0.8)
    page = words(html(tool.comparison(found)))
    assert "1 a tva 0.2 yes 1.250 0.800 0.800" in page
    assert "3 c tva 0.5 no 4.000" in page


def test_the_front_holds_those_that_nothing_beats() -> None:
    assert svg.pareto([(3.0, 10.0), (1.0, 30.0), (2.0, 40.0), (2.5, 20.0), (4.0, 10.0)]) == [
        (1.0, 30.0),
        (2.5, 20.0),
        (3.0, 10.0),
    ]


def test_the_pictures_in_git_are_those_of_the_metrics_in_git() -> None:
    drawn = tool.pictures(REPOSITORY / "metrics")
    assert set(drawn) == set(tool.PICTURES.values())
    for name, content in drawn.items():
        path = REPOSITORY / "docs" / "pictures" / f"{name}.svg"
        assert path.read_text() == content, "run python -m tools.report --pictures docs/pictures"


MEASURE = """<script>addEventListener('load', () => {
  const box = (e) => { const r = e.getBoundingClientRect(); return [r.width, r.height, r.right] };
  parent.document.documentElement.dataset.measured = JSON.stringify({
    title: document.title, inner: innerWidth,
    client: document.documentElement.clientWidth, scroll: document.documentElement.scrollWidth,
    figures: [...document.querySelectorAll('figure svg')].map((e) => [...box(e), e.getAttribute('aria-label')]),
    errors: window.failed || []})})</script>"""
WATCH = "<script>window.failed = []; addEventListener('error', (e) => failed.push(String(e.message)), true)</script>"


def browse(page: Path) -> tuple[str, str]:
    """The page's DOM after it has loaded from file://, no name resolving, and what the browser logged of it."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    options += [f"--user-data-dir={page.parent / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command = [CHROMIUM, *options, "--window-size=1400,900", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed (Debian: apt install chromium)")
@pytest.mark.parametrize("width", [360, 1280])
def test_it_opens_in_a_browser(tmp_path: Path, whole: Report, width: int) -> None:
    """As written, the console stays empty. Measured in a copy without the policy that forbids scripts: a script in the
    generated text would run there.
    """
    page, copy = tmp_path / "index.html", tmp_path / "copy.html"
    page.write_text(html(whole), encoding="utf-8")
    assert browse(page)[1] == ""
    without = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', WATCH, html(whole))
    opened = without.replace("</body>", f"{MEASURE}</body>").replace("<details>", "<details open>")
    # In a frame, because Chromium makes no window narrower than 500 pixels.
    frame = f'<iframe width="{width}" height="900" style="border:0" srcdoc="{escape(opened)}"></iframe>'
    copy.write_text(f"<!doctype html><meta charset=utf-8>{frame}", encoding="utf-8")
    shown, console = browse(copy)
    assert console == ""
    (found,) = re.findall(r'data-measured="([^"]*)"', shown)
    measured = json.loads(unescape(found))
    assert measured["inner"] == width
    assert measured["scroll"] <= measured["client"]
    assert measured["errors"] == []
    assert measured["title"] == whole.title
    assert len(measured["figures"]) == html(whole).count("<figure>")
    for wide, high, right, name in measured["figures"]:
        assert wide > 250, name
        assert high > 60, name
        assert right <= width, name
        assert name


def test_a_figure_of_its_own_follows_light_and_dark() -> None:
    alone = svg.standalone(svg.bars("T", "D", [svg.Bar("a", 1.0, "1")], "x"))
    assert "prefers-color-scheme:dark" in alone
    assert alone.index("<style>") < alone.index("<title>T</title>")


def test_experiments_of_one_name_are_told_apart_by_their_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    """DVC's names are unique among the experiments of one commit alone."""
    refs = [f"refs/exps/{number * 2}/{number * 38}/{name}" for number, name in (("1", "a"), ("2", "a"), ("1", "b"))]
    runs = {ref: Run(lambda _: None, "".join(ref.split("/")[2:4]), dirty=False) for ref in refs}
    monkeypatch.setattr(tool, "experiment_refs", lambda: refs)
    monkeypatch.setattr(Run, "of_ref", runs.__getitem__)
    assert set(tool.experiments()) == {"workspace", "a (1111111)", "a (2222222)", "b"}
