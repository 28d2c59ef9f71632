"""Scores from weight gradients: LLM-Pruner and NIRVANA."""

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tvaprune.architecture.topology import Axis, Topology, decoder, lm_head
from tvaprune.baselines.allocation import Scores, allocate_balanced, allocate_uniform
from tvaprune.baselines.gradients import Objective, absolute_products, pool, signed_products
from tvaprune.gates.insertion import GatedModel, hard_gates
from tvaprune.losses import KL_ALONE, distillation_loss, next_token_labels
from tvaprune.masks.masks import Masks


def llm_pruner(
    model: nn.Module,
    topology: Topology,
    input_ids: Tensor,
    target_sparsity: float,
    axes: tuple[Axis, ...],
    protect_first: int = 0,
    protect_last: int = 0,
    progress: bool = True,
) -> Masks:
    """abs(Σ w·∂L/∂w) of every row or column that a unit owns, summed (Ma et al., NeurIPS 2023, section 3.2).

    The published vector-wise importance to first order with sum aggregation: signed within a row or column (a row
    of gate, up, q, k and v with its bias, a column of down and o), absolute over them, and the same share in every
    layer that is not protected (the published block-wise runs keep the first four and the last two of 32).

    Departures: L is the mean over the calibration windows; heads are pooled over whole groups; `hidden` has the
    embedding, the head and the norms among its weights too.
    """
    scores = llm_pruner_scores(model, topology, input_ids, axes, progress)
    return allocate_uniform(topology, scores, target_sparsity, axes, protect_first, protect_last)


def llm_pruner_scores(
    model: nn.Module, topology: Topology, input_ids: Tensor, axes: tuple[Axis, ...], progress: bool = True
) -> Scores:
    """float32 per axis in play, shapes of `Topology.gate_shape`, >= 0."""
    products = signed_products(model, topology, input_ids, axes, progress)
    return pool(topology, {key: values.abs() for key, values in products.items()}, axes)


def nirvana(
    model: nn.Module,
    topology: Topology,
    input_ids: Tensor,
    target_sparsity: float,
    axes: tuple[Axis, ...],
    objective: Objective = "logits",
    mlp_to_attention: float = 1.0,
    candidates: int = 1,
    kl_windows: int = 8,
    layers_at_once: int | None = None,
    progress: bool = True,
) -> Masks:
    """Σ abs(w·g) over every weight a unit owns (Ai et al. 2025, the neural tangent kernel under sign descent).

    As published, g is the gradient of the network's output (the largest logit of each vocabulary entry in a window,
    averaged), not of a loss; heads and intermediate units are ranked apart, each over all layers, and the shares
    dropped of the two are in the ratio gamma (`mlp_to_attention`); no layer loses its last unit. The
    calibration windows can be chosen among candidate sets: the one whose masks leave the output's
    distribution nearest to the dense model's.

    Departures: the gradient is that of the mean over windows in float32; `hidden` is ranked beside the two, over
    the embedding, the head and the norms too; KL is measured on windows spread over all candidates.

    Args:
        candidates: disjoint runs of windows to choose among; 1 = all windows together, no choice.
        kl_windows: windows that the choice is measured on.

    Raises:
        ValueError: more candidates than windows.
    """
    if candidates > len(input_ids):
        raise ValueError(f"learn_masks: nirvana chooses among {candidates} candidates, from {len(input_ids)} windows")
    best: tuple[float, Masks] | None = None
    for windows in input_ids.tensor_split(candidates):
        scores = nirvana_scores(model, topology, windows, axes, objective, layers_at_once, progress)
        masks = allocate_balanced(topology, scores, target_sparsity, axes, mlp_to_attention, keep_one=True)
        if candidates == 1:
            return masks
        spread = torch.linspace(0, len(input_ids) - 1, min(kl_windows, len(input_ids))).long()
        divergence = _divergence(model, topology, masks, input_ids[spread], progress)
        if best is None or divergence < best[0]:
            best = (divergence, masks)
    assert best is not None
    return best[1]


def nirvana_scores(
    model: nn.Module,
    topology: Topology,
    input_ids: Tensor,
    axes: tuple[Axis, ...],
    objective: Objective = "logits",
    layers_at_once: int | None = None,
    progress: bool = True,
) -> Scores:
    """float32 per axis in play, shapes of `Topology.gate_shape`, >= 0."""
    return pool(topology, absolute_products(model, input_ids, axes, objective, layers_at_once, progress), axes)


@torch.no_grad()
def _divergence(model: nn.Module, topology: Topology, masks: Masks, input_ids: Tensor, progress: bool) -> float:
    """Mean KL(dense ‖ masked) per token, in nats."""
    device = next(model.parameters()).device
    head = lm_head(model).weight.detach()
    gates = {axis: gate.to(device) for axis, gate in hard_gates(masks.keep).items()}
    total = 0.0
    with GatedModel(model, topology).inserted() as gated:
        for row in tqdm(input_ids.long().to(device).split(1), desc="calibration choice", disable=not progress):
            gated.clear()
            dense = decoder(model)(input_ids=row, use_cache=False).last_hidden_state[0]
            gated.set(gates, kept_hidden=int(masks.keep["hidden"].sum()))
            masked = decoder(model)(input_ids=row, use_cache=False).last_hidden_state[0]
            labels = next_token_labels(row)
            parts = distillation_loss(masked, head, dense, head, labels, KL_ALONE)
            total += float(parts.distillation)
    return total / len(input_ids)
