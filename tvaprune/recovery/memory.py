"""How much memory fine-tuning needs, without allocating it: one step on fake tensors, counted as it allocates."""

from collections.abc import Sequence
from copy import deepcopy

import torch
from jaxtyping import Float
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from tvaprune.architecture.attention import use_training_attention
from tvaprune.gates.memory import LiveBytes
from tvaprune.losses import counted_as, cross_entropy, next_token_labels
from tvaprune.options.recovery import RecoveryOptions
from tvaprune.recovery.lora import add_lora
from tvaprune.recovery.objective import batch_loss
from tvaprune.recovery.teacher import Teacher

# Value, AdamW's two moments, and the best so far; the step holds the gradient.
_COPIES = 4


def finetuning_memory(
    student: PreTrainedConfig,
    teacher: PreTrainedConfig,
    options: RecoveryOptions,
    seq_len: int,
    dtype: torch.dtype,
    device_type: str,
) -> dict[str, int]:
    """Bytes that `finetune` holds on its device at its peak, without the process itself.

    Counted like `tvaprune.gates.memory.training_memory`, with the same exclusions. A teacher that is not online is on
    the device alone first, where it is measured and its hidden states are cached.

    Args:
        student, teacher: configs of the compact and the dense model; no weights are loaded.
        dtype: of both models' frozen weights.
        device_type: "cuda" counts the stock attention, "cpu" the one that `finetune` uses there.

    Returns:
        weights (the student's), teacher (what of it stays beside the student), adapter (fp32, with AdamW's moments and
        the best so far), step (what a step needs beside them), total.
    """
    with torch.device("meta"):  # PEFT moves what it adds, which fake tensors do not support
        pruned, dense = (AutoModelForCausalLM.from_config(deepcopy(one), dtype=dtype) for one in (student, teacher))
        student_bytes, teacher_bytes = _bytes(pruned), _bytes(dense)
        dense.requires_grad_(False)
        add_lora(pruned, options)
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        for model in (pruned, dense):
            model.to_empty(device="cpu")  # fake tensors, for which the CPU's kernels are counted
            if device_type == "cpu":
                use_training_attention(model, torch.device("cpu"))
        adapter_bytes = sum(parameter.nbytes for parameter in pruned.parameters() if parameter.requires_grad)
        if options.gradient_checkpointing:
            pruned.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        input_ids = torch.zeros(options.batch_size, seq_len, dtype=torch.int64)
        windows = list(range(options.batch_size))
        source = Teacher(dense, input_ids)

        live.restart()
        with torch.no_grad(), counted_as(device_type):
            cross_entropy(source.hidden(windows), source.head, next_token_labels(input_ids))
        teacher_alone = teacher_bytes + live.highest

        pruned.train()
        used = {"online": source, "cached": _KeptStates(source, windows), "none": None}[options.teacher]
        live.restart()
        with counted_as(device_type):
            batch_loss(pruned, used, windows, input_ids, options).loss.backward()
        step = live.highest
    parts = {
        "weights": student_bytes,
        "teacher": {"online": teacher_bytes, "cached": source.head.nbytes, "none": 0}[options.teacher],
        "adapter": _COPIES * adapter_bytes,
        # The optimizer's own step has the gradients and, in AdamW's fused form over all tensors, as much again.
        "step": max(step, 2 * adapter_bytes),
    }
    return {**parts, "total": max(sum(parts.values()), teacher_alone if options.teacher != "online" else 0)}


class _KeptStates(Teacher):
    """A teacher whose hidden states are copied from memory, in place of `CachedTeacher`'s file."""

    def __init__(self, source: Teacher, windows: list[int]) -> None:
        self.head = source.head
        self._states = source.hidden(windows)

    def hidden(self, windows: Sequence[int]) -> Float[Tensor, "tokens width"]:
        return self._states.clone()


def _bytes(model: PreTrainedModel) -> int:
    return sum(weight.nbytes for weight in model.parameters())
