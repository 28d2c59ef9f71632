"""Write the report of the run: one HTML page that needs no network, and the same as Markdown."""

from pathlib import Path
from typing import Annotated

from transformers import AutoTokenizer
from typer import Option, echo

from stages._command import command
from stages._options import Compact, Finetuned, Model, ParamsFile
from tvaprune.architecture.topology import Topology
from tvaprune.checkpoint.config import load_config
from tvaprune.device import pick_device, pick_dtype
from tvaprune.masks.masks import read_masks
from tvaprune.measures.comparison import present_models
from tvaprune.params.report import ReportParams
from tvaprune.report.generation import continuations
from tvaprune.report.page import html, markdown
from tvaprune.report.run import read_run
from tvaprune.report.sections import report_of


@command
def main(
    dense: Model = Path("data/model"),
    compact: Compact = Path("artifacts/compact"),
    finetuned: Finetuned = Path("artifacts/finetuned"),
    adapted: Annotated[Path, Option(help="The masks that the model was cut by.")] = Path("artifacts/adapted"),
    metrics: Annotated[Path, Option(help="Directory of the metrics and curves.")] = Path("metrics"),
    out: Annotated[Path, Option(help="Directory to write index.html and report.md to.")] = Path("artifacts/report"),
    params_file: ParamsFile = Path("params.yaml"),
) -> None:
    """Reads the metrics and curves in metrics/, artifacts/adapted, the three model directories and params.yaml
    (report); writes artifacts/report. Loads the models only to continue `prompts`.
    """
    params = ReportParams.load(params_file)
    models = present_models(dense, compact, finetuned)
    topology = Topology.of(load_config(dense))
    run = read_run(metrics, models, read_masks(adapted, topology), topology)
    device = pick_device()
    tokenizer = AutoTokenizer.from_pretrained(dense)
    texts = continuations(models, tokenizer, params.prompts, params.tokens, pick_dtype(device), device)
    report = report_of(run, params.prompts, texts)
    out.mkdir(parents=True, exist_ok=True)
    for name, content in (("index.html", html(report)), ("report.md", markdown(report))):
        (out / name).write_text(content, encoding="utf-8")
    echo(f"report: {out / 'index.html'}, opens in any browser")
