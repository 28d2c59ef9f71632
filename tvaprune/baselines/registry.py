"""Every published baseline by its name."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from tvaprune.architecture.parameter_counts import kept_decoder_parameters, parameter_budget
from tvaprune.baselines.bonsai import bonsai
from tvaprune.baselines.depth import depth
from tvaprune.baselines.flap import flap
from tvaprune.baselines.llm_pruner import llm_pruner
from tvaprune.baselines.loraprune import loraprune
from tvaprune.baselines.magnitude import magnitude, random
from tvaprune.baselines.nirvana import nirvana
from tvaprune.baselines.osscar import osscar
from tvaprune.baselines.problem import Problem
from tvaprune.baselines.wanda_sp import wanda_sp
from tvaprune.masks.masks import Masks
from tvaprune.masks.update import WeightUpdate
from tvaprune.options.axes import AXES

_FUNCTIONS = (random, magnitude, wanda_sp, flap, llm_pruner, nirvana, bonsai, loraprune, osscar, depth)
_METHODS: dict[str, Callable[[Problem, Any], Any]] = {function.__name__: function for function in _FUNCTIONS}


def score_baseline(method: str, problem: Problem, options: Any) -> tuple[Masks, WeightUpdate]:
    """Masks of a published method on the axes, at the parameter budget, and its biases and matrices, if any.

    The parameters kept never exceed the budget, and are below it by less than one unit of the cheapest pruned axis.
    Units are kept iff their score is above 0; scores rank a layer's units as the method does.

    Args:
        problem: with all calibration windows; a method uses `options.windows` of them, spread evenly.
        options: of the method's class in BASELINE_OPTIONS, which `methods.check_request` checks. A class without
            `windows` gets all.

    Raises:
        UnreachableSparsityError: the pruned axes cannot remove so much.
        ValueError: an option does not suit the model or the windows; or the method's masks exceed the budget, or do not
            agree with its scores.
    """
    available = len(problem.windows)
    if not available:
        raise ValueError("calibration: no windows")
    wanted = getattr(options, "windows", available)
    spread = torch.linspace(0, available - 1, min(wanted, available)).long()
    axes = tuple(axis for axis in AXES if axis in problem.axes)
    found = _METHODS[method](replace(problem, windows=problem.windows[spread], axes=axes), options)
    masks, update = found if isinstance(found, tuple) else (found, WeightUpdate.none(problem.topology))
    _check_masks(method, problem, masks)
    return masks, update


def _check_masks(method: str, problem: Problem, masks: Masks) -> None:
    """Raise a ValueError for masks that adaptation or a comparison could not use: a fault of the method's code."""
    kept = kept_decoder_parameters(problem.topology, masks.keep)
    budget = parameter_budget(problem.topology, problem.target_sparsity)
    if kept > budget:
        raise ValueError(f"{method}: its masks keep {kept:,} parameters of the decoder, the budget is {budget:,.0f}")
    for axis in AXES:
        if not torch.equal(masks.keep[axis], masks.score[axis].to(masks.keep[axis].device) > 0):
            raise ValueError(f"{method}: {axis} keeps other units than those whose score is above 0")
