"""Load a model directory, dense or pruned."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from tvaprune.checkpoint.config import AGAIN, DamagedModelError, damage, require_model
from tvaprune.checkpoint.modeling_tvaprune import TvaPruneConfig, TvaPruneForCausalLM, TvaPruneModel

AutoConfig.register(TvaPruneConfig.model_type, TvaPruneConfig, exist_ok=True)
AutoModel.register(TvaPruneConfig, TvaPruneModel, exist_ok=True)
AutoModelForCausalLM.register(TvaPruneConfig, TvaPruneForCausalLM, exist_ok=True)
# So that save_pretrained puts the modeling file beside the weights.
TvaPruneConfig.register_for_auto_class()
TvaPruneModel.register_for_auto_class("AutoModel")
TvaPruneForCausalLM.register_for_auto_class("AutoModelForCausalLM")


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
    with damage(Path(directory)):
        model, report = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype or "auto", use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    if missing := sorted(report["missing_keys"]):
        raise DamagedModelError(f"{directory}: {missing[0]} is not in its files; {AGAIN}")
    return model.to(device or torch.device("cpu")).eval()
