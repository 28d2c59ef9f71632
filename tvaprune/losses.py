"""Cross-entropy and distillation from hidden states, never holding all logits at once.

With a vocabulary of 49,152, fp32 logits take 200 kB a token, for each model and again for the gradient. Here the
logits exist for one chunk of tokens at a time. The gradient with respect to the student's hidden states is computed
while they do, so nothing is computed twice and nothing of vocabulary size is kept.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from tvaprune.options.loss import LossOptions

# The label of a position that has no next token.
_IGNORED = -100
# Tokens whose logits are in memory at once. On a CPU more, because the head is read from memory once for each chunk.
_CHUNK_TOKENS, _CPU_CHUNK_TOKENS = 128, 512
# fp32 logits at once for each thread of a CPU: few enough that the passes over them stay in a core's cache.
_CPU_SLICE = 1 << 19
# The type of device that `counted_as` asks for.
_COUNTED_AS: ContextVar[str | None] = ContextVar("_COUNTED_AS", default=None)
# 1 minus a sum of fp32 probabilities has about this error, so a smaller tail mass cannot be told from none.
_TAIL_FLOOR = 1e-6
KL_ALONE = LossOptions(ce_weight=0.0, distillation_weight=1.0, distillation="kl", temperature=1.0, top_k=None)
CE_ALONE = replace(KL_ALONE, ce_weight=1.0, distillation_weight=0.0)


class DivergedError(ValueError):
    """The loss or its gradient is not finite."""


class DistillationLoss(NamedTuple):
    """Means over the labelled tokens, fp32 scalars; only `loss` carries a gradient."""

    loss: Tensor
    ce: Tensor
    distillation: Tensor


def distillation_loss(
    student_hidden: Float[Tensor, "tokens student_width"],
    student_head: Float[Tensor, "vocab student_width"],
    teacher_hidden: Float[Tensor, "tokens teacher_width"] | None,
    teacher_head: Float[Tensor, "vocab teacher_width"] | None,
    labels: Int[Tensor, " tokens"],
    options: LossOptions,
) -> DistillationLoss:
    """loss = ce_weight · CE + distillation_weight · D, over the tokens that have a label.

    D is one of
        kl:  T² · KL(softmax(teacher / T) ‖ softmax(student / T))   (Hinton et al. 2015; TVA-Prune's code)
        mse: mean over the vocabulary of (student - teacher)² of raw logits (as TVA-Prune's text has it);
             the temperature cancels.

    With `top_k`, kl compares the teacher's k likeliest tokens one by one and all others as a single class (a lower
    bound of the full KL, equal to it at k = vocabulary); mse compares those k logits only.

    Matmuls run in the student head's dtype (the teacher's in its own head's), all else in fp32, also under autocast.

    Args:
        student_hidden: after the final norm; any floating dtype. The only input that gets a gradient.
        student_head: frozen lm_head weight.
        teacher_hidden: after its final norm, no gradient. None: no distillation, D = 0. D is also 0 at weight 0.
        teacher_head: the teacher's lm_head weight, same vocabulary.
        labels: the NEXT token of each position, int64; -100 where there is none (see `next_token_labels`).

    Raises:
        ValueError: shapes that do not fit, a head that wants a gradient, or a top_k above the vocabulary.
    """
    _check(student_hidden, student_head, teacher_hidden, teacher_head, labels)
    vocabulary = student_head.shape[0]
    if options.top_k is not None and options.top_k >= vocabulary:
        if options.top_k > vocabulary:
            raise ValueError(f"top_k = {options.top_k}: must be between 1 and the vocabulary, {vocabulary}")
        options = replace(options, top_k=None)  # the same value, computed faster
    wants_gradient = torch.is_grad_enabled() and student_hidden.requires_grad
    return DistillationLoss(
        *_ChunkedLoss.apply(student_hidden, student_head, teacher_hidden, teacher_head, labels, options, wants_gradient)
    )


def cross_entropy(
    hidden: Float[Tensor, "tokens width"], head: Float[Tensor, "vocab width"], labels: Int[Tensor, " tokens"]
) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats over the tokens that have a label: `distillation_loss` without a teacher."""
    return distillation_loss(hidden, head, None, None, labels, CE_ALONE).loss


def next_token_labels(input_ids: Int[Tensor, "batch seq"]) -> Int[Tensor, " tokens"]:
    """int64 labels for hidden states flattened to [batch·seq, width]: each position's next token, -100 at the last."""
    labels = torch.full(input_ids.shape, _IGNORED, dtype=torch.int64, device=input_ids.device)
    labels[:, :-1] = input_ids[:, 1:]
    return labels.flatten()


@contextmanager
def counted_as(device_type: str) -> Iterator[None]:
    """Chunks of the loss as on such a device, whatever holds the tensors: to count the memory of a step there."""
    token = _COUNTED_AS.set(device_type)
    try:
        yield
    finally:
        _COUNTED_AS.reset(token)


def _on_cpu(tensor: Tensor) -> bool:
    return (_COUNTED_AS.get() or tensor.device.type) == "cpu"


class _ChunkedLoss(torch.autograd.Function):
    """The forward also computes the gradient; the backward only scales it."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_head: Tensor,
        teacher_hidden: Tensor | None,
        teacher_head: Tensor | None,
        labels: Tensor,
        options: LossOptions,
        wants_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        counted = (labels != _IGNORED).float()
        token_weight = counted / counted.sum().clamp_min(1.0)
        ce = torch.zeros((), device=labels.device)
        distillation = torch.zeros((), device=labels.device)
        gradient = torch.empty(student_hidden.shape, device=labels.device) if wants_gradient else None
        with torch.autocast(labels.device.type, enabled=False):
            for rows in _slices(len(labels), _CPU_CHUNK_TOKENS if _on_cpu(labels) else _CHUNK_TOKENS):
                student_logits = F.linear(student_hidden[rows].to(student_head.dtype), student_head)
                teacher_logits = None
                if teacher_hidden is not None and teacher_head is not None and options.distillation_weight != 0:
                    teacher_logits = F.linear(teacher_hidden[rows].to(teacher_head.dtype), teacher_head)
                # Ignored rows have weight 0, so any valid index does for them.
                chunk_labels = labels[rows].clamp(0, student_head.shape[0] - 1)
                row_ce, row_distillation = _chunk(student_logits, teacher_logits, chunk_labels, options, wants_gradient)
                ce += row_ce @ token_weight[rows]
                distillation += row_distillation @ token_weight[rows]
                if gradient is not None:
                    # Weighted after the matmul: 1/tokens times a small probability underflows in fp16.
                    product = student_logits @ student_head  # the logits' gradient took their place
                    torch.mul(product.float(), token_weight[rows, None], out=gradient[rows])
        ctx.save_for_backward(gradient)
        ctx.hidden_dtype = student_hidden.dtype
        ctx.mark_non_differentiable(ce, distillation)
        return options.ce_weight * ce + options.distillation_weight * distillation, ce, distillation

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[0]).to(ctx.hidden_dtype), *[None] * 6


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, length, size)]


def _chunk(
    student_logits: Float[Tensor, "tokens vocab"],
    teacher_logits: Float[Tensor, "tokens vocab"] | None,
    labels: Int[Tensor, " tokens"],
    options: LossOptions,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """CE and D per token, fp32; where a gradient is wanted, it overwrites the student's logits."""
    tokens, vocabulary = student_logits.shape
    if _on_cpu(labels):
        tokens = max(_CPU_SLICE * torch.get_num_threads() // vocabulary, 1)
    found = []
    for rows in _slices(len(labels), tokens):
        teacher = None if teacher_logits is None else teacher_logits[rows]
        ce, distillation, gradient = _terms(student_logits[rows], teacher, labels[rows], options, wants_gradient)
        if gradient is not None:
            student_logits[rows] = gradient
        found.append((ce, distillation))
    ces, distillations = zip(*found, strict=True)
    return torch.cat(ces), torch.cat(distillations)


def _terms(
    student_logits: Float[Tensor, "tokens vocab"],
    teacher_logits: Float[Tensor, "tokens vocab"] | None,
    labels: Int[Tensor, " tokens"],
    options: LossOptions,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """CE and D per token (fp32), and d(ce_weight · CE + distillation_weight · D)/d(student logits) or None."""
    student_log_p = F.log_softmax(student_logits, dim=-1, dtype=torch.float32)
    ce = -student_log_p.gather(1, labels[:, None]).squeeze(1)
    distillation = torch.zeros_like(ce)
    extra: Tensor | None = None
    share_of_p = options.ce_weight
    if teacher_logits is not None:
        T = options.temperature
        if options.distillation == "mse":
            distillation, extra = _mse(student_logits, teacher_logits, options)
        elif options.top_k is None and T == 1:
            # The gradient of both terms has p, so it is computed once: (ce_weight + weight) · p - weight · q.
            distillation, q = _full_kl(student_log_p, teacher_logits.float())
            share_of_p, extra = share_of_p + options.distillation_weight, q.neg_()
        else:
            log_p = student_log_p if T == 1 else F.log_softmax(student_logits.float() / T, dim=-1)
            teacher = teacher_logits.float().div_(T)
            if options.top_k is None:
                distillation, q = _full_kl(log_p, teacher)
                extra = log_p.exp().sub_(q).mul_(T)
            else:
                distillation, extra = _top_k_kl(log_p, teacher, options)
            distillation = distillation * T**2
    if not wants_gradient:
        return ce, distillation, None
    gradient = student_log_p.exp_().mul_(share_of_p)
    correct = torch.full_like(labels[:, None], -options.ce_weight, dtype=torch.float32)
    gradient.scatter_add_(1, labels[:, None], correct)
    if extra is not None:
        gradient.add_(extra, alpha=options.distillation_weight)
    return ce, distillation, gradient


def _full_kl(
    log_p: Float[Tensor, "tokens vocab"], teacher: Float[Tensor, "tokens vocab"]
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, "tokens vocab"]]:
    """KL(q ‖ p) per token, and q; the KL's gradient with respect to the student's logits is p - q."""
    log_q = F.log_softmax(teacher, dim=-1)
    q = log_q.exp()
    return _row_dot(q, log_q.sub_(log_p)), q


def _top_k_kl(
    log_p: Float[Tensor, "tokens vocab"], teacher: Float[Tensor, "tokens vocab"], options: LossOptions
) -> tuple[Tensor, Tensor]:
    """KL over k + 1 classes, the teacher's top k and the tail as one, and T² times its gradient.

    The gradient is that of a full KL whose teacher has the student's own shape on the tail, with the teacher's mass:
    p - q on the top k, p - p · (q_tail / p_tail) elsewhere.
    """
    assert options.top_k is not None
    values, indices = teacher.topk(options.top_k, dim=-1)
    log_q = values - teacher.logsumexp(dim=-1, keepdim=True)
    q = log_q.exp()
    log_p_top = log_p.gather(1, indices)
    q_tail = (1 - q.sum(dim=1)).clamp_min(_TAIL_FLOOR)
    p_tail = (1 - log_p_top.exp().sum(dim=1)).clamp_min(_TAIL_FLOOR)
    kl = _row_dot(q, log_q - log_p_top) + q_tail * (q_tail / p_tail).log()
    gradient = log_p.exp().mul_((1 - q_tail / p_tail)[:, None])
    gradient.scatter_(1, indices, log_p_top.exp() - q)
    return kl, gradient.mul_(options.temperature)


def _row_dot(left: Float[Tensor, "tokens units"], right: Float[Tensor, "tokens units"]) -> Float[Tensor, " tokens"]:
    """Sum of products per token, by bmm: vecdot would write the products out first."""
    return torch.bmm(left[:, None, :], right[:, :, None]).flatten()


def _mse(
    student: Float[Tensor, "tokens vocab"], teacher: Float[Tensor, "tokens vocab"], options: LossOptions
) -> tuple[Tensor, Tensor]:
    """Mean squared difference of the raw logits per token, and its gradient."""
    indices = None if options.top_k is None else teacher.topk(options.top_k, dim=-1).indices
    difference = student.float() - teacher.float()
    picked = difference if indices is None else difference.gather(1, indices)
    squared = picked.square().mean(dim=1)
    scaled = picked * (2 / picked.shape[1])
    return squared, scaled if indices is None else torch.zeros_like(difference).scatter_(1, indices, scaled)


def _check(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    labels: Tensor,
) -> None:
    """Raise a ValueError that names what does not fit."""
    if (teacher_hidden is None) != (teacher_head is None):
        raise ValueError("teacher_hidden and teacher_head go together: give both or neither")
    if labels.dim() != 1 or labels.dtype != torch.int64:
        raise ValueError(f"labels: expected int64 [tokens], found {labels.dtype} {list(labels.shape)}")
    for name, hidden, head in (("student", student_hidden, student_head), ("teacher", teacher_hidden, teacher_head)):
        if hidden is None or head is None:
            continue
        if hidden.dim() != 2 or hidden.shape != (labels.shape[0], head.shape[1]):
            raise ValueError(
                f"{name}_hidden: expected [{labels.shape[0]}, {head.shape[1]}] (labels, head), "
                f"found {list(hidden.shape)}"
            )
        if torch.is_grad_enabled() and (head.requires_grad or (name == "teacher" and hidden.requires_grad)):
            raise ValueError(f"{name}: gets no gradient here; freeze the head and detach the teacher")
    if teacher_head is not None and teacher_head.shape[0] != student_head.shape[0]:
        raise ValueError(f"vocabularies differ: student {student_head.shape[0]}, teacher {teacher_head.shape[0]}")
