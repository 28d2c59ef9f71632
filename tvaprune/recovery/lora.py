"""The adapter: put LoRA on a compact model, save it, merge it into a model directory.

PEFT does the work. This module fixes what it leaves open: which modules, the random initialisation,
files that are byte for byte the same for the same inputs, and weights in the compact model's own dtype.
"""

import json
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"


class CheckpointMismatchError(ValueError):
    """A model does not have the tensors of the directory it is to be saved like."""


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapter: W + scale · B A, scale = alpha / rank (alpha / sqrt(rank) for rsLoRA).

    Attributes:
        rank: r, columns of B; capped by nothing, so it may exceed a narrow layer's width.
        alpha: numerator of the scale.
        dropout: on the adapter's input, in [0, 1).
        targets: "all-linear", or last names of linear modules (q_proj, down_proj, ...). Never lm_head.
        use_dora: PEFT's weight-decomposed LoRA.
        use_rslora: PEFT's rank-stabilised LoRA.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: str | Sequence[str] = ALL_LINEAR
    use_dora: bool = False
    use_rslora: bool = False


def target_names(model: PreTrainedModel, targets: str | Sequence[str]) -> list[str]:
    """Full names of the linear modules to adapt, in the model's order.

    lm_head stays frozen: the loss needs its weight as it is. Layers that pruning left without
    attention or MLP have no such modules and are passed over.

    Raises:
        ValueError: a target that is lm_head, or that names no linear module.
    """
    head = model.get_output_embeddings()
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and module.weight.numel() > 0
    ]
    if targets == ALL_LINEAR:
        return names
    wanted = [targets] if isinstance(targets, str) else list(targets)
    known = sorted({name.rpartition(".")[2] for name in names})
    for target in wanted:
        if target not in known:
            raise ValueError(f"finetune_lora.targets names {target!r}; this model has {', '.join(known)}")
    return [name for name in names if name.rpartition(".")[2] in wanted]


def add_lora(model: PreTrainedModel, settings: LoraSettings, seed: int) -> PeftModel:
    """Freeze the model and add fp32 adapters beside its linear modules; changes the model in place."""
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type,unused-ignore]  # any number works
        lora_dropout=settings.dropout,
        target_modules=target_names(model, settings.targets),
        use_dora=settings.use_dora,
        use_rslora=settings.use_rslora,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config, autocast_adapter_dtype=True)


def save_adapter(model: PeftModel, directory: Path, base_model: str) -> None:
    """Write the adapter in PEFT's format.

    Args:
        base_model: where the compact model is, as a user of the adapter is to find it.
    """
    model.save_pretrained(str(directory), safe_serialization=True, save_embedding_layers=False)
    # A model card of blanks tells nobody anything.
    (directory / "README.md").unlink(missing_ok=True)
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = base_model
    # PEFT keeps it as a set, whose order changes from process to process.
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def merge_adapter(base: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """W + scale · B A in the base's dtype, checked to be finite (ValueError if not); the base is consumed."""
    return PeftModel.from_pretrained(base, str(adapter)).merge_and_unload(safe_merge=True)


def save_like(model: PreTrainedModel, original: Path, directory: Path, leave: Collection[str] = ()) -> None:
    """Write a model directory that differs from `original` in the weights' values only.

    The same files, tensor names, shards and dtypes; configuration, tokenizer and modeling code copied.

    Args:
        leave: names of files that are not copied, because they speak of the original's weights.

    Raises:
        CheckpointMismatchError: the model and the original do not have the same tensors.
    """
    state = model.state_dict()
    directory.mkdir(parents=True, exist_ok=True)
    written: set[int] = set()
    for path in sorted(path for path in original.iterdir() if path.name not in leave):
        if path.name.endswith(".safetensors"):
            tensors, metadata = _retake(path, state, written)
            save_file(tensors, directory / path.name, metadata=metadata)
        elif path.is_file():
            shutil.copyfile(path, directory / path.name)
        elif path.is_dir() and path.name != "__pycache__":
            shutil.copytree(path, directory / path.name, dirs_exist_ok=True)
    # A tied tensor is in the file once, under either of its names.
    missing = [name for name, tensor in state.items() if tensor.numel() and tensor.data_ptr() not in written]
    if missing:
        raise CheckpointMismatchError(f"{original}: no such tensor as {missing[0]!r}, which the model has")


def _retake(path: Path, state: dict[str, Tensor], written: set[int]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """One weight file's tensors, taken from `state` and in the file's dtypes; notes their storage as written."""
    tensors: dict[str, Tensor] = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            old = file.get_tensor(name)
            new = state.get(name)
            if new is None or new.shape != old.shape:
                raise CheckpointMismatchError(
                    f"{path}: {name!r} is {list(old.shape)} here, and "
                    f"{'absent from' if new is None else list(new.shape)} in the model"
                )
            written.add(new.data_ptr())
            tensors[name] = new.detach().to("cpu", old.dtype).contiguous()
        return tensors, file.metadata() or {"format": "pt"}
