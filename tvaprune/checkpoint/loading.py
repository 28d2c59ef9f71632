"""Load a model directory, dense or pruned."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from tvaprune.checkpoint.modeling_tvaprune import TvaPruneConfig, TvaPruneForCausalLM, TvaPruneModel

AutoConfig.register(TvaPruneConfig.model_type, TvaPruneConfig, exist_ok=True)
AutoModel.register(TvaPruneConfig, TvaPruneModel, exist_ok=True)
AutoModelForCausalLM.register(TvaPruneConfig, TvaPruneForCausalLM, exist_ok=True)
# So that save_pretrained puts the modeling file beside the weights.
TvaPruneConfig.register_for_auto_class()
TvaPruneModel.register_for_auto_class("AutoModel")
TvaPruneForCausalLM.register_for_auto_class("AutoModelForCausalLM")


class DamagedModelError(ValueError):
    """A model directory does not load, or not wholly."""


def load(
    directory: Path | str, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> PreTrainedModel:
    """Load a stock or pruned model for inference, with this package's own classes and no remote code.

    With a dtype of None the weights stay as stored; a device of None is the CPU.

    Raises:
        FileNotFoundError: the directory holds no model.
        DamagedModelError: it does not load, or a tensor is missing, which transformers would fill with random numbers.
    """
    require_model(Path(directory))
    with _damage(Path(directory)):
        model, report = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype or "auto", use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    if missing := sorted(report["missing_keys"]):
        raise DamagedModelError(f"{directory}: {missing[0]} is not in its files; run dvc repro to make it again")
    return model.to(device or torch.device("cpu")).eval()


def load_config(directory: Path) -> PreTrainedConfig:
    """The config of a model directory, without its weights."""
    require_model(directory)
    with _damage(directory):
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)


def check_context(config: PreTrainedConfig, lengths: dict[str, int]) -> None:
    """Raise ValueError for a length, by the parameter's name and in tokens, beyond the model's context."""
    context = config.max_position_embeddings
    for name, tokens in lengths.items():
        if tokens > context:
            raise ValueError(f"{name} = {tokens}: longer than the model's context of {context} tokens; lower it")


@contextmanager
def _damage(directory: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, StrictDataclassError, TypeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise
        cause = " ".join(str(error).split())
        raise DamagedModelError(f"{directory}: does not load: {cause}; run dvc repro to make it again") from error


def require_model(directory: Path) -> None:
    """Raise FileNotFoundError where a directory holds no model, which transformers would take for a hub's name."""
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{directory}: holds no model (no config.json); run dvc repro to make it")
