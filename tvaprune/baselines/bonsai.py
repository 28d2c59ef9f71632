"""Bonsai: which units matter, by regressing the loss of random sub-models on what they keep. Forward passes only."""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from tvaprune.architecture.parameter_counts import dense_unit_costs
from tvaprune.architecture.topology import Axis
from tvaprune.baselines.activations import input_statistics
from tvaprune.baselines.allocation import Keep, Scores, Stages, percentiles
from tvaprune.baselines.problem import Problem, drop_units
from tvaprune.baselines.wanda_sp import wanda_scores
from tvaprune.gates.insertion import GatedModel
from tvaprune.masks.masks import Masks
from tvaprune.masks.projection import UnreachableSparsityError, project
from tvaprune.options.baselines import BonsaiOptions


@torch.no_grad()
def bonsai(problem: Problem, options: BonsaiOptions) -> Masks:
    """Prune in rounds by perturbation (Dery et al. 2024, sections 3.1 to 3.3).

    A round takes an equal part of the target. Of the units left, those with the lowest prior (Wanda-sp, the same share
    of every layer), worth twice the round's parameters, are candidates; each sub-model drops a random half of them and
    the next its complement; ridge regression of minus the loss on the candidates kept gives each one's utility; the
    lowest go. Cost in forward passes: rounds · (prior_windows + submodels · submodel_windows).

    Departures: utilities are compared per parameter, because heads and intermediate units share one budget (the
    published code prunes the two separately); a sub-model is masks on the model, not another model.
    """
    submodels = options.submodels
    if submodels < 2 or submodels % 2:
        raise ValueError(f"learn_masks: bonsai's submodels = {submodels}: pairs of complements need an even number")
    generator = torch.Generator().manual_seed(problem.seed)
    stages = Stages(problem.topology, problem.axes)
    bar = tqdm(total=options.rounds * submodels, desc="sub-models", disable=not problem.progress)
    with GatedModel(problem.model, problem.topology).inserted() as gated, bar:
        for index in range(options.rounds):
            before, after = (problem.target_sparsity * part / options.rounds for part in (index, index + 1))
            drop_units(gated, stages.keep)
            of_prior = _draw(problem, options.prior_windows, generator)
            prior = wanda_scores(of_prior, input_statistics(of_prior))
            ranked = {axis: percentiles(prior[axis].cpu().where(stages.keep[axis], -torch.inf)) for axis in prior}
            candidates = _candidates(problem, stages.keep, ranked, before + 2 * (after - before))
            of_submodels = _draw(problem, options.submodel_windows, generator)
            designs, losses = [], []
            for _ in range(submodels // 2):
                half = _half(candidates, generator)
                for design in (half, ~half):
                    drop_units(gated, _submodel(stages.keep, candidates, design))
                    designs.append(design)
                    losses.append(_mean_loss(of_submodels))
                    bar.update()
            utility = ridge_utility(torch.stack(designs), -torch.tensor(losses, dtype=torch.float64), options.ridge)
            stages.prune(_scores(problem, candidates, utility, ranked), after)
    return stages.masks()


def ridge_utility(
    kept: Bool[Tensor, "submodels units"], utility: Float[Tensor, " submodels"], ridge: float
) -> Float[Tensor, " units"]:
    """beta of min ‖y - Z beta‖² + c ‖beta‖², both centred, in the dual form (sub-models are fewer than units); float64.

    y (`utility`) is minus the loss, so a higher beta = the unit's presence lowers the loss more. `ridge` is c in units
    of the mean diagonal of Z Zᵀ.
    """
    design = kept.double() - kept.double().mean(0)
    target = utility - utility.mean()
    gram = design @ design.T
    strength = ridge * gram.diagonal().mean().clamp_min(1e-12)
    return design.T @ torch.linalg.solve(gram + strength * torch.eye(len(gram), dtype=gram.dtype), target)


def _candidates(problem: Problem, keep: Keep, ranked: Scores, sparsity: float) -> Keep:
    """The units left whose prior a threshold at this sparsity would drop: bool per axis in play."""
    dense = Masks.dense(problem.topology)
    scores = {axis: rank.where(keep[axis], -torch.inf) for axis, rank in ranked.items()}
    try:
        lower = project(problem.topology, Masks(keep, {**dense.score, **scores}), sparsity, problem.axes).keep
    except UnreachableSparsityError:
        return {axis: keep[axis] for axis in ranked}
    return {axis: keep[axis] & ~lower[axis] for axis in ranked}


def _half(candidates: Keep, generator: torch.Generator) -> Bool[Tensor, " candidates"]:
    """A random half of each axis's candidates."""
    counts = [int(mask.sum()) for mask in candidates.values()]
    return torch.cat([torch.randperm(count, generator=generator).argsort() < count // 2 for count in counts])


def _by_axis(candidates: Keep, values: Tensor) -> dict[Axis, Tensor]:
    """Split values [candidates] into the axes."""
    parts = values.split([int(mask.sum()) for mask in candidates.values()])
    return dict(zip(candidates, parts, strict=True))


def _submodel(keep: Keep, candidates: Keep, design: Bool[Tensor, " candidates"]) -> Keep:
    """The units left, with the candidates as in the design."""
    changed = {axis: mask.clone() for axis, mask in keep.items()}
    for axis, part in _by_axis(candidates, design).items():
        changed[axis][candidates[axis]] = part
    return changed


def _scores(problem: Problem, candidates: Keep, utility: Float[Tensor, " candidates"], ranked: Scores) -> Scores:
    """Candidates by utility per parameter in (0, 1), all others above them by their prior in (1, 2)."""
    costs = dense_unit_costs(problem.topology)
    per_parameter = [
        part / getattr(costs, axis)[:, None].expand_as(candidates[axis])[candidates[axis]]
        for axis, part in _by_axis(candidates, utility).items()
    ]
    scores = {axis: 1 + rank for axis, rank in ranked.items()}
    for axis, part in _by_axis(candidates, percentiles(torch.cat(per_parameter))).items():
        scores[axis][candidates[axis]] = part
    return scores


def _draw(problem: Problem, count: int, generator: torch.Generator) -> Problem:
    """The problem on some of its windows, without a progress bar of its own."""
    drawn = torch.randperm(len(problem.windows), generator=generator)[:count]
    return replace(problem, windows=problem.windows[drawn], progress=False)


def _mean_loss(problem: Problem) -> float:
    return sum(float(problem.loss(window)) for window in problem.each_window("")) / len(problem.windows)
