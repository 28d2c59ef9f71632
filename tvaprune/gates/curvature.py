"""How the loss curves in each gate, by the Fisher information of the model's own predictions."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tvaprune.architecture.topology import hidden_states, lm_head
from tvaprune.distributed import ALONE, World
from tvaprune.gates.insertion import GatedModel, SquaredGradients
from tvaprune.losses import cross_entropy
from tvaprune.options.axes import AXES, Axis
from tvaprune.progress import Progress


def gate_curvature(
    gated: GatedModel, windows: Tensor, block_tokens: int, seed: int, progress: bool = True, world: World = ALONE
) -> dict[Axis, Float[Tensor, "..."]]:
    """The diagonal Fisher information of every gate at 1, mean over windows: >= 0, shapes of `Topology.gate_shape`.

    F = E[(d log p(y) / d z)²] with y sampled from the model itself. Gradients are summed over a block of tokens before
    they are squared (`SquaredGradients`), and the squares over a window's blocks.
    At the dense model it is the Hessian of the KL divergence from its predictions, so ½·F is what dropping a unit costs
    to second order (optimal brain damage, LeCun et al. 1989; on masks, Kwon et al., NeurIPS 2022). Labels of the text
    would mix in how wrong the model is.

    Args:
        gated: with its gates inserted; left clear.
        windows: int64 [n, seq_len], the same on every process; the processes share them.
        block_tokens: divides seq_len. With seq_len the estimate has no bias and the most variance.
    """
    topology, model = gated.topology, gated.model
    head = lm_head(model).weight.detach()
    # One uniform a token, drawn on the CPU and for all windows, so that a seed gives the same on every device and rank.
    uniform = torch.rand(windows.shape, generator=torch.Generator().manual_seed(seed))
    total = {axis: torch.zeros(topology.gate_shape(axis), device=windows.device) for axis in AXES}
    for index, counts in Progress(world.turns(len(windows)), desc="curvature", disable=not progress):
        window = windows[index]
        ones = {axis: torch.ones_like(total[axis], requires_grad=True) for axis in AXES}
        squares = SquaredGradients(topology, block_tokens, windows.device)
        gated.set(ones, topology.hidden, squares=squares)
        hidden = hidden_states(model, window[None])[0]
        sampled = _sample(hidden.detach(), head, uniform[index].to(window.device))
        loss = cross_entropy(hidden, head, sampled) * len(window)
        loss.backward()
        for axis in AXES:
            total[axis] += squares.sums[axis] * counts
    gated.clear()
    return {axis: world.sum_(total[axis]) / len(windows) for axis in AXES}


class RunningCurvature:
    """The dense model's curvature over `windows` windows, averaged with what training's gradients say, at no cost.

    The square of a gate's gradient over a block of tokens is a draw of its Fisher information (the empirical one, with
    the text's labels). Training computes it at every step. It says what the dense model cannot: how the loss curves
    once other units are gone. Each axis's draws are scaled to the start's total over the units that were drawn, so that
    the labels do not shift the axes against each other. A dropped unit has no draw: its gradient at 0 is not its
    curvature.
    """

    def __init__(self, start: dict[Axis, Float[Tensor, "..."]], windows: int) -> None:
        self._start, self._windows = start, float(windows)
        self._drawn = {axis: torch.zeros_like(mean) for axis, mean in start.items()}
        self._draws = {axis: torch.zeros_like(mean) for axis, mean in start.items()}

    def add(
        self, squares: dict[Axis, Float[Tensor, "..."]], keep: dict[Axis, Bool[Tensor, "..."]], windows: int
    ) -> None:
        """A step's `SquaredGradients.sums`, of the mean loss over `windows` windows."""
        for axis in AXES:
            kept = keep[axis].float()
            self._drawn[axis] += windows**2 * squares[axis] * kept
            self._draws[axis] += windows * kept

    def mean(self) -> dict[Axis, Float[Tensor, "..."]]:
        """Over the start's windows and, for units that were kept, the training's."""
        means = {}
        for axis, start in self._start.items():
            draws, drawn = self._draws[axis], self._drawn[axis]
            seen = draws > 0
            scale = start[seen].sum() / ((drawn / draws.clamp_min(1))[seen].sum() + 1e-30)
            means[axis] = (start * self._windows + scale * drawn) / (self._windows + draws)
        return means

    def state_dict(self) -> dict[str, Any]:
        return {"start": self._start, "windows": self._windows, "drawn": self._drawn, "draws": self._draws}

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> "RunningCurvature":
        start, drawn, draws = ({axis: value.to(device) for axis, value in state[part].items()}
                               for part in ("start", "drawn", "draws"))  # fmt: skip
        one = cls(start, int(state["windows"]))
        one._drawn, one._draws = drawn, draws
        return one


def _sample(hidden: Tensor, head: Tensor, uniform: Tensor, chunk: int = 256) -> Tensor:
    """One next token a position, int64 [tokens]: the model's cumulative distribution, inverted at `uniform`."""
    tokens = []
    for rows, at in zip(hidden.split(chunk), uniform.split(chunk), strict=True):
        cumulative = (rows.to(head.dtype) @ head.T).float().softmax(-1).cumsum(-1)
        wanted = at[:, None] * cumulative[:, -1:]
        tokens.append(torch.searchsorted(cumulative, wanted).clamp_max_(cumulative.shape[1] - 1).squeeze(1))
    return torch.cat(tokens)
