"""The files that describe a checkpoint: the model card README.md, and tvaprune.json for programs."""

import json
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

import tvaprune
from tvaprune.artifacts import SOURCE_FILE, write_json
from tvaprune.checkpoint.config import PRUNED, load_config
from tvaprune.options.choices import Layout
from tvaprune.proof.certificate import GGUF, Check, hashes

PROVENANCE = "tvaprune.json"


@dataclass(frozen=True)
class Base:
    """The dense model."""

    source: dict[str, Any]  # where it was fetched from (tvaprune_source.json); {} where unknown
    license: str | None  # the Hub's identifier, lower case; None where unknown
    sha256: dict[str, str]  # by weight file

    @classmethod
    def of(cls, dense: Path) -> "Base":
        """Read a dense model's directory, and hash its weights."""
        path = dense / SOURCE_FILE
        source = json.loads(path.read_text()) if path.is_file() else {}
        license = source.get("license")
        weights = {name: digest for name, digest in hashes(dense).items() if name.endswith(".safetensors")}
        return cls(source, license.lower() if license else None, weights)


@dataclass(frozen=True)
class Provenance:
    """The content of tvaprune.json."""

    base: Base
    layout: Layout
    widths: dict[str, Any]  # kept units without padding: of hidden, and lists by layer of intermediate and of kv_heads
    made_with: dict[str, Any]  # the parameters that had influence, by stage
    # sparsity_decoder (by the masks), sparsity_model, params_dense, params_kept (by the files, padding included);
    # perplexities and losses, see `_quality`, where they were measured.
    figures: dict[str, float]

    def write(self, directory: Path) -> None:
        write_json(directory / PROVENANCE, {"schema": 1, "tvaprune": tvaprune.__version__, **asdict(self)})

    @classmethod
    def read(cls, directory: Path) -> "Provenance":
        found = json.loads((directory / PROVENANCE).read_text())
        return cls(Base(**found["base"]), *(found[name] for name in ("layout", "widths", "made_with", "figures")))


def write_card(directory: Path, made: Provenance, checks: list[Check]) -> None:
    """Write README.md with the Hub's YAML header, beside config.json, and model.gguf if there is one."""
    source, figures = made.base.source, made.figures
    data = ModelCardData(
        base_model=source.get("repo"),
        license=made.base.license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["tvaprune", "pruned", "structured-pruning"],
    )
    title = source.get("repo") or Path(str(source.get("member") or source.get("name") or "A model")).stem
    tuned = " and fine-tuned" if "finetune_lora" in made.made_with else ""
    padding = " Layers are padded with zeros to the widest; the zeros count as parameters of the model."
    sections = [
        f"# {title}, pruned{tuned}",
        "Made smaller by structured pruning with TVA-Prune (Dutta, Gupta, Agarwal, "
        "[ES-FoMo II at ICML 2024](https://openreview.net/forum?id=cqhAzteLzc)).",
        f"{figures['params_kept'] / 1e6:.1f} M of {figures['params_dense'] / 1e6:.1f} M parameters. Pruning removed "
        f"{figures['sparsity_decoder']:.1%} of the decoder layers' parameters, {figures['sparsity_model']:.1%} of the "
        "model's." + (padding if made.layout == "padded" else "") + _quality(figures),
        "## Use\n\n" + _usage(directory),
        "## Kept widths\n\n" + _widths(made.widths),
        "## Parity\n\nThese checks were made in float32. `parity.json` has their reference, prompts and bounds. To "
        "repeat them: `python -m tvaprune verify DIRECTORY`.\n\n" + "\n".join(f"- {check}" for check in checks),
        "## Made with\n\n```json\n" + json.dumps(made.made_with, indent=2) + "\n```",
    ]
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n").save(directory / "README.md")


def _quality(figures: dict[str, float]) -> str:
    text = ""
    pruned = figures.get("validation_ppl_mean", figures.get("validation_ppl_binary"))
    if pruned is not None:
        text += (
            " Perplexity on held-out windows of the calibration sources, before the widths were adapted: "
            f"{pruned:.1f}, dense model {figures['validation_ppl_dense']:.1f}."
        )
    if "finetuned_nll_best" in figures:
        text += (
            " Negative log-likelihood per token on held-out windows of the fine-tuning sources, in nats: "
            f"{figures['finetuned_nll_best']:.3f}, before fine-tuning {figures['finetuned_nll_start']:.3f}, "
            f"dense model {figures['finetuned_nll_teacher']:.3f}."
        )
    return text


def _usage(directory: Path) -> str:
    model_type = load_config(directory).model_type
    own_code = model_type == PRUNED
    # The tokenizer's load reads config.json too: without trust_remote_code it asks on the terminal whether to run code.
    arguments = '".", trust_remote_code=True' if own_code else '"."'
    text = (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({arguments})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({arguments})\n"
        'print(tokenizer.decode(model.generate(**tokenizer("The river", return_tensors="pt"), max_new_tokens=20)[0]))\n'
        "```\n\n"
    )
    if own_code:
        text += 'Or, without remote code: `from tvaprune import load; model = load(".")`.'
    else:
        text += f"A stock `{model_type}` model: no remote code."
    if (directory / GGUF).is_file():
        text += f"\n\nIn llama.cpp: `llama-cli -m {GGUF}`."
    return text


def _widths(widths: dict[str, Any]) -> str:
    """The hidden width, and a table of each layer's; consecutive equal layers share a row."""
    layers = zip(widths["kv_heads"], widths["intermediate"], strict=True)
    rows = []
    for (kv_heads, intermediate), group in groupby(enumerate(layers), key=lambda numbered: numbered[1]):
        indices = [index for index, _ in group]
        name = f"{indices[0]} to {indices[-1]}" if len(indices) > 1 else f"{indices[0]}"
        rows.append(f"| {name} | {kv_heads} | {intermediate} |")
    head = "| layer | key-value heads | intermediate |\n|---|---|---|\n"
    return f"Hidden {widths['hidden']}.\n\n{head}" + "\n".join(rows)
