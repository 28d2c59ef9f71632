"""What is checked of a Hugging Face model directory before any of it is loaded, and none of its code has run."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from tvaprune.architecture.topology import FAMILIES, HEAD, ROTARY_FREQUENCIES
from tvaprune.checkpoint.tensor_files import Checkpoint
from tvaprune.inputs.sources import InputError

_SIZES = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "max_position_embeddings"),
)


def check_config(directory: Path, trust_remote_code: bool) -> None:
    """Check config.json, and that loading runs no code and reads no other model.

    Raises InputError, which names the file and the key: it is absent or damaged, a size is no whole number above 0,
    heads do not divide, or the weights are quantised; the directory has code of its own and `trust_remote_code` is
    false; or it holds an adapter.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise InputError(f"{directory}: no config.json; a Hugging Face model directory is expected")
    config = _mapping(path)
    if not isinstance(config.get("model_type"), str):
        raise InputError(f"{path}: names no model_type; supported are {', '.join(FAMILIES)}")
    if (directory / "adapter_config.json").exists():
        raise InputError(
            f"{directory / 'adapter_config.json'}: an adapter, which loads another model; merge it into its model first"
        )
    settings = [path, *(each for each in [directory / "tokenizer_config.json"] if each.is_file())]
    for each in settings:
        if _mapping(each).get("auto_map") and not trust_remote_code:
            raise InputError(
                f"{each}: auto_map names Python code of the repository's own, which could do anything here; it was not "
                "run. Read it, then set fetch_inputs.model.trust_remote_code: true, or remove auto_map"
            )
    if config["model_type"] in FAMILIES:
        _check_sizes(path, config)
    if quantised := config.get("quantization_config"):
        kind = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise InputError(f"{path}: weights are quantised ({kind}); use the model in float32, float16 or bfloat16")


def _mapping(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged: {error}; fetch it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not settings by name; fetch it again")
    return content


def _check_sizes(path: Path, config: dict[str, Any]) -> None:
    for name in _SIZES:
        size = config.get(name)
        if size is not None and (type(size) is not int or size < 1):
            raise InputError(f"{path}: {name} = {size!r}: must be a whole number above 0")
    heads, kv_heads, hidden = (config.get(key) for key in ("num_attention_heads", "num_key_value_heads", "hidden_size"))
    if heads and kv_heads and heads % kv_heads:
        raise InputError(f"{path}: num_key_value_heads = {kv_heads} does not divide num_attention_heads = {heads}")
    if heads and hidden and not config.get("head_dim") and hidden % heads:
        raise InputError(f"{path}: num_attention_heads = {heads} does not divide hidden_size = {hidden}")


def check_weights(directory: Path, config: PreTrainedConfig) -> None:
    """Check the safetensors files' headers against the config; no weight is read.

    transformers would fill a missing tensor with random numbers, and leave out one too many.

    Raises InputError: there are no safetensors (pickled weights are not read), a shard is absent or damaged, a tensor
    is missing, superfluous, of another shape, or no floating-point number.
    """
    try:
        found = {name: info.shape for name, info in Checkpoint.of(directory).info.items()}
    except ValueError as error:
        raise InputError(str(error)) from error
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    optional = {HEAD} if config.tie_word_embeddings else set()
    where = f"{directory}: the weights are not those of config.json"
    for name in sorted(expected.keys() | found.keys()):
        if name not in found and name not in optional:
            raise InputError(f"{where}: {name} is missing; fetch the model again")
        if name not in expected and not name.endswith(ROTARY_FREQUENCIES):
            raise InputError(f"{where}: {name} is in no {config.model_type} of these sizes; check config.json")
        if name in expected and name in found and found[name] != expected[name]:
            raise InputError(f"{where}: {name} is {list(found[name])}, expected {list(expected[name])}")
