"""LoRAPrune: importance read from the gradients of low-rank factors while they are tuned."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tvaprune.architecture.topology import Axis, Topology, cut, decoder, lm_head
from tvaprune.baselines.allocation import Scores, Stages, percentiles
from tvaprune.baselines.gradients import AXIS_OF_UNITS, frozen, owned_weights, pool
from tvaprune.gates.budget import cubic_ramp
from tvaprune.gates.insertion import GatedModel, hard_gates
from tvaprune.losses import cross_entropy, next_token_labels
from tvaprune.masks.masks import Masks


class Adapter:
    """One linear module's low-rank factors: W + scale · B A, scale = alpha / rank, B = 0 at first.

    Attributes:
        a: float32 [rank, in].
        b: float32 [out, rank].
    """

    def __init__(self, module: nn.Linear, rank: int, alpha: float, generator: torch.Generator) -> None:
        bound = 1 / math.sqrt(module.in_features)
        start = (2 * torch.rand(rank, module.in_features, generator=generator) - 1) * bound
        device = module.weight.device
        self.module = module
        self.scale = alpha / rank
        self.a = start.to(device).requires_grad_()
        self.b = torch.zeros(module.out_features, rank, device=device, requires_grad=True)

    def __call__(self, _: nn.Module, args: Any, out: Tensor) -> Tensor:
        """A forward hook."""
        return out + (self.scale * (args[0].float() @ self.a.T @ self.b.T)).to(out.dtype)

    @torch.no_grad()
    def importance(self) -> Tensor:
        """abs((∂B·A + B·∂A - ∂B·∂A) ⊙ (W + scale · B A)): float32 [out, in] (Zhang et al.)."""
        assert self.a.grad is not None
        assert self.b.grad is not None
        gradient = self.b.grad @ self.a + self.b @ self.a.grad - self.b.grad @ self.a.grad
        return gradient.mul_(self.module.weight.float() + self.scale * (self.b @ self.a)).abs_()


def loraprune(
    model: nn.Module,
    topology: Topology,
    input_ids: Tensor,
    target_sparsity: float,
    axes: tuple[Axis, ...],
    steps: int = 64,
    rank: int = 8,
    alpha: float = 16.0,
    learning_rate: float = 1e-4,
    decay: float = 0.9,
    prune_every: int = 4,
    protect_first: int = 0,
    protect_last: int = 0,
    seed: int = 0,
    progress: bool = True,
) -> Masks:
    """Prune in stages while LoRA is tuned, by a moving average of the factors' importance (Zhang et al. 2023).

    As published: importance summed over each unit's slice of a matrix, divided by the matrix's norm over units,
    summed over a block's matrices, averaged over steps (decay 0.9); a cubic ramp to the target; what is dropped
    stays dropped; cross-entropy, AdamW.

    Departures: one ranking per axis over all layers, the same share of each axis dropped (the published code
    prunes every layer alike); whole groups of heads; a step takes one window; the tuned factors are thrown away,
    because every method here is fine-tuned by the same later stage.

    Args:
        input_ids: one window a step, again from the first when exhausted.
        prune_every: steps between two stages; the last step always ends one.
        protect_first, protect_last: layers at either end that stay whole.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    modules = dict(model.named_modules())
    adapters = {
        name: Adapter(modules[name.removesuffix(".weight")], rank, alpha, generator)
        for name in owned_weights(model, axes)
    }
    optimizer = torch.optim.AdamW([f for a in adapters.values() for f in (a.a, a.b)], learning_rate, weight_decay=0.0)
    stages = Stages(topology, axes, protect_first, protect_last)
    average: Scores = {axis: torch.zeros(topology.gate_shape(axis)) for axis in axes}
    windows = input_ids.long().to(device).split(1)
    with GatedModel(model, topology).inserted() as gated, _adapted(model, adapters), torch.enable_grad():
        for step in tqdm(range(steps), desc="loraprune", disable=not progress):
            gates = {axis: gate.to(device) for axis, gate in hard_gates(stages.keep).items()}
            gated.set(gates, kept_hidden=topology.hidden)
            window = windows[step % len(windows)]
            hidden = decoder(model)(input_ids=window, use_cache=False).last_hidden_state[0]
            optimizer.zero_grad()
            cross_entropy(hidden, lm_head(model).weight, next_token_labels(window)).backward()
            current = step_scores(topology, adapters, axes)
            optimizer.step()
            for axis in axes:
                average[axis] = decay * average[axis] + (1 - decay) * current[axis]
            if (step + 1) % prune_every == 0 or step + 1 == steps:
                ranked = {axis: percentiles(average[axis].flatten()).view_as(average[axis]) for axis in axes}
                stages.prune(ranked, cubic_ramp((step + 1) / steps, target_sparsity, 1.0))
    return stages.masks()


@torch.no_grad()
def step_scores(topology: Topology, adapters: dict[str, Adapter], axes: tuple[Axis, ...]) -> Scores:
    """One step's importance: float32 per axis in play, shapes of `Topology.gate_shape`, >= 0.

    Each matrix contributes a vector of norm 1 over its layer's units.
    """
    products: dict[tuple[str, int], Tensor] = {}
    for name, adapter in adapters.items():
        where = cut(name)
        for dim, units in enumerate(where.dims):
            if units is None or AXIS_OF_UNITS[units] not in axes:
                continue
            vector = adapter.importance().sum(1 - dim)
            norm = vector.view(topology.width(AXIS_OF_UNITS[units]), -1).sum(1).norm()
            products[name, dim] = vector / (norm + 1e-8)
    return pool(topology, products, axes)


@contextmanager
def _adapted(model: nn.Module, adapters: dict[str, Adapter]) -> Iterator[None]:
    handles = [adapter.module.register_forward_hook(adapter) for adapter in adapters.values()]
    try:
        with frozen(model):
            yield
    finally:
        for handle in handles:
            handle.remove()
