"""LLM-Pruner: products of weights and gradients."""

from tvaprune.baselines.allocation import Scores, allocate_uniform
from tvaprune.baselines.gradients import absolute_products, pool, signed_products
from tvaprune.baselines.problem import Problem
from tvaprune.masks.masks import Masks
from tvaprune.options.baselines import LlmPrunerOptions


def llm_pruner(problem: Problem, options: LlmPrunerOptions) -> Masks:
    """Σ abs(w·∂L/∂w) over every weight that a unit owns, the same share in every open layer (Ma et al., NeurIPS 2023).

    The published block-wise run (horseee/LLM-Pruner 128a07d, scripts/llama_prune.sh): importance `param_first`, layers
    5 to 30 of 32 open, one gradient of the mean loss over all windows (hf_prune.py:146-148), summed over a unit's rows
    of q, k, v, gate and up and columns of o and down (LLMPruner/pruner/hf_llama_pruner.py:266-292). `vectorize`
    is the paper's vector-wise importance: abs(Σ w·∂L/∂w) of every row and column, summed (275-276, 285-286).

    Departures: heads are pooled over whole groups, where the published code adds query heads h, h + kv_heads, ... to
    key-value head h (334-336); the target is a share of the decoder's parameters, not of the open layers' units; a
    row's bias counts; `hidden` has the embedding, the head and the norms among its weights too (the published
    channel-wise run stops with an error at `param_first`, 323).
    """
    scores, protect = llm_pruner_scores(problem, options), (options.protect_first, options.protect_last)
    return allocate_uniform(problem.topology, scores, problem.target_sparsity, *protect)


def llm_pruner_scores(problem: Problem, options: LlmPrunerOptions) -> Scores:
    """float32 per pruned axis, shapes of `Topology.gate_shape`, >= 0."""
    if options.importance == "param_first":
        return pool(problem, absolute_products(problem, "loss", options.layers_at_once))
    return pool(problem, {key: values.abs() for key, values in signed_products(problem).items()})
