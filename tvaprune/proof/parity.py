"""The compact model compared with the masked dense model, by their logits in float32."""

from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tvaprune.architecture.topology import EMBEDDING, HEAD, Topology, lm_head
from tvaprune.checkpoint.fold import can_stay_tied, fold, scales
from tvaprune.checkpoint.loading import load
from tvaprune.checkpoint.tensor_files import Checkpoint
from tvaprune.gates.insertion import GatedModel, hard_gates
from tvaprune.masks.masks import Masks
from tvaprune.masks.update import WeightUpdate, replaced


class Parity(NamedTuple):
    """Differences between two models' logits over all positions of the prompts."""

    max_abs_logit_diff: float
    max_rel_logit_diff: float
    argmax_agreement: float


def compare(reference: Float[Tensor, "*logits"], other: Float[Tensor, "*logits"], tie: float = 0.0) -> Parity:
    """Compare logits [..., vocab]; the relative difference is to the largest reference logit.

    Two likeliest tokens also agree where their reference logits differ by at most `tie`.
    """
    difference = (reference.float() - other.float()).abs().max()
    agreement = _gap_to_best(reference, other.argmax(-1)) <= tie
    largest = reference.float().abs().max()
    return Parity(float(difference), float(difference / largest), float(agreement.float().mean()))


def same_choices(
    reference: Float[Tensor, "prompts tokens vocab"],
    chosen: Int[Tensor, "prompts tokens"],
    other: Int[Tensor, "prompts tokens"],
    tie: float,
) -> float:
    """Share of generated sequences that are the same up to a tie; what follows a tie is not compared.

    `chosen` was taken from the reference's logits. Two tokens are a tie where those differ by at most `tie`.
    """
    gap = _gap_to_best(reference, other)
    same = 0
    for row, (ours, theirs) in enumerate(zip(chosen, other, strict=True)):
        apart = (ours != theirs).nonzero().flatten()
        same += not len(apart) or float(gap[row, apart[0]]) <= tie
    return same / len(chosen)


def _gap_to_best(reference: Tensor, chosen: Tensor) -> Tensor:
    """The highest logit [..., vocab] minus the chosen token's [...]."""
    return reference.amax(-1) - reference.gather(-1, chosen[..., None]).squeeze(-1)


@torch.inference_mode()
def masked_dense_logits(
    dense: Path, masks: Masks, update: WeightUpdate, input_ids: Int[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq vocab"]:
    """Logits of the dense model with the update folded in and the masks as gates, in float32.

    The folded weights are rounded to the checkpoint's own dtype, so that the masked and the compact model hold the
    same numbers and any difference is due to the cutting.
    """
    model = load(dense, dtype=torch.float32)
    topology = Topology.of(model.config)
    tied = bool(model.config.tie_word_embeddings)
    stay_tied = tied and can_stay_tied(masks, update)
    if tied and not stay_tied:
        lm_head(model).weight = nn.Parameter(lm_head(model).weight.detach().clone(), requires_grad=False)
    parameters = dict(model.named_parameters())
    checkpoint = Checkpoint.of(dense)
    for name in checkpoint.info:
        if name in parameters and not (tied and name == HEAD):
            dense_weight = checkpoint.read(name)
            weight = update.weight.get(name, dense_weight).to(dense_weight.dtype)
            parameters[name].copy_(fold(weight, scales(topology, name, update, tied=stay_tied)).float())
    stored = checkpoint.info[EMBEDDING].dtype
    for name in update.mean_input:
        projection = model.get_submodule(name)
        bias = update.bias(name, checkpoint.read(f"{name}.weight"), masks)
        # The hidden gate is 0 or 1 here, so mu is folded into the bias as it is into the rows.
        projection.bias = nn.Parameter((bias * update.scale["hidden"]).to(stored).float(), requires_grad=False)
    with GatedModel(model, topology).inserted() as gated:
        gated.set(hard_gates(masks.keep), kept_hidden=int(masks.keep["hidden"].sum()))
        return model(input_ids=input_ids, use_cache=False).logits


@torch.inference_mode()
def gated_logits(
    dense: Path, masks: Masks, update: WeightUpdate, input_ids: Int[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq vocab"]:
    """Logits of the dense model with its own weights, or the update's, and the gates in place, in float32.

    As while learning: nothing is folded, so this and the compact model share no code that scales weights.
    """
    model = load(dense, dtype=torch.float32)
    with replaced(model, update, masks), GatedModel(model, Topology.of(model.config)).inserted() as gated:
        kept = int(masks.keep["hidden"].sum())
        gated.set(hard_gates(masks.keep, update.scale), kept, update.channel_scale)
        return model(input_ids=input_ids, use_cache=False).logits


def mean_kl(reference: Float[Tensor, "*logits"], other: Float[Tensor, "*logits"]) -> float:
    """KL(reference ‖ other) of next-token distributions from logits [..., vocab], mean over positions, in nats."""
    ours, theirs = (logits.double().log_softmax(-1) for logits in (reference, other))
    return float((ours.exp() * (ours - theirs)).sum(-1).mean())


def compact_logits(directory: Path, input_ids: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq vocab"]:
    """Logits of a model directory, loaded in float32 on the CPU."""
    return model_logits(load(directory, dtype=torch.float32), input_ids)


@torch.inference_mode()
def model_logits(model: nn.Module, input_ids: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq vocab"]:
    return model(input_ids=input_ids, use_cache=False).logits
