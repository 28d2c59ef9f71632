"""NIRVANA: absolute products of weights and gradients of the output."""

from dataclasses import replace

import torch

from tvaprune.architecture.topology import lm_head
from tvaprune.baselines.allocation import Scores, allocate_balanced
from tvaprune.baselines.gradients import absolute_products, pool
from tvaprune.baselines.problem import Problem, drop_units
from tvaprune.gates.insertion import GatedModel
from tvaprune.losses import KL_ALONE, distillation_loss, next_token_labels
from tvaprune.masks.masks import Masks
from tvaprune.options.baselines import NirvanaOptions


def nirvana(problem: Problem, options: NirvanaOptions) -> Masks:
    """Σ abs(w·g) over every weight a unit owns (Ai et al. 2025, the neural tangent kernel under sign descent).

    As published (iDEA-iSAIL-Lab-UIUC/NIRVANA a6094c9, Llama/main.py): g is the gradient of the network's output (the
    largest logit of each vocabulary entry in a window, averaged; line 221), not of a loss; heads are pooled over
    their group (225-266); heads and intermediate units have a threshold each, over all layers (300-303), and the shares
    dropped of the two are in the ratio gamma (`mlp_to_attention`; 289-296). The windows are divided into candidate
    sets; the set whose masks have the lowest KL to the dense model's predictions is used (402-420). The published runs
    set gamma 3.36 for 8B and 3.0 for 3B, take 4096 tokens a set, measure the KL on 8192 tokens and name the chosen
    seed, but not how many were tried.

    Departures: the gradient is that of the mean over windows in float32; a layer that would lose all its heads keeps
    its best, where the published code keeps its last (line 121); intermediate widths are not rounded to multiples of 8
    here, because a later stage adapts them; `hidden` is ranked as a third axis, over the embedding, the head and the
    norms too; KL is measured on windows spread over all candidates.

    Raises:
        ValueError: more candidates than windows.
    """
    windows, candidates = problem.windows, options.candidates
    if candidates > len(windows):
        raise ValueError(f"learn_masks: nirvana chooses among {candidates} candidates, from {len(windows)} windows")
    found = []
    for part in windows.tensor_split(candidates):
        scores = nirvana_scores(replace(problem, windows=part), options)
        found.append(allocate_balanced(problem.topology, scores, problem.target_sparsity, options.mlp_to_attention))
    if candidates == 1:
        return found[0]
    spread = torch.linspace(0, len(windows) - 1, min(options.kl_windows, len(windows))).long()
    return min(found, key=lambda masks: divergence(replace(problem, windows=windows[spread]), masks))


def nirvana_scores(problem: Problem, options: NirvanaOptions) -> Scores:
    """float32 per pruned axis, shapes of `Topology.gate_shape`, >= 0."""
    return pool(problem, absolute_products(problem, options.objective, options.layers_at_once))


@torch.no_grad()
def divergence(problem: Problem, masks: Masks) -> float:
    """Mean KL(dense ‖ masked) per token, in nats."""
    head = lm_head(problem.model).weight.detach()
    total = 0.0
    with GatedModel(problem.model, problem.topology).inserted() as gated:
        for window in problem.each_window("calibration choice"):
            gated.clear()
            dense = problem.forward(window)
            drop_units(gated, masks.keep)
            masked, labels = problem.forward(window), next_token_labels(window)
            parts = distillation_loss(masked, head, dense, head, labels, KL_ALONE)
            total += float(parts.distillation)
    return total / len(problem.windows)
