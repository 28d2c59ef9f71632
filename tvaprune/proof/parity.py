"""Is the compact model the masked dense one? Measured on logits, in float32."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tvaprune.architecture.topology import Topology, lm_head
from tvaprune.checkpoint.fold import can_stay_tied, fold, scales
from tvaprune.checkpoint.loading import load
from tvaprune.checkpoint.tensor_files import Checkpoint
from tvaprune.gates.insertion import GatedModel, hard_gates
from tvaprune.masks.masks import Masks
from tvaprune.masks.update import WeightUpdate


class Parity(NamedTuple):
    """Differences between two models' logits over all positions of the prompts."""

    max_abs_logit_diff: float
    max_rel_logit_diff: float
    argmax_agreement: float


def compare(reference: Tensor, other: Tensor, tie: float = 0.0) -> Parity:
    """Compare logits [..., vocab] of any floating dtype; the relative difference is to the largest reference logit.

    Args:
        tie: the likeliest tokens agree too where the reference's logits of the two differ by no more.
    """
    difference = (reference.float() - other.float()).abs().max()
    agreement = _lost_by_choosing(reference, other.argmax(-1)) <= tie
    largest = reference.float().abs().max()
    return Parity(float(difference), float(difference / largest), float(agreement.float().mean()))


def same_choices(reference: Tensor, chosen: Tensor, other: Tensor, tie: float) -> float:
    """Share of generated sequences that are the same, or part at a tie.

    Args:
        reference: logits float [prompts, tokens, vocab] that `chosen` was taken by.
        chosen, other: int64 [prompts, tokens].
        tie: difference of the reference's logits up to which two tokens are as likely; what follows is not compared.
    """
    lost = _lost_by_choosing(reference, other)
    same = 0
    for row, (ours, theirs) in enumerate(zip(chosen, other, strict=True)):
        apart = (ours != theirs).nonzero().flatten()
        same += not len(apart) or float(lost[row, apart[0]]) <= tie
    return same / len(chosen)


def _lost_by_choosing(reference: Tensor, chosen: Tensor) -> Tensor:
    """How much less than the highest logit [..., vocab] a choice [...] has; 0 where it is the highest."""
    return reference.amax(-1) - reference.gather(-1, chosen[..., None]).squeeze(-1)


@torch.inference_mode()
def masked_dense_logits(dense: Path, masks: Masks, update: WeightUpdate, input_ids: Tensor) -> Tensor:
    """Logits of the dense model with the update folded in and the masks as gates, in float32.

    The fold is rounded to the checkpoint's own dtype, as it is stored, so that the masked and the compact
    model hold the very same numbers and any difference is the cutting's.

    Args:
        input_ids: int64 [batch, seq].

    Returns:
        float32 [batch, seq, vocab].
    """
    model = load(dense, dtype=torch.float32)
    topology = Topology.of(model.config)
    tied = bool(model.config.tie_word_embeddings)
    stay_tied = tied and can_stay_tied(masks, update)
    head = lm_head(model)
    if tied and not stay_tied:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    parameters = dict(model.named_parameters())
    checkpoint = Checkpoint.of(dense)
    for name in checkpoint.info:
        if name in parameters and not (tied and name == "lm_head.weight"):
            parameters[name].copy_(fold(checkpoint.read(name), scales(topology, name, update, tied=stay_tied)).float())
    stored = checkpoint.info["model.embed_tokens.weight"].dtype
    for name, bias in update.bias.items():
        projection = model.get_submodule(name)
        # The hidden gate of the masked model is 0 or 1 here, so mu is folded into the bias as it is into the rows.
        projection.bias = nn.Parameter((bias * update.scale["hidden"]).to(stored).float(), requires_grad=False)
    with GatedModel(model, topology).inserted() as gated:
        gated.set(hard_gates(masks.keep), kept_hidden=int(masks.keep["hidden"].sum()))
        return model(input_ids=input_ids, use_cache=False).logits


@torch.inference_mode()
def compact_logits(directory: Path, input_ids: Tensor) -> Tensor:
    """Logits of a model directory, loaded anew, in float32: int64 [batch, seq] to float32 [batch, seq, vocab]."""
    return model_logits(load(directory, dtype=torch.float32), input_ids)


@torch.inference_mode()
def model_logits(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Logits of a model in float32 on the CPU: int64 [batch, seq] to float32 [batch, seq, vocab]."""
    return model(input_ids=input_ids, use_cache=False).logits
