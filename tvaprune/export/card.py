"""What a checkpoint says of itself: the model card README.md, and tvaprune.json for programs."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError
from transformers import PreTrainedConfig

import tvaprune
from tvaprune.artifacts import SOURCE_FILE, write_json
from tvaprune.checkpoint.loading import load_config
from tvaprune.masks.adapt import Layout
from tvaprune.masks.masks import Masks
from tvaprune.proof.certificate import GGUF, Check, hashes

PROVENANCE = "tvaprune.json"


@dataclass(frozen=True)
class Base:
    """The dense model.

    Attributes:
        source: where it was fetched from (tvaprune_source.json), {} where nothing says so.
        license: of the Hub's identifiers, lower case; None where nothing says so.
        sha256: by weight file.
    """

    source: dict[str, Any]
    license: str | None
    sha256: dict[str, str]

    @classmethod
    def of(cls, dense: Path) -> "Base":
        """Read a dense model's directory; its weights are read once more, to be hashed."""
        path = dense / SOURCE_FILE
        source = json.loads(path.read_text()) if path.is_file() else {}
        license = source.get("license") or _card_license(dense)
        weights = {name: digest for name, digest in hashes(dense).items() if name.endswith(".safetensors")}
        return cls(source, license.lower() if license else None, weights)

    @property
    def name(self) -> str | None:
        """The Hub's name of the base model, or None where it did not come from there."""
        return self.source.get("repo")


def _card_license(directory: Path) -> str | None:
    path = directory / "README.md"
    if not path.is_file():
        return None
    try:
        return ModelCard.load(path).data.license
    except (ValueError, HfHubHTTPError):
        return None


@dataclass(frozen=True)
class Provenance:
    """What a pruned model was made of, how, and what came out: the content of tvaprune.json.

    Attributes:
        base: the dense model.
        layout: of the checkpoint.
        widths: kept units: of hidden, and a list by layer of intermediate and of kv_heads; padding not counted.
        made_with: the parameters that had influence, by stage.
        figures: sparsity_decoder (by the masks), sparsity_model, params_dense, params_kept (by the files: padding
            counts); perplexities and nats a token, see `_quality`, where they were measured.
    """

    base: Base
    layout: Layout
    widths: dict[str, Any]
    made_with: dict[str, Any]
    figures: dict[str, float]

    def write(self, directory: Path) -> None:
        write_json(directory / PROVENANCE, {"schema": 1, "tvaprune": tvaprune.__version__, **asdict(self)})

    @classmethod
    def read(cls, directory: Path) -> "Provenance":
        found = json.loads((directory / PROVENANCE).read_text())
        base = Base(**found["base"])
        return cls(base, found["layout"], found["widths"], found["made_with"], found["figures"])


def widths_of(masks: Masks) -> dict[str, Any]:
    """Kept units by axis, as numbers."""
    return {axis: counts.tolist() for axis, counts in masks.widths().items()}


def write_card(directory: Path, made: Provenance, checks: list[Check]) -> None:
    """Write README.md with the Hub's YAML header.

    Args:
        directory: config.json says whether it brings its own modeling file.
        checks: of the certificate.
    """
    base, figures = made.base, made.figures
    data = ModelCardData(
        base_model=base.name,
        license=base.license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["tvaprune", "pruned", "structured-pruning"],
    )
    tuned = "finetune_lora" in made.made_with
    sections = [
        f"# {_title(base)}, pruned{' and fine-tuned' if tuned else ''}",
        "Made smaller by structured pruning with TVA-Prune (Dutta, Gupta, Agarwal, "
        "[ES-FoMo II at ICML 2024](https://openreview.net/forum?id=cqhAzteLzc)).",
        f"{figures['params_kept'] / 1e6:.1f} M of {figures['params_dense'] / 1e6:.1f} M parameters: "
        f"{figures['sparsity_decoder']:.1%} of the decoder layers' are gone, "
        f"{figures['sparsity_model']:.1%} of the model's." + _padding(made) + _quality(figures),
        "## Use\n\n" + _usage(directory, load_config(directory)),
        "## Kept widths\n\n" + _widths(made.widths),
        "## Parity\n\nIn float32, on named prompts, with the bounds that decide (`parity.json`); repeat it with "
        "`python -m tvaprune.verify DIRECTORY`.\n\n" + "\n".join(f"- {check}" for check in checks),
        "## Made with\n\n```json\n" + json.dumps(made.made_with, indent=2) + "\n```",
    ]
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n").save(directory / "README.md")


def _padding(made: Provenance) -> str:
    if made.layout != "padded":
        return ""
    return " Layers are padded with zeros to the widest, and the zeros count as parameters of the model."


def _quality(figures: dict[str, float]) -> str:
    text = ""
    if "validation_ppl_dense" in figures:
        text = (
            " Perplexity on held-out windows of the calibration's sources, before widths were adapted: "
            f"{figures['validation_ppl_mean']:.1f}, dense {figures['validation_ppl_dense']:.1f}."
        )
    if "finetuned_nll_best" in figures:
        text += (
            " Nats a token on held-out windows of the fine-tuning's sources: "
            f"{figures['finetuned_nll_best']:.3f}, {figures['finetuned_nll_start']:.3f} before fine-tuning, "
            f"dense {figures['finetuned_nll_teacher']:.3f}."
        )
    return text


def _title(base: Base) -> str:
    return base.source.get("repo") or Path(str(base.source.get("member") or base.source.get("name") or "A model")).stem


def _usage(directory: Path, config: PreTrainedConfig) -> str:
    own = config.model_type == "tvaprune"
    # The tokenizer's load reads config.json too: without trust_remote_code it asks on the terminal whether to run code.
    arguments = '".", trust_remote_code=True' if own else '"."'
    text = (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({arguments})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({arguments})\n"
        'print(tokenizer.decode(model.generate(**tokenizer("The river", return_tensors="pt"), max_new_tokens=20)[0]))\n'
        "```"
    )
    if own:
        text += '\n\nOr, without remote code: `from tvaprune import load; model = load(".")`.'
    else:
        text += f"\n\nA stock `{config.model_type}` model: no remote code."
    if (directory / GGUF).is_file():
        text += f"\n\nIn llama.cpp: `llama-cli -m {GGUF}`."
    return text


def _widths(widths: dict[str, Any]) -> str:
    """A table of the hidden width and each layer's; runs of equal layers share a row."""
    layers = list(zip(widths["kv_heads"], widths["intermediate"], strict=True))
    rows, start = [], 0
    for index in range(1, len(layers) + 1):
        if index == len(layers) or layers[index] != layers[start]:
            name = str(start) if index == start + 1 else f"{start} to {index - 1}"
            rows.append(f"| {name} | {layers[start][0]} | {layers[start][1]} |")
            start = index
    head = "| layer | key-value heads | intermediate |\n|---|---|---|\n"
    return f"Hidden {widths['hidden']}.\n\n{head}" + "\n".join(rows)
