"""Statistics of the inputs of o_proj and down_proj over calibration windows, by hooks."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tvaprune.architecture.topology import Topology, decoder, layer_modules

Projection = Literal["o_proj", "down_proj"]


@dataclass(frozen=True)
class InputStatistics:
    """Sums over all tokens of all windows; the order of the windows does not matter.

    Attributes:
        tokens: how many.
        total: sum of the inputs, float64 [layers, inputs].
        squares: sum of their squares, float64 [layers, inputs].
    """

    tokens: int
    total: Tensor
    squares: Tensor

    @property
    def mean(self) -> Tensor:
        """float64 [layers, inputs]."""
        return self.total / self.tokens

    @property
    def variance(self) -> Tensor:
        """Over tokens, divided by their number: float64 [layers, inputs], >= 0."""
        return (self.squares / self.tokens - self.mean.square()).clamp_min(0)

    @property
    def norm(self) -> Tensor:
        """Euclidean norm over tokens: float64 [layers, inputs]."""
        return self.squares.sqrt()


@torch.no_grad()
def input_statistics(
    model: nn.Module, topology: Topology, input_ids: Tensor, progress: bool = True
) -> dict[Projection, InputStatistics]:
    """Run the windows through the decoder, one at a time, and sum what enters o_proj and down_proj.

    Gates that are in place are seen: a dropped unit's input is 0.

    Args:
        input_ids: int32 or int64 [windows, seq_len].

    Returns:
        o_proj's inputs are [layers, kv_heads · group_size · head_dim], heads of a group contiguous; down_proj's
        are [layers, intermediate].
    """
    device = next(model.parameters()).device
    widths: dict[Projection, int] = {
        "o_proj": topology.kv_heads * topology.query_rows,
        "down_proj": topology.intermediate,
    }
    total = {p: torch.zeros(topology.layers, w, dtype=torch.float64, device=device) for p, w in widths.items()}
    squares = {p: torch.zeros_like(t) for p, t in total.items()}

    def add(projection: Projection, layer: int) -> Any:
        def hook(_: nn.Module, args: Any) -> None:
            x = args[0].flatten(0, -2).double()
            total[projection][layer] += x.sum(0)
            squares[projection][layer] += x.square_().sum(0)

        return hook

    handles = []
    for index, layer in enumerate(layer_modules(model)):
        handles.append(layer.o_proj.register_forward_pre_hook(add("o_proj", index)))
        handles.append(layer.down_proj.register_forward_pre_hook(add("down_proj", index)))
    try:
        for window in tqdm(input_ids.unbind(), desc="activations", disable=not progress):
            decoder(model)(input_ids=window[None].long().to(device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {p: InputStatistics(input_ids.numel(), total[p], squares[p]) for p in widths}
