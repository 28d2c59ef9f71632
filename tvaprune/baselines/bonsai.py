"""Bonsai: which units matter, by regressing the perplexity of random sub-models on what they keep."""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tvaprune.architecture.parameter_counts import dense_decoder_parameters, kept_decoder_parameters
from tvaprune.architecture.topology import layer_modules
from tvaprune.baselines.activations import column_sums, input_statistics, per_unit
from tvaprune.baselines.allocation import Keep, Scores, StagedPruning, percentiles, percentiles_over_layers
from tvaprune.baselines.bonsai_fit import fit_coefficients
from tvaprune.baselines.problem import Problem, drop_units
from tvaprune.gates.insertion import GatedModel
from tvaprune.masks.masks import Masks
from tvaprune.masks.projection import solve_threshold
from tvaprune.options.axes import AXES, Axis
from tvaprune.options.baselines import BonsaiOptions
from tvaprune.progress import Progress

LARGEST_PERPLEXITY = 1e8


@dataclass(frozen=True)
class Module:
    """What a mask is drawn for: the intermediate units or the heads that one layer has left, or narrow layers together.

    Units are flat indices into the axis, layer · width + unit.
    """

    axis: Axis
    candidates: Int[Tensor, " candidates"]  # the others are in every sub-model
    probability: Float[Tensor, " candidates"]  # float64, sum 1: of being drawn to be dropped
    dropped: int  # candidates that a mask drops; its complement drops the others


@torch.no_grad()
def bonsai(problem: Problem, options: BonsaiOptions) -> Masks:
    """Prune in rounds by perturbation (Dery et al. 2024, sections 3.1 to 3.3), with the published algorithm.

    ldery/Bonsai 2f911d7, main.py. A round removes `prune_frac` of the decoder's parameters (line 335). The best
    1 - 2 · `prune_frac` of a module's units by the prior are in every sub-model (177-198); a mask drops `prune_frac` of
    the module's units among the others, and the next is its complement (29-55); `fit_coefficients` regresses minus the
    perplexity on what is kept, all modules at once; the lowest coefficients go, over all layers and axes (318-346).
    Cost in forward passes of a window: rounds · (prior_windows + submodels · submodel_windows). Published:
    prune_frac 0.05, 200 sub-models, 32 windows of 4096 tokens for them and for the prior.

    Departures:
    - The budget is exact; the published code stops within 0.02 of the target.
    - Heads are whole groups. Published heads are of models without groups, 32 a layer. A layer with so few heads that
      fewer than two are candidates cannot be halved: its only candidate would go in every mask and stay in every
      complement, in all such layers at once. Their heads are one module over layers, priors relative to a layer's mean.
    - A round whose candidates own less than `prune_frac` of the parameters drops them all, and another round follows.
    - A sub-model is masks on the model, not another model; utilities are those of windows drawn for each round.
    """
    submodels = options.submodels
    topology, target = problem.topology, problem.target_sparsity
    dense = {axis: torch.full(topology.gate_shape(axis), 1.0 if axis in problem.axes else torch.inf) for axis in AXES}
    solve_threshold(topology, dense, target)  # raises now if the target is out of reach
    generator = torch.Generator().manual_seed(problem.seed)
    stages, done = StagedPruning(topology, problem.axes), 0.0
    total = math.ceil(target / options.prune_frac) * submodels
    bar = Progress(total=total, desc="sub-models", disable=not problem.progress)
    with GatedModel(problem.model, topology).inserted() as gated, bar:
        while target - done > 1e-9:
            share = min(options.prune_frac, target - done)
            drop_units(gated, stages.keep)
            prior = prior_scores(_draw(problem, options.prior_windows, generator))
            modules = candidate_modules(prior, stages.keep, share)
            of_submodels = _draw(problem, options.submodel_windows, generator)
            designs, utilities = [], []
            for _ in range(submodels // 2):
                mask = draw_mask(modules, generator)
                for kept in (mask, ~mask):
                    drop_units(gated, submodel(stages.keep, modules, kept))
                    designs.append(kept)
                    utilities.append(-perplexity(of_submodels))
                    bar.update()
            found = torch.stack(designs), torch.tensor(utilities, dtype=torch.float64)
            coefficients = fit_coefficients(*found, generator)
            least = submodel(stages.keep, modules, torch.zeros_like(designs[0]))
            reachable = 1 - kept_decoder_parameters(topology, least) / dense_decoder_parameters(topology)
            done = min(done + share, reachable)
            stages.prune(scores_of_round(prior, modules, coefficients), done)
    return stages.masks()


@torch.no_grad()
def prior_scores(problem: Problem) -> Scores:
    """Mean over windows of mean_i abs(W_ij) · rms(X_j), for a head the mean over its inputs: float32, >= 0.

    lib/modelling_llama_mod.py:257-261 and 320-322 of ldery/Bonsai 2f911d7; windows are averaged in main.py:122-131.
    """
    rms = {axis: torch.zeros(()) for axis in problem.axes}
    for window in problem.windows.split(1):
        statistics = input_statistics(replace(problem, windows=window, progress=False))
        for axis in problem.axes:
            rms[axis] = rms[axis] + statistics[axis].norm / math.sqrt(statistics[axis].tokens) / len(problem.windows)
    layers = list(layer_modules(problem.model))
    scores: Scores = {}
    for axis in problem.axes:
        magnitudes = column_sums(layers, axis, lambda w: w.double().abs() / len(w))
        scores[axis] = per_unit(problem.topology, axis, magnitudes * rms[axis]).mean(-1).float().cpu()
    return scores


def candidate_modules(prior: Scores, keep: Keep, share: float) -> list[Module]:
    """The units left that sub-models may drop: 2 · share of each module, at least one, those with the lowest prior.

    A candidate is drawn with a probability proportional to how far its prior is below its module's highest.
    """
    modules: list[Module] = []
    for axis, scores in prior.items():
        narrow: list[tuple[Tensor, Tensor]] = []
        for layer, mask in enumerate(keep[axis]):
            within = mask.nonzero().flatten()
            units, values = layer * mask.numel() + within, scores[layer][within].double()
            if _candidates(len(units), share) >= 2:
                modules.append(_module(axis, units, values, share))
            elif len(units):
                narrow.append((units, values / values.mean().clamp_min(1e-30)))
        if narrow:
            pooled, relative = (torch.cat(part) for part in zip(*narrow, strict=True))
            modules.append(_module(axis, pooled, relative, share))
    return modules


def draw_mask(modules: list[Module], generator: torch.Generator) -> Bool[Tensor, " candidates"]:
    """Which candidates, of all modules in a row, a sub-model keeps; without replacement."""
    parts = []
    for module in modules:
        kept = torch.ones(len(module.candidates), dtype=torch.bool)
        kept[torch.multinomial(module.probability, module.dropped, generator=generator)] = False
        parts.append(kept)
    return torch.cat(parts)


def submodel(keep: Keep, modules: list[Module], kept: Bool[Tensor, " candidates"]) -> Keep:
    """The units left, with the candidates as drawn."""
    changed = {axis: mask.clone() for axis, mask in keep.items()}
    for module, part in zip(modules, _by_module(modules, kept), strict=True):
        changed[module.axis].view(-1)[module.candidates] = part
    return changed


def perplexity(problem: Problem) -> float:
    """exp of the mean next-token loss over the windows, at most 1e8, also where it is not a number."""
    mean = sum(float(problem.loss(window)) for window in problem.each_window("")) / len(problem.windows)
    return math.exp(mean) if mean < math.log(LARGEST_PERPLEXITY) else LARGEST_PERPLEXITY


def _candidates(units: int, share: float) -> int:
    return units - int(units * (1.0 - 2 * share))


def _module(axis: Axis, units: Int[Tensor, " units"], prior: Float[Tensor, " units"], share: float) -> Module:
    """A module of these units, flat indices, with the prior in float64."""
    lowest = torch.sort(prior, stable=True).indices[: _candidates(len(units), share)]
    below = prior.max() - prior[lowest]
    # Units as good as the best could not be drawn at all where there are no others.
    weight = below.clamp_min(1e-9 * float(below.max())) if below.any() else torch.ones_like(below)
    return Module(axis, units[lowest], weight / weight.sum(), int(share * len(units)) + 1)


def _by_module(modules: list[Module], values: Tensor) -> tuple[Tensor, ...]:
    return values.split([len(module.candidates) for module in modules])


def scores_of_round(prior: Scores, modules: list[Module], coefficients: Float[Tensor, " candidates"]) -> Scores:
    """Candidates by coefficient in (0, 1), all others above them by their prior in (1, 2)."""
    scores = {axis: 1 + percentiles_over_layers(values) for axis, values in prior.items()}
    for module, part in zip(modules, _by_module(modules, percentiles(coefficients)), strict=True):
        scores[module.axis].view(-1)[module.candidates] = part
    return scores


def _draw(problem: Problem, count: int, generator: torch.Generator) -> Problem:
    """The problem on some of its windows, without a progress bar of its own."""
    drawn = torch.randperm(len(problem.windows), generator=generator)[:count]
    return replace(problem, windows=problem.windows[drawn], progress=False)
