"""Wanda-sp: weight magnitudes times the norms of their inputs."""

from tvaprune.architecture.topology import Axis
from tvaprune.baselines.activations import InputStatistics, column_sums, input_statistics, per_unit
from tvaprune.baselines.allocation import Scores, allocate_uniform
from tvaprune.baselines.problem import Problem
from tvaprune.masks.masks import Masks
from tvaprune.options.baselines import WandaSpOptions


def wanda_sp(problem: Problem, options: WandaSpOptions) -> Masks:
    """Σ_i abs(W_ij) · ‖X_j‖₂, the same share in every layer.

    Wanda (Sun et al., ICLR 2024), structured as Wanda-sp in An et al. (AAAI 2024).
    """
    scores = wanda_scores(problem, input_statistics(problem))
    return allocate_uniform(problem.topology, scores, problem.target_sparsity)


def wanda_scores(problem: Problem, statistics: dict[Axis, InputStatistics]) -> Scores:
    """float32 [layers, units] per axis in play, >= 0."""
    scores: Scores = {}
    for axis in problem.axes:
        magnitudes = column_sums(problem.model, axis, lambda w: w.float().abs())
        scores[axis] = per_unit(problem.topology, axis, magnitudes * statistics[axis].norm.float())
    return scores
