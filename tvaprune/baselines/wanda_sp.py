"""Wanda-sp: weight magnitudes times the norms of their inputs."""

from collections.abc import Sequence

import torch

from tvaprune.architecture.topology import LayerModules, layer_modules
from tvaprune.baselines.activations import (
    Collector,
    InputStatistics,
    column_sums,
    input_statistics,
    layer_by_layer,
    per_unit,
)
from tvaprune.baselines.allocation import Scores, allocate_uniform, widths_of_uniform_share
from tvaprune.baselines.problem import Problem, drop_units
from tvaprune.gates.insertion import GatedModel
from tvaprune.masks.masks import Masks
from tvaprune.masks.projection import keep_best
from tvaprune.options.axes import Axis
from tvaprune.options.baselines import WandaSpOptions


def wanda_sp(problem: Problem, options: WandaSpOptions) -> Masks:
    """Σ_i abs(W_ij) · ‖X_j‖₂ of o_proj and down_proj, the same share in every layer.

    Wanda (Sun et al., ICLR 2024), structured as Wanda-sp in An et al. (AAAI 2024) and its code (FLAP 3bb57db,
    lib/prune.py:413-484). A head's score is the sum of its inputs' (467). As published, a layer's units are dropped
    before the next layer's inputs are collected (479-482); `sequential` False collects all inputs from the dense model.

    Departures: heads are pooled over whole groups; the published code knows no groups. Sums stand in for its means
    over W's rows and for its norm per window, which changes no ranking.
    """
    if options.sequential:
        scores = sequential_wanda_scores(problem)
    else:
        scores = wanda_scores(problem, input_statistics(problem))
    return allocate_uniform(problem.topology, scores, problem.target_sparsity)


def wanda_scores(
    problem: Problem, statistics: dict[Axis, InputStatistics], layers: Sequence[LayerModules] | None = None
) -> Scores:
    """float32 [layers, units] per pruned axis, >= 0, of the layers that the statistics are of; None = all."""
    layers = list(layer_modules(problem.model)) if layers is None else layers
    scores: Scores = {}
    for axis in problem.axes:
        magnitudes = column_sums(layers, axis, lambda w: w.float().abs())
        scores[axis] = per_unit(problem.topology, axis, magnitudes * statistics[axis].norm.float()).sum(-1)
    return scores


@torch.no_grad()
def sequential_wanda_scores(problem: Problem) -> Scores:
    """Scores of each layer's units where all layers before it are pruned: float32 [layers, units], >= 0.

    Heads and intermediate units of a layer are scored in one pass of the layer, whole, and then dropped together.
    Memory: the hidden states of all windows.
    """
    topology = problem.topology
    widths = widths_of_uniform_share(topology, problem.axes, problem.target_sparsity)
    keep = Masks.dense(topology).keep
    scores: Scores = {axis: torch.zeros(topology.gate_shape(axis)) for axis in problem.axes}
    with GatedModel(problem.model, topology).inserted() as gated:
        for index, modules, pass_windows in layer_by_layer(problem):
            collector = Collector([modules])
            with collector.attached():
                pass_windows()
            for axis, found in wanda_scores(problem, collector.statistics(), [modules]).items():
                scores[axis][index] = found[0].cpu()
                keep[axis][index] = keep_best(scores[axis][index], int(widths[axis][index]))
            drop_units(gated, keep)
    return scores
