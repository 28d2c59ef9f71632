"""What a student is trained on and measured by."""

from contextlib import nullcontext

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from tvaprune.architecture.topology import hidden_states
from tvaprune.distributed import Process
from tvaprune.losses import DistillationLoss, cross_entropy, distillation_loss, next_token_labels
from tvaprune.options.loss import LossOptions
from tvaprune.recovery.teacher import CachedTeacher, Teacher, frozen_head


def student_hidden(model: PreTrainedModel, input_ids: Int[Tensor, "batch seq"]) -> Float[Tensor, "tokens width"]:
    """Hidden states after the final norm; matmuls run in the base's dtype, beside fp32 adapters."""
    dtype = frozen_head(model).dtype
    device_type = input_ids.device.type
    with nullcontext() if dtype == torch.float32 else torch.autocast(device_type, dtype=dtype):
        return hidden_states(model, input_ids).flatten(0, 1)


def batch_loss(
    student: PreTrainedModel,
    teacher: Teacher | CachedTeacher | None,
    windows: list[int],
    input_ids: Int[Tensor, "batch seq"],
    options: LossOptions,
) -> DistillationLoss:
    """The loss on a batch, which the teacher knows by the indices `windows`; cross-entropy alone without a teacher."""
    return distillation_loss(
        student_hidden(student, input_ids),
        frozen_head(student),
        teacher.hidden(windows) if teacher else None,
        teacher.head if teacher else None,
        next_token_labels(input_ids),
        options,
    )


@torch.no_grad()
def mean_nll(model: PreTrainedModel, input_ids: Int[Tensor, "windows seq"], batch_size: int, process: Process) -> float:
    """Mean negative log-likelihood in nats a token, without each window's first token."""
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=process.device)
    batches = input_ids.split(batch_size)
    for index, counts in process.world.turns(len(batches)):
        batch_ids = batches[index].to(process.device).long()
        ce = cross_entropy(student_hidden(model, batch_ids), frozen_head(model), next_token_labels(batch_ids))
        total += ce.double() * len(batch_ids) * counts
    return process.world.sum_(total).item() / len(input_ids)
