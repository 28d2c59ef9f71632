"""Pruning without calibration: random scores and weight magnitudes."""

import torch
from torch import nn

from tvaprune.architecture.topology import Topology, cut
from tvaprune.baselines.allocation import Scores, allocate_uniform
from tvaprune.baselines.problem import Problem
from tvaprune.masks.masks import Masks
from tvaprune.options.axes import Axis
from tvaprune.options.baselines import MagnitudeOptions, RandomOptions


def random(problem: Problem, options: RandomOptions) -> Masks:
    """Uniform noise, the same share in every open layer: the lowest bar for any score.

    LLM-Pruner's `--pruner_type random` (horseee/LLM-Pruner 128a07d, hf_prune.py:83), with the layers that its
    script leaves open.
    """
    generator = torch.Generator().manual_seed(problem.seed)
    scores = {axis: torch.rand(problem.topology.gate_shape(axis), generator=generator) for axis in problem.axes}
    protect = (options.protect_first, options.protect_last)
    return allocate_uniform(problem.topology, scores, problem.target_sparsity, *protect)


def magnitude(problem: Problem, options: MagnitudeOptions) -> Masks:
    """Σ w² over every weight that `cut` gives the unit, the same share in every open layer.

    Han et al. 2015 by units (Li et al. 2017), as LLM-Pruner's `--pruner_type l2` (horseee/LLM-Pruner 128a07d,
    LLMPruner/pruner/hf_llama_pruner.py:131-213), with the layers that its script leaves open. The published mean over
    the matrices differs from the sum by one factor per axis, which changes no ranking.

    Departures: heads are pooled over whole groups; biases and, for `hidden`, norms and the head count too.
    """
    scores = magnitude_scores(problem.model, problem.topology, problem.axes)
    protect = (options.protect_first, options.protect_last)
    return allocate_uniform(problem.topology, scores, problem.target_sparsity, *protect)


@torch.no_grad()
def magnitude_scores(model: nn.Module, topology: Topology, axes: tuple[Axis, ...]) -> Scores:
    """float32 per pruned axis, shapes of `Topology.gate_shape`, >= 0; on the CPU."""
    scores: Scores = {axis: torch.zeros(topology.gate_shape(axis)) for axis in axes}
    # A tied head is one parameter with the embedding, and is listed once.
    for name, parameter in model.named_parameters():
        where = cut(name)
        for dim, axis in enumerate(where.axes):
            if axis in scores:
                squares = parameter.float().square().movedim(dim, 0).reshape(topology.width(axis), -1).sum(1)
                scores[axis][... if axis == "hidden" else where.layer] += squares.cpu()
    return scores
