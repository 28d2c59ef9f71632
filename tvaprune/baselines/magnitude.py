"""Pruning without calibration: random scores and weight magnitudes."""

import torch
from torch import nn

from tvaprune.architecture.topology import Axis, Topology, cut
from tvaprune.baselines.activations import column_sums, per_unit
from tvaprune.baselines.allocation import Scores, allocate_uniform
from tvaprune.baselines.problem import Problem
from tvaprune.masks.masks import Masks
from tvaprune.options.baselines import MagnitudeOptions, RandomOptions


def random(problem: Problem, options: RandomOptions) -> Masks:
    """Uniform noise, the same share in every layer: the lowest bar for any score."""
    generator = torch.Generator().manual_seed(problem.seed)
    scores = {axis: torch.rand(problem.topology.gate_shape(axis), generator=generator) for axis in problem.axes}
    return allocate_uniform(problem.topology, scores, problem.target_sparsity)


def magnitude(problem: Problem, options: MagnitudeOptions) -> Masks:
    """Σ_i W_ij² of the module that reads the unit; for a residual dimension, of every weight that `cut` gives it.

    Han et al. 2015 by units (Li et al. 2017), the same share in every layer.
    """
    scores = magnitude_scores(problem.model, problem.topology, problem.axes)
    return allocate_uniform(problem.topology, scores, problem.target_sparsity)


@torch.no_grad()
def magnitude_scores(model: nn.Module, topology: Topology, axes: tuple[Axis, ...]) -> Scores:
    """float32 per axis in play, shapes of `Topology.gate_shape`, >= 0."""
    scores: Scores = {}
    for axis in axes:
        if axis == "hidden":
            scores[axis] = torch.zeros(topology.hidden, device=next(model.parameters()).device)
            # A tied head is one parameter with the embedding, and is listed once.
            for name, parameter in model.named_parameters():
                for dim, of in enumerate(cut(name).axes):
                    if of == axis:
                        squares = parameter.float().square()
                        scores[axis] += squares.movedim(dim, 0).reshape(topology.hidden, -1).sum(1)
        else:
            scores[axis] = per_unit(topology, axis, column_sums(model, axis, lambda w: w.float().square()))
    return scores
