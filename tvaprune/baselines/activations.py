"""The linear modules that read heads and intermediate units: statistics of their inputs, sums of their columns.

Key-value heads are read by o_proj, intermediate units by down_proj. The inputs of a head are all head_dim dimensions
of all query heads in its group, contiguous.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tvaprune.architecture.topology import LayerModules, Topology, decoder_layers, layer_modules
from tvaprune.baselines.problem import Problem
from tvaprune.options.axes import Axis
from tvaprune.progress import Progress

Inputs = Float[Tensor, "layers inputs"]


@dataclass(frozen=True)
class InputStatistics:
    """Sums over all tokens of all windows, float64."""

    tokens: int
    total: Inputs
    squares: Inputs  # sum of the squared inputs
    fluctuation: Inputs  # FLAP's running variance, times the tokens of a window; depends on the order of the windows

    @property
    def mean(self) -> Inputs:
        return self.total / self.tokens

    @property
    def norm(self) -> Inputs:
        """Euclidean norm over tokens."""
        return self.squares.sqrt()


def readers(layer: LayerModules) -> dict[Axis, nn.Linear]:
    """The module that reads the units of each axis."""
    return {"kv_heads": layer.o_proj, "intermediate": layer.down_proj}


class _Sums:
    """The sums of what enters one module: float64 [inputs]."""

    def __init__(self, module: nn.Linear) -> None:
        self.windows = self.tokens = 0
        self.total, self.squares, self.fluctuation = torch.zeros(
            3, module.in_features, dtype=torch.float64, device=module.weight.device
        )

    def add(self, window: Float[Tensor, "tokens inputs"]) -> None:
        """Add one window.

        The fluctuation is that of the published code (FLAP 3bb57db, lib/layerwrapper.py:70-82): the squares of each
        window but the first, around the mean of it and all before it, in a running mean over windows.
        """
        x, before = window.double(), self.windows
        total, squares = x.sum(0), x.square().sum(0)
        self.total += total
        self.squares += squares
        self.windows += 1
        self.tokens += len(x)
        if before:
            mean = self.total / self.tokens
            around_mean = squares - 2 * mean * total + len(x) * mean.square()
            self.fluctuation *= (before - 1) / before
            self.fluctuation += around_mean.clamp_min(0) / (before + 1)


class Collector:
    """Sums what enters the readers of each axis in some layers, while its hooks are attached; one window a forward."""

    def __init__(self, layers: Sequence[LayerModules]) -> None:
        self._layers = layers
        self._sums = {axis: [_Sums(readers(layer)[axis]) for layer in layers] for axis in readers(layers[0])}

    @contextmanager
    def attached(self) -> Iterator[None]:
        def add(sums: _Sums) -> Any:
            return lambda _, args: sums.add(args[0].flatten(0, -2))

        with ExitStack() as hooks:
            for index, layer in enumerate(self._layers):
                for axis, module in readers(layer).items():
                    hooks.enter_context(module.register_forward_pre_hook(add(self._sums[axis][index])))
            yield

    def statistics(self) -> dict[Axis, InputStatistics]:
        return {
            axis: InputStatistics(
                each[0].tokens,
                torch.stack([sums.total for sums in each]),
                torch.stack([sums.squares for sums in each]),
                torch.stack([sums.fluctuation for sums in each]),
            )
            for axis, each in self._sums.items()
        }


@torch.no_grad()
def input_statistics(problem: Problem) -> dict[Axis, InputStatistics]:
    """Run the windows through the decoder, one at a time, and sum what enters the readers of each axis.

    The gates of a `GatedModel` apply: a dropped unit's input is 0.
    """
    collector = Collector(list(layer_modules(problem.model)))
    with collector.attached():
        for window in problem.each_window("activations"):
            problem.forward(window)
    return collector.statistics()


class _FirstLayerReachedError(Exception):
    """Ends a forward before its first layer."""


@torch.no_grad()
def first_layer_inputs(problem: Problem) -> tuple[list[Float[Tensor, "1 seq hidden"]], dict[str, Any]]:
    """What the first decoder layer is given: each window's hidden states, and the other arguments, alike for all."""
    hidden: list[Tensor] = []
    others: dict[str, Any] = {}

    def catch(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        hidden.append(args[0])
        others.update(kwargs)
        raise _FirstLayerReachedError

    handle = decoder_layers(problem.model)[0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for window in problem.windows.split(1):
            try:
                problem.forward(window.long().to(problem.device))
            except _FirstLayerReachedError:
                continue
    finally:
        handle.remove()
    return hidden, others


@torch.no_grad()
def layer_by_layer(problem: Problem) -> Iterator[tuple[int, LayerModules, Callable[[], None]]]:
    """Each decoder layer: its index, its modules, and a function that passes all windows through it.

    What enters a layer comes through the layers before it, as the caller left them. Memory: the hidden states of all
    windows.
    """
    hidden, others = first_layer_inputs(problem)
    layers = Progress(list(layer_modules(problem.model)), desc="layers", disable=not problem.progress)
    for index, (modules, block) in enumerate(zip(layers, decoder_layers(problem.model), strict=True)):

        def pass_windows(block: nn.Module = block, hidden: list[Tensor] = hidden) -> None:
            for states in hidden:
                block(states, **others)

        yield index, modules, pass_windows
        hidden = [block(states, **others) for states in hidden]


@torch.no_grad()
def column_sums(layers: Sequence[LayerModules], axis: Axis, element: Callable[[Tensor], Tensor]) -> Inputs:
    """Sum a function of the reader's weights over each column."""
    return torch.stack([element(readers(layer)[axis].weight).sum(0) for layer in layers])


def per_unit(topology: Topology, axis: Axis, per_input: Inputs) -> Float[Tensor, "layers units each"]:
    """The inputs that belong to each unit."""
    return per_input.view(len(per_input), topology.width(axis), -1)
