"""How much memory fine-tuning takes, found without taking it: one step on fake tensors, counted as it allocates."""

from copy import deepcopy

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from tvaprune.architecture.attention import use_training_attention
from tvaprune.gates.memory import LiveBytes
from tvaprune.losses import distillation_loss, next_token_labels
from tvaprune.recovery.lora import LoraSettings, add_lora
from tvaprune.recovery.schedule import Schedule
from tvaprune.recovery.teacher import Teacher, final_hidden, frozen_head
from tvaprune.recovery.training import Objective, autocast

# Value, AdamW's two moments, and the best so far; the gradient is in the step.
_COPIES = 4


def finetuning_memory(
    student: PreTrainedConfig,
    teacher: PreTrainedConfig,
    lora: LoraSettings,
    objective: Objective,
    schedule: Schedule,
    seq_len: int,
    dtype: torch.dtype,
    device_type: str,
) -> dict[str, int]:
    """Bytes that `finetune` holds on its device at its highest, without the process itself.

    Counted as `tvaprune.gates.memory.training_memory` counts, with the same left out. A teacher that is not online is
    on the device by itself first, to be measured and to have its hidden states kept.

    Args:
        student, teacher: configs of the compact and the dense model; nothing is loaded.
        seq_len: tokens a window.
        dtype: of both models' frozen weights.
        device_type: "cuda" counts the stock attention, "cpu" the one that `finetune` puts there.

    Returns:
        weights (the student's), teacher (what of it stays beside it), adapter (fp32, with AdamW's moments and the best
        so far), step (what a step needs beside them), total.
    """
    input_ids_shape = (schedule.batch_size, seq_len)
    with torch.device("meta"):  # PEFT moves what it adds, which fake tensors do not take
        pruned, dense = (AutoModelForCausalLM.from_config(deepcopy(one), dtype=dtype) for one in (student, teacher))
        student_bytes, teacher_bytes = _bytes(pruned), _bytes(dense)
        dense.requires_grad_(False)
        add_lora(pruned, lora, seed=0)
    with FakeTensorMode(), LiveBytes() as live:
        for model in (pruned, dense):
            _make_fake(model)
            if device_type == "cpu":
                use_training_attention(model, torch.device("cpu"))
        adapter = [parameter for parameter in pruned.parameters() if parameter.requires_grad]
        if schedule.gradient_checkpointing:
            pruned.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        input_ids = torch.zeros(input_ids_shape, dtype=torch.int64)
        labels = next_token_labels(input_ids)
        source = Teacher(dense, input_ids)
        windows = range(schedule.batch_size)

        live.restart()
        with torch.no_grad():
            distillation_loss(source.hidden(windows), source.head, None, None, labels)
        alone = teacher_bytes + live.highest

        pruned.train()
        taught = objective.teacher != "none"
        cached = source.hidden(windows) if objective.teacher == "cached" else None
        live.restart()
        with autocast(pruned, torch.device("cpu")):
            hidden = final_hidden(pruned, input_ids)
        target = (source.hidden(windows) if cached is None else cached.clone()) if taught else None
        loss = distillation_loss(
            hidden,
            frozen_head(pruned),
            target,
            source.head if taught else None,
            labels,
            ce_weight=objective.ce_weight,
            distillation_weight=objective.distillation_weight,
            temperature=objective.temperature,
            kind=objective.distillation,
            top_k=objective.top_k,
        ).loss
        loss.backward()
        step = live.highest
        adapter_bytes = sum(parameter.nbytes for parameter in adapter)
        kept = {"online": teacher_bytes, "cached": source.head.nbytes, "none": 0}[objective.teacher]
    parts = {"weights": student_bytes, "teacher": kept, "adapter": _COPIES * adapter_bytes}
    # The optimiser's own step has the gradients and, in AdamW's fused form over all tensors, as much again.
    parts["step"] = max(step, 2 * adapter_bytes)
    return {**parts, "total": max(sum(parts.values()), alone if objective.teacher != "online" else 0)}


def _make_fake(model: PreTrainedModel) -> None:
    """Replace meta tensors by fake ones that say they are on a CPU, whose kernels are then the ones counted."""
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old is not None:
                module._parameters[name] = nn.Parameter(torch.empty(old.shape, dtype=old.dtype), old.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _bytes(model: PreTrainedModel) -> int:
    return sum(weight.nbytes for weight in {id(weight): weight for weight in model.parameters()}.values())
