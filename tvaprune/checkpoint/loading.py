"""Load a model directory, dense or pruned."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from tvaprune.checkpoint.modeling_tvaprune import TvaPruneConfig, TvaPruneForCausalLM

AutoConfig.register(TvaPruneConfig.model_type, TvaPruneConfig, exist_ok=True)
AutoModelForCausalLM.register(TvaPruneConfig, TvaPruneForCausalLM, exist_ok=True)
# So that save_pretrained puts the modeling file beside the weights.
TvaPruneConfig.register_for_auto_class()
TvaPruneForCausalLM.register_for_auto_class("AutoModelForCausalLM")


def load(
    directory: Path | str, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> PreTrainedModel:
    """Load a stock or pruned model for inference, with this package's own classes and no remote code.

    With a dtype of None the weights stay as stored; a device of None is the CPU.

    Raises:
        FileNotFoundError: the directory holds no model.
    """
    require_model(Path(directory))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype or "auto")
    return model.to(device or torch.device("cpu")).eval()


def load_config(directory: Path) -> PreTrainedConfig:
    """The config of a model directory, without its weights."""
    require_model(directory)
    return AutoConfig.from_pretrained(directory)


def require_model(directory: Path) -> None:
    """Raise FileNotFoundError where a directory holds no model, which transformers would take for a hub's name."""
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{directory}: holds no model (no config.json); run dvc repro to make it")
