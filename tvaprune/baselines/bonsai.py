"""Bonsai: which units matter, by regressing the loss of random sub-models on what they keep. Forward passes only."""

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tvaprune.architecture.parameter_counts import unit_costs
from tvaprune.architecture.topology import AXES, Axis, Topology, decoder, lm_head
from tvaprune.baselines.activation_scores import wanda_scores
from tvaprune.baselines.activations import input_statistics
from tvaprune.baselines.allocation import Scores, Stages, percentiles
from tvaprune.gates.insertion import GatedModel, hard_gates
from tvaprune.losses import cross_entropy, next_token_labels
from tvaprune.masks.masks import Masks
from tvaprune.masks.projection import UnreachableSparsityError, project


def bonsai(
    model: nn.Module,
    topology: Topology,
    input_ids: Tensor,
    target_sparsity: float,
    axes: tuple[Axis, ...],
    rounds: int = 4,
    submodels: int = 32,
    windows_per_submodel: int = 1,
    prior_windows: int = 8,
    ridge: float = 1.0,
    seed: int = 0,
    progress: bool = True,
) -> Masks:
    """Prune in rounds by perturbation (Dery et al. 2024, sections 3.1 to 3.3).

    A round takes an equal part of the target. Of the units left, those with the lowest prior (Wanda-sp, the same
    share of every layer), worth twice the round's parameters, are candidates; each sub-model drops a random half
    of them and the next its complement; ridge regression of minus the loss on the candidates kept gives each one's
    utility; the lowest go.

    Departures: utilities are compared per parameter, because heads and intermediate units meet in one budget (the
    published code prunes the two apart); a sub-model is masks on the model, not another model.

    Cost in forward passes: rounds · (prior_windows + submodels · windows_per_submodel).

    Args:
        submodels: per round, complements counted; even.
        ridge: strength, in units of the mean square of a centred row of the design.
    """
    if submodels < 2 or submodels % 2:
        raise ValueError(f"learn_masks: bonsai's submodels = {submodels}: pairs of complements need an even number")
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    windows = input_ids.long().to(device)
    costs = _costs(topology, axes)
    stages = Stages(topology, axes)
    bar = tqdm(total=rounds * submodels, desc="sub-models", disable=not progress)
    with GatedModel(model, topology).inserted() as gated, bar:
        for index in range(rounds):
            before, after = (target_sparsity * part / rounds for part in (index, index + 1))
            _set(gated, stages.keep, device)
            statistics = input_statistics(model, topology, _draw(windows, prior_windows, generator), progress=False)
            prior = wanda_scores(model, topology, statistics, axes)
            ranked = {axis: percentiles(prior[axis].cpu().where(stages.keep[axis], -torch.inf)) for axis in axes}
            candidates = _candidates(topology, stages.keep, ranked, before + 2 * (after - before), axes)
            chosen = _draw(windows, windows_per_submodel, generator)
            designs, losses = [], []
            for _ in range(submodels // 2):
                half = _half(candidates, generator)
                for design in (half, ~half):
                    _set(gated, _submodel(topology, stages.keep, candidates, design, axes), device)
                    designs.append(design)
                    losses.append(_loss(model, chosen))
                    bar.update()
            utility = ridge_utility(torch.stack(designs), -torch.tensor(losses, dtype=torch.float64), ridge)
            stages.prune(_scores(candidates, utility, costs, ranked, axes), after)
    return stages.masks()


def ridge_utility(kept: Tensor, utility: Tensor, ridge: float) -> Tensor:
    """beta of min ‖y - Z beta‖² + c ‖beta‖², both centred, in the dual form (sub-models are fewer than units).

    Args:
        kept: bool [submodels, units].
        utility: float64 [submodels].
        ridge: c in units of the mean diagonal of Z Zᵀ.

    Returns:
        float64 [units]; higher = its presence lowers the loss more.
    """
    design = kept.double() - kept.double().mean(0)
    target = utility - utility.mean()
    gram = design @ design.T
    strength = ridge * gram.diagonal().mean().clamp_min(1e-12)
    return design.T @ torch.linalg.solve(gram + strength * torch.eye(len(gram), dtype=gram.dtype), target)


def _candidates(
    topology: Topology, keep: dict[Axis, Tensor], ranked: Scores, sparsity: float, axes: tuple[Axis, ...]
) -> dict[Axis, Tensor]:
    """The units left whose prior a threshold at this sparsity would drop: bool per axis in play."""
    dense = Masks.dense(topology)
    scores = {axis: ranked[axis].where(keep[axis], -torch.inf) for axis in axes}
    try:
        lower = project(topology, Masks(keep, {**dense.score, **scores}), sparsity, axes).keep
    except UnreachableSparsityError:
        return {axis: keep[axis] for axis in axes}
    return {axis: keep[axis] & ~lower[axis] for axis in axes}


def _half(candidates: dict[Axis, Tensor], generator: torch.Generator) -> Tensor:
    """A random half of each axis's candidates: bool [units], axes in order."""
    halves = []
    for mask in candidates.values():
        count = int(mask.sum())
        half = torch.zeros(count, dtype=torch.bool)
        half[torch.randperm(count, generator=generator)[: count // 2]] = True
        halves.append(half)
    return torch.cat(halves)


def _submodel(
    topology: Topology, keep: dict[Axis, Tensor], candidates: dict[Axis, Tensor], design: Tensor, axes: tuple[Axis, ...]
) -> dict[Axis, Tensor]:
    """What is left, with the candidates as in the design."""
    parts = design.split([int(candidates[axis].sum()) for axis in axes])
    changed = {axis: keep[axis].clone() for axis in AXES}
    for axis, part in zip(axes, parts, strict=True):
        changed[axis][candidates[axis]] = part
    return changed


def _scores(
    candidates: dict[Axis, Tensor], utility: Tensor, costs: dict[Axis, Tensor], ranked: Scores, axes: tuple[Axis, ...]
) -> Scores:
    """Candidates by utility per parameter in (0, 1), all others above them by their prior in (1, 2)."""
    parts = utility.split([int(candidates[axis].sum()) for axis in axes])
    per_parameter = [
        part / costs[axis].expand_as(candidates[axis])[candidates[axis]] for axis, part in zip(axes, parts, strict=True)
    ]
    places = percentiles(torch.cat(per_parameter)).split([len(part) for part in parts])
    scores = {axis: 1 + ranked[axis] for axis in axes}
    for axis, place in zip(axes, places, strict=True):
        scores[axis][candidates[axis]] = place
    return scores


def _costs(topology: Topology, axes: tuple[Axis, ...]) -> dict[Axis, Tensor]:
    """Parameters of one unit of a dense layer: float64 [layers, 1] per axis in play."""
    full = [torch.tensor(float(topology.hidden))]
    full += [torch.full((topology.layers,), float(topology.width(axis))) for axis in AXES[1:]]
    costs = dict(zip(AXES, unit_costs(topology, *full), strict=True))
    return {axis: costs[axis][:, None] for axis in axes}


def _draw(windows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return windows[torch.randperm(len(windows), generator=generator)[:count].to(windows.device)]


def _set(gated: GatedModel, keep: dict[Axis, Tensor], device: torch.device) -> None:
    gates = {axis: gate.to(device) for axis, gate in hard_gates(keep).items()}
    gated.set(gates, kept_hidden=gated.topology.hidden)


@torch.no_grad()
def _loss(model: nn.Module, windows: Tensor) -> float:
    """Mean cross-entropy per token, nats."""
    head = lm_head(model).weight.detach()
    total = 0.0
    for window in windows.split(1):
        hidden = decoder(model)(input_ids=window, use_cache=False).last_hidden_state[0]
        total += float(cross_entropy(hidden, head, next_token_labels(window)))
    return total / len(windows)
