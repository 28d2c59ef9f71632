"""What every baseline is given, and the forward passes that they share."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tvaprune.architecture.topology import Topology, hidden_states
from tvaprune.gates.insertion import GatedModel, hard_gates
from tvaprune.gates.objective import objective
from tvaprune.options.axes import Axis
from tvaprune.progress import Progress


@dataclass(frozen=True)
class Problem:
    """What to prune, and how far."""

    model: nn.Module  # causal LM on its device, in evaluation mode; unchanged when a method returns
    topology: Topology
    windows: Int[Tensor, "windows seq"]  # calibration, int32 or int64
    target_sparsity: float  # share of the decoder layers' parameters to remove, in [0, 1)
    axes: tuple[Axis, ...]  # pruned axes; the others stay whole
    seed: int = 0  # of random scores, sub-models and initialisation
    progress: bool = True

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def each_window(self, description: str) -> Iterator[Int[Tensor, "1 seq"]]:
        """The windows one by one, int64 on the model's device, with a progress bar."""
        for window in Progress(self.windows.split(1), desc=description, disable=not self.progress):
            yield window.long().to(self.device)

    def forward(self, window: Int[Tensor, "1 seq"]) -> Float[Tensor, "seq hidden"]:
        """The decoder's output after the final norm."""
        return hidden_states(self.model, window)[0]

    def loss(self, window: Int[Tensor, "1 seq"]) -> Float[Tensor, ""]:
        """Mean next-token cross-entropy in nats, differentiable."""
        return objective(self.model, window)


def drop_units(gated: GatedModel, keep: dict[Axis, Tensor]) -> None:
    """Run the model with 0/1 gates, bool per axis (True = keep), from the next forward on."""
    device = next(gated.model.parameters()).device
    gates = {axis: gate.to(device) for axis, gate in hard_gates(keep).items()}
    gated.set(gates, kept_hidden=int(keep["hidden"].sum()))
