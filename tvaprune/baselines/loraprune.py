"""LoRAPrune: importance read from the gradients of low-rank factors while they are tuned."""

import math
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from tvaprune.architecture.topology import cut
from tvaprune.baselines.allocation import Scores, StagedPruning, widths_of_uniform_share
from tvaprune.baselines.gradients import Products, frozen, owned_weights, pool
from tvaprune.baselines.problem import Problem, drop_units
from tvaprune.gates.budget import cubic_ramp
from tvaprune.gates.insertion import GatedModel
from tvaprune.masks.masks import Masks
from tvaprune.options.baselines import LoraPruneOptions
from tvaprune.progress import Progress

# Published: gradient norm, and the share of the steps before the ramp of the sparsity and after it.
LARGEST_NORM = 1.0
WARMUP = 0.1


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

    As published (aim-uofa/LoRAPrune 4da5272, script/prune.sh and loraprune/): importance summed over each unit's slice
    of a matrix, divided by the matrix's norm over units, summed over a block's matrices, averaged over steps (decay
    0.9; utils.py:44-87); the first layers and the last one stay whole (19-26), every other layer loses the same share
    of its heads and of its units (133-166); a cubic ramp from 10% to 90% of the steps (171-188), with a pruning every
    10 steps (trainer.py:336-343); what is dropped stays dropped; cross-entropy, AdamW, gradients of norm at most 1, a
    learning rate that falls linearly from 1e-4. Published: 2 epochs of LaMini's 2.6 million instructions, batches of
    128.

    Departures:
    - The share is such that the whole decoder meets the target; the published one is of the open layers' units.
    - Whole groups of heads; in the published code keys and values of a model with groups are cut into 32 heads.
    - A step takes windows, again from the first when all are used, and the default is far fewer of them.
    - No dropout (published 0.05), so that equal seeds give equal masks on any device.
    - Steps after the ramp are left out. They, and the tuned factors, which are thrown away, are recovery, and every
      method here is fine-tuned by the same later stage.
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
    decay = LambdaLR(optimizer, lambda step: 1 - step / options.steps)
    average: Scores = {axis: torch.zeros(topology.gate_shape(axis)) for axis in axes}
    stages = StagedPruning(topology, axes, options.protect_first, options.protect_last)
    widths = widths_of_uniform_share(
        topology, axes, problem.target_sparsity, options.protect_first, options.protect_last
    )
    windows = problem.windows.long().to(problem.device).split(1)
    end = max(math.ceil((1 - WARMUP) * options.steps), 1)
    with ExitStack() as hooks, GatedModel(model, topology).inserted() as gated, frozen(model), torch.enable_grad():
        for adapter in adapters.values():
            hooks.enter_context(adapter.module.register_forward_hook(adapter))
        for step in Progress(range(1, end + 1), desc="loraprune", disable=not problem.progress):
            drop_units(gated, stages.keep)
            optimizer.zero_grad()
            for index in range((step - 1) * options.batch_size, step * options.batch_size):
                (problem.loss(windows[index % len(windows)]) / options.batch_size).backward()
            torch.nn.utils.clip_grad_norm_(factors, LARGEST_NORM)
            current = step_scores(problem, adapters)
            optimizer.step()
            decay.step()
            for axis in axes:
                average[axis] = options.decay * average[axis] + (1 - options.decay) * current[axis]
            if step == end or (step % options.prune_every == 0 and step > WARMUP * options.steps):
                stages.prune_alike(average, widths, ramp_share(step, options.steps))
    return stages.masks()


def ramp_share(step: int, steps: int) -> float:
    """Share of the target after a step, from 1: 0 up to 10% of the steps, 1 from 90%, cubic between."""
    return cubic_ramp(max(step - WARMUP * steps, 0), 1.0, (1 - 2 * WARMUP) * steps)


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
