"""The adapter: add LoRA to a compact model, save it, merge it into a model directory.

PEFT does the work. This module adds the choice of modules, a seeded initialisation, files that are the same bytes for
the same inputs, and weights in the compact model's own dtype.
"""

import json
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tvaprune.options.recovery import RecoveryOptions


class CheckpointMismatchError(ValueError):
    """A model and the directory whose format it is saved in do not have the same tensors."""


def target_names(model: PreTrainedModel, targets: str | Sequence[str]) -> list[str]:
    """Full names of the linear modules to adapt, in the model's order.

    lm_head stays frozen, because the loss uses its weight. Modules that pruning left empty are skipped. Targets are
    last names (q_proj, ...). Raises ValueError for a target that is lm_head, or names no linear module.
    """
    head = model.get_output_embeddings()
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and module.weight.numel()
    ]
    if targets == "all-linear":
        return names
    known = sorted({name.rpartition(".")[2] for name in names})
    for target in targets:
        if target not in known:
            raise ValueError(f"finetune_lora.targets names {target!r}; this model has {', '.join(known)}")
    return [name for name in names if name.rpartition(".")[2] in targets]


def add_lora(model: PreTrainedModel, options: RecoveryOptions) -> PeftModel:
    """Freeze the model and add fp32 adapters beside its linear modules; changes the model in place."""
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,  # type: ignore[arg-type,unused-ignore]  # any number works
        lora_dropout=options.dropout,
        target_modules=target_names(model, options.targets),
        use_dora=options.use_dora,
        use_rslora=options.use_rslora,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    _leave_padding(adapted)
    return adapted


@torch.no_grad()
def _leave_padding(model: PeftModel) -> None:
    """Zero the columns of every A where the weight's column is zero, as the layout `padded` has them.

    The input there is 0, because the padding's rows are zero too. So the gradients of that column of A, and of the rows
    of B that would change the padding's rows, are 0, and padding stays padding. With random columns LoRA would bring
    dropped heads back.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            padding = (module.get_base_layer().weight == 0).all(0)
            for down in module.lora_A.values():
                down.weight[:, padding] = 0


def save_adapter(model: PeftModel, directory: Path, base_model: str) -> None:
    """Write the adapter in PEFT's format; its configuration names the compact model by the path `base_model`."""
    model.save_pretrained(str(directory), safe_serialization=True, save_embedding_layers=False)
    # PEFT's card is an empty template.
    (directory / "README.md").unlink(missing_ok=True)
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = base_model
    # PEFT keeps a set, whose order differs between processes.
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def merge_adapter(base: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """W + scale · B A in the base's dtype; changes the base in place. Raises ValueError if it is not finite."""
    return PeftModel.from_pretrained(base, str(adapter)).merge_and_unload(safe_merge=True)


def save_like(model: PreTrainedModel, original: Path, directory: Path, leave: Collection[str] = ()) -> None:
    """Write a model directory that differs from `original` only in the weights' values.

    Files, tensor names, shards and dtypes are the same; configuration, tokenizer and modeling code are copied, except
    for the files named in `leave`, which describe the original's weights.

    Raises:
        CheckpointMismatchError: the model and the original do not have the same tensors.
    """
    state = model.state_dict()
    directory.mkdir(parents=True, exist_ok=True)
    written: set[int] = set()
    for path in sorted(path for path in original.iterdir() if path.name not in leave):
        if path.name.endswith(".safetensors"):
            written |= _save_file_like(path, state, directory / path.name)
        elif path.is_file():
            shutil.copyfile(path, directory / path.name)
        elif path.is_dir() and path.name != "__pycache__":
            shutil.copytree(path, directory / path.name, dirs_exist_ok=True)
    # Compared by storage, because the file has a tied tensor once, under either of its names.
    missing = [name for name, tensor in state.items() if tensor.numel() and tensor.data_ptr() not in written]
    if missing:
        raise CheckpointMismatchError(f"{original}: no such tensor as {missing[0]!r}, which the model has")


def _save_file_like(original: Path, state: dict[str, Tensor], path: Path) -> set[int]:
    """Write `state`'s values of one weight file's tensors, in that file's dtypes; returns the storages written."""
    tensors: dict[str, Tensor] = {}
    with safe_open(original, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            old, new = file.get_tensor(name), state.get(name)
            if new is None or new.shape != old.shape:
                found = "absent from" if new is None else f"{list(new.shape)} in"
                raise CheckpointMismatchError(f"{original}: {name!r} is {list(old.shape)} here, and {found} the model")
            tensors[name] = new.detach().to("cpu", old.dtype).contiguous()
        save_file(tensors, path, metadata=file.metadata() or {"format": "pt"})
    return {state[name].data_ptr() for name in tensors}
