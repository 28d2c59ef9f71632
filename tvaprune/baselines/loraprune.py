"""LoRAPrune: importance read from the gradients of low-rank factors while they are tuned."""

import math
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import trange

from tvaprune.architecture.topology import cut
from tvaprune.baselines.allocation import Scores, Stages, percentiles_over_layers
from tvaprune.baselines.gradients import Products, frozen, owned_weights, pool
from tvaprune.baselines.problem import Problem, drop_units
from tvaprune.gates.budget import cubic_ramp
from tvaprune.gates.insertion import GatedModel
from tvaprune.masks.masks import Masks
from tvaprune.options.baselines import LoraPruneOptions


class Adapter:
    """Low-rank factors of a linear module, W + alpha / rank · B A: float32 a [rank, in], b [out, rank], 0 at first."""

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
    def importance(self) -> Float[Tensor, "out in"]:
        """abs((∂B·A + B·∂A - ∂B·∂A) ⊙ (W + scale · B A)): float32 (Zhang et al.)."""
        assert self.a.grad is not None
        assert self.b.grad is not None
        gradient = self.b.grad @ self.a + self.b @ self.a.grad - self.b.grad @ self.a.grad
        return gradient.mul_(self.module.weight.float() + self.scale * (self.b @ self.a)).abs_()


def loraprune(problem: Problem, options: LoraPruneOptions) -> Masks:
    """Prune in stages while LoRA is tuned, by a moving average of the factors' importance (Zhang et al. 2023).

    As published: importance summed over each unit's slice of a matrix, divided by the matrix's norm over units,
    summed over a block's matrices, averaged over steps (decay 0.9); a cubic ramp to the target; what is dropped
    stays dropped; cross-entropy, AdamW.

    Departures: one ranking per axis over all layers, the same share of each axis dropped (the published code
    prunes every layer alike); whole groups of heads; a step takes one window, again from the first when all are
    used; the tuned factors are thrown away, because every method here is fine-tuned by the same later stage.
    """
    model, topology, axes = problem.model, problem.topology, problem.axes
    generator = torch.Generator().manual_seed(problem.seed)
    modules: dict[str, Any] = dict(model.named_modules())
    adapters = {
        name: Adapter(modules[name.removesuffix(".weight")], options.rank, options.alpha, generator)
        for name in owned_weights(model, axes)
    }
    factors = [factor for adapter in adapters.values() for factor in (adapter.a, adapter.b)]
    optimizer = torch.optim.AdamW(factors, options.lr, weight_decay=0.0)
    stages = Stages(topology, axes, options.protect_first, options.protect_last)
    average: Scores = {axis: torch.zeros(topology.gate_shape(axis)) for axis in axes}
    windows = problem.windows.long().to(problem.device).split(1)
    with ExitStack() as hooks, GatedModel(model, topology).inserted() as gated, frozen(model), torch.enable_grad():
        for adapter in adapters.values():
            hooks.enter_context(adapter.module.register_forward_hook(adapter))
        for step in trange(options.steps, desc="loraprune", disable=not problem.progress):
            drop_units(gated, stages.keep)
            optimizer.zero_grad()
            problem.loss(windows[step % len(windows)]).backward()
            current = step_scores(problem, adapters)
            optimizer.step()
            for axis in axes:
                average[axis] = options.decay * average[axis] + (1 - options.decay) * current[axis]
            if (step + 1) % options.prune_every == 0 or step + 1 == options.steps:
                ranked = {axis: percentiles_over_layers(scores) for axis, scores in average.items()}
                stages.prune(ranked, cubic_ramp((step + 1) / options.steps, problem.target_sparsity, 1.0))
    return stages.masks()


@torch.no_grad()
def step_scores(problem: Problem, adapters: dict[str, Adapter]) -> Scores:
    """One step's importance: float32, >= 0; each matrix contributes a vector of norm 1 over its layer's units."""
    products: Products = {}
    for name, adapter in adapters.items():
        for dim, axis in enumerate(cut(name).axes):
            if axis in problem.axes:
                vector = adapter.importance().sum(1 - dim)
                norm = vector.view(problem.topology.width(axis), -1).sum(1).norm()
                products[name, dim] = vector / (norm + 1e-8)
    return pool(problem, products)
