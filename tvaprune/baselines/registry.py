"""Every published baseline by its name."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from tvaprune.architecture.topology import AXES, Axis, Topology
from tvaprune.baselines import activation_scores, gradient_scores
from tvaprune.baselines.bonsai import bonsai
from tvaprune.baselines.depth import depth
from tvaprune.baselines.gradients import Objective
from tvaprune.baselines.loraprune import loraprune
from tvaprune.masks.masks import Masks
from tvaprune.masks.update import WeightUpdate

Baseline = Literal["random", "magnitude", "wanda_sp", "flap", "llm_pruner", "nirvana", "bonsai", "loraprune", "depth"]
BASELINES: tuple[Baseline, ...] = get_args(Baseline)

_UNITS: tuple[Axis, ...] = ("intermediate", "kv_heads")
# The axes that a method has a score for; the others leave hidden whole.
SUPPORTED_AXES: dict[Baseline, tuple[Axis, ...]] = {
    "random": AXES,
    "magnitude": AXES,
    "wanda_sp": _UNITS,
    "flap": _UNITS,
    "llm_pruner": AXES,
    "nirvana": AXES,
    "bonsai": _UNITS,
    "loraprune": _UNITS,
    "depth": _UNITS,
}


@dataclass(frozen=True)
class BaselineOptions:
    """What the methods leave open.

    Attributes:
        windows: calibration windows to use, spread evenly over those given.
        flap_allocation: "adaptive" sets one threshold over all layers (published), "uniform" one share a layer.
        flap_bias: replace dropped inputs by their mean, as biases of o_proj and down_proj.
        protect_first, protect_last: layers that llm_pruner and loraprune leave whole at either end.
        nirvana_objective: "logits" (published) or "loss".
        nirvana_mlp_to_attention: gamma, share of intermediate units dropped over the share of kv heads dropped.
        nirvana_candidates: calibration sets to choose among by KL; 1 = no choice.
        nirvana_kl_windows: windows that the choice is measured on.
        nirvana_layers_at_once: layers whose full fp32 gradients are in memory together; None = all.
        bonsai_rounds, bonsai_submodels: rounds, and sub-models a round (even).
        bonsai_windows: windows that a sub-model's loss is measured on.
        bonsai_prior_windows: windows of the activation prior in each round.
        bonsai_ridge: strength of the ridge, relative to the design.
        loraprune_steps, loraprune_rank, loraprune_alpha, loraprune_lr, loraprune_decay, loraprune_prune_every: of
            the tuning, its moving average and its stages.
        depth_contiguous: drop one block of adjacent layers (PruneMe), not the most similar anywhere (ShortGPT).
    """

    windows: int = 64
    flap_allocation: Literal["adaptive", "uniform"] = "adaptive"
    flap_bias: bool = True
    protect_first: int = 0
    protect_last: int = 0
    nirvana_objective: Objective = "logits"
    nirvana_mlp_to_attention: float = 1.0
    nirvana_candidates: int = 1
    nirvana_kl_windows: int = 8
    nirvana_layers_at_once: int | None = None
    bonsai_rounds: int = 4
    bonsai_submodels: int = 32
    bonsai_windows: int = 1
    bonsai_prior_windows: int = 8
    bonsai_ridge: float = 1.0
    loraprune_steps: int = 64
    loraprune_rank: int = 8
    loraprune_alpha: float = 16.0
    loraprune_lr: float = 1e-4
    loraprune_decay: float = 0.9
    loraprune_prune_every: int = 4
    depth_contiguous: bool = False


def score_baseline(
    method: str,
    model: nn.Module,
    topology: Topology,
    input_ids: Tensor,
    target_sparsity: float,
    *,
    axes: tuple[Axis, ...],
    seed: int = 0,
    options: BaselineOptions = BaselineOptions(),
    progress: bool = True,
) -> tuple[Masks, WeightUpdate]:
    """Masks of a published method on the axes, at the parameter budget.

    The budget is met exactly, as near as one unit of the cheapest axis in play allows; never exceeded. Units are
    kept iff their score is above 0; scores rank a layer's units as the method does. The update holds the method's
    biases, if any. The model is as before afterwards.

    Args:
        method: one of BASELINES.
        model: causal LM on its device, in evaluation mode.
        input_ids: int32 [samples, seq_len].
        target_sparsity: share of the decoder layers' parameters to remove, in [0, 1).

    Raises:
        ValueError: names the parameter that is out of range, or the axes the method cannot prune.
        UnreachableSparsityError: the axes in play cannot remove so much.
    """
    check_baseline(method, axes, target_sparsity)
    if not len(input_ids):
        raise ValueError("calibration: no windows")
    if options.windows < 1:
        raise ValueError(f"learn_masks.windows = {options.windows}: at least 1")
    o, count = options, min(options.windows, len(input_ids))
    spread = torch.linspace(0, len(input_ids) - 1, count).long() if count > 1 else torch.zeros(1, dtype=torch.int64)
    windows = input_ids[spread]
    axes = tuple(axis for axis in AXES if axis in axes)
    given = (model, topology, windows, target_sparsity)
    bias: dict[str, Tensor] = {}
    match method:
        case "random":
            masks = activation_scores.random(topology, target_sparsity, axes, seed)
        case "magnitude":
            masks = activation_scores.magnitude(model, topology, target_sparsity, axes)
        case "wanda_sp":
            masks = activation_scores.wanda_sp(*given, axes, progress=progress)
        case "flap":
            masks, bias = activation_scores.flap(*given, axes, o.flap_allocation, o.flap_bias, progress=progress)
        case "llm_pruner":
            masks = gradient_scores.llm_pruner(*given, axes, o.protect_first, o.protect_last, progress=progress)
        case "nirvana":
            masks = gradient_scores.nirvana(
                *given,
                axes,
                o.nirvana_objective,
                o.nirvana_mlp_to_attention,
                o.nirvana_candidates,
                o.nirvana_kl_windows,
                o.nirvana_layers_at_once,
                progress=progress,
            )
        case "bonsai":
            masks = bonsai(
                *given,
                axes,
                o.bonsai_rounds,
                o.bonsai_submodels,
                o.bonsai_windows,
                o.bonsai_prior_windows,
                o.bonsai_ridge,
                seed=seed,
                progress=progress,
            )
        case "loraprune":
            masks = loraprune(
                *given,
                axes,
                o.loraprune_steps,
                o.loraprune_rank,
                o.loraprune_alpha,
                o.loraprune_lr,
                o.loraprune_decay,
                o.loraprune_prune_every,
                o.protect_first,
                o.protect_last,
                seed=seed,
                progress=progress,
            )
        case _:
            masks = depth(*given, contiguous=o.depth_contiguous, progress=progress)
    return masks, WeightUpdate.none(topology, bias)


def check_baseline(method: str, axes: tuple[Axis, ...], target_sparsity: float) -> None:
    """Refuse what no calibration can mend, before any model is loaded.

    Raises:
        ValueError: names the parameter, its value and what is allowed.
    """
    if method not in BASELINES:
        raise ValueError(f"learn_masks.method = {method!r}: use one of {', '.join(BASELINES)}")
    supported = SUPPORTED_AXES[method]
    if not axes or not set(axes) <= set(supported):
        raise ValueError(f"learn_masks.axes = {list(axes)}: {method} prunes {', '.join(supported)}")
    if method == "depth" and set(axes) != set(_UNITS):
        raise ValueError(f"learn_masks.axes = {list(axes)}: depth drops whole layers, so it needs {list(_UNITS)}")
    if not 0 <= target_sparsity < 1:
        raise ValueError(f"sparsity = {target_sparsity}: must be at least 0 and below 1")
