"""LLM-Pruner: signed products of weights and gradients."""

from tvaprune.baselines.allocation import Scores, allocate_uniform
from tvaprune.baselines.gradients import pool, signed_products
from tvaprune.baselines.problem import Problem
from tvaprune.masks.masks import Masks
from tvaprune.options.baselines import LlmPrunerOptions


def llm_pruner(problem: Problem, options: LlmPrunerOptions) -> Masks:
    """abs(Σ w·∂L/∂w) of every row or column that a unit owns, summed (Ma et al., NeurIPS 2023, section 3.2).

    The published vector-wise importance to first order with sum aggregation: signed within a row or column (a row
    of gate, up, q, k and v with its bias, a column of down and o), absolute over them, and the same share in every
    layer that is not protected (the published block-wise runs keep the first four and the last two of 32).

    Departures: L is the mean over the calibration windows; heads are pooled over whole groups; `hidden` has the
    embedding, the head and the norms among its weights too.
    """
    scores, protect = llm_pruner_scores(problem), (options.protect_first, options.protect_last)
    return allocate_uniform(problem.topology, scores, problem.target_sparsity, *protect)


def llm_pruner_scores(problem: Problem) -> Scores:
    """float32 per axis in play, shapes of `Topology.gate_shape`, >= 0."""
    return pool(problem, {key: values.abs() for key, values in signed_products(problem).items()})
