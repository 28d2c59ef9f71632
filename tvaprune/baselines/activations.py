"""The linear modules that read heads and intermediate units: statistics of their inputs, sums of their columns.

Key-value heads are read by o_proj, intermediate units by down_proj. The inputs of a head are all head_dim dimensions
of all query heads in its group, contiguous.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tvaprune.architecture.topology import Axis, LayerModules, Topology, layer_modules
from tvaprune.baselines.problem import Problem

Inputs = Float[Tensor, "layers inputs"]


@dataclass(frozen=True)
class InputStatistics:
    """Sums over all tokens of all windows, float64; the order of the windows does not matter."""

    tokens: int
    total: Inputs
    squares: Inputs  # sum of the squared inputs

    @property
    def mean(self) -> Inputs:
        return self.total / self.tokens

    @property
    def variance(self) -> Inputs:
        """Over tokens, divided by their number; >= 0."""
        return (self.squares / self.tokens - self.mean.square()).clamp_min(0)

    @property
    def norm(self) -> Inputs:
        """Euclidean norm over tokens."""
        return self.squares.sqrt()


def readers(layer: LayerModules) -> dict[Axis, nn.Linear]:
    """The module that reads the units of each axis."""
    return {"kv_heads": layer.o_proj, "intermediate": layer.down_proj}


@torch.no_grad()
def input_statistics(problem: Problem) -> dict[Axis, InputStatistics]:
    """Run the windows through the decoder, one at a time, and sum what enters the readers of each axis.

    The gates of a `GatedModel` apply: a dropped unit's input is 0.
    """
    layers = list(layer_modules(problem.model))
    total = {
        axis: torch.zeros(len(layers), module.in_features, dtype=torch.float64, device=problem.device)
        for axis, module in readers(layers[0]).items()
    }
    squares = {axis: torch.zeros_like(zeros) for axis, zeros in total.items()}

    def add(axis: Axis, index: int) -> Any:
        def hook(_: nn.Module, args: Any) -> None:
            x = args[0].flatten(0, -2).double()
            total[axis][index] += x.sum(0)
            squares[axis][index] += x.square().sum(0)

        return hook

    with ExitStack() as hooks:
        for index, layer in enumerate(layers):
            for axis, module in readers(layer).items():
                hooks.enter_context(module.register_forward_pre_hook(add(axis, index)))
        for window in problem.each_window("activations"):
            problem.forward(window)
    return {axis: InputStatistics(problem.windows.numel(), total[axis], squares[axis]) for axis in total}


@torch.no_grad()
def column_sums(model: nn.Module, axis: Axis, element: Callable[[Tensor], Tensor]) -> Inputs:
    """Sum a function of the reader's weights over each column."""
    return torch.stack([element(readers(layer)[axis].weight).sum(0) for layer in layer_modules(model)])


def per_unit(topology: Topology, axis: Axis, per_input: Inputs) -> Float[Tensor, "layers units"]:
    """Sum the inputs of each unit."""
    return per_input.view(topology.layers, topology.width(axis), -1).sum(-1)
