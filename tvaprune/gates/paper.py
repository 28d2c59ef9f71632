"""The paper's own training of the gates: sampled noise, KL, trained variance and a Lagrangian (TVA-Prune section 3.1).

A gate multiplies by z = mean + sigma·eps with eps ~ N(0, 1), drawn for every token and unit (Eq. 1; VIBNet, Dai et al.,
ICML 2018). The loss is cross-entropy + KL + the penalty of CoFi (Xia et al., ACL 2022) on the expected sparsity. A unit
is kept where log_alpha = log(mean² / sigma²) > 0; higher = keep, where the published code stores the negative. RMSNorm
runs over all dimensions while training, as published.

Departures: the learned log_alpha is projected onto the target exactly, where the published code saves nothing unless a
checkpoint falls inside a window of sparsities. Noise is read at random offsets from a fixed pool of normals
(NoisePool), where the published code draws it anew: it saves time.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tvaprune.architecture.parameter_counts import decoder_parameters, dense_decoder_parameters
from tvaprune.architecture.topology import GATED_SITES, Site, Topology
from tvaprune.distributed import World
from tvaprune.gates.budget import adamw, take_step
from tvaprune.gates.insertion import GatedModel
from tvaprune.gates.objective import Row, average, gradient, objective, row
from tvaprune.masks.masks import EPSILON, Masks, log_alpha
from tvaprune.masks.projection import project
from tvaprune.masks.update import WeightUpdate
from tvaprune.options.axes import AXES, Axis
from tvaprune.options.gates import PaperOptions


def kl(mean: Float[Tensor, "*units"], log_var: Float[Tensor, "*units"]) -> Float[Tensor, ""]:
    """½ · Σ log(1 + mean² / (sigma² + 1e-8)), summed over units, not averaged over tokens (VIBNet Eq. 6), in nats."""
    return 0.5 * torch.log1p(mean.square() / (log_var.exp() + EPSILON)).sum()


def linear_ramp(progress: float, target: float, ramp: float) -> float:
    """The scheduled sparsity at a share of the run, as in CoFi: linear over the share `ramp` of the steps."""
    return target * min(progress / ramp, 1.0) if ramp > 0 else target


def expected_sparsity(topology: Topology, keep_probability: dict[Axis, Float[Tensor, "..."]]) -> Float[Tensor, ""]:
    """The sparsity of the decoder layers under soft keep probabilities, with gradients."""
    counts = (keep_probability[axis].sum(-1) for axis in AXES)
    return 1 - decoder_parameters(topology, *counts) / dense_decoder_parameters(topology)


class NoisePool:
    """Standard normals drawn once and read at random offsets.

    A gate's noise takes a draw per token and unit, tens of millions a step, which costs more than the model's own
    matrix products on a CPU. Slices of one large pool cost a read. Draws within a slice are independent; slices may
    overlap between sites and steps. An offset is a function of the seed, the step, the window's index in the whole
    batch and the site: the same on one process and on many, and again where a checkpointed forward is repeated. A
    window's slice larger than the pool raises ValueError.
    """

    def __init__(self, seed: int, device: torch.device, dtype: torch.dtype, size: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._pool = torch.randn(size, generator=generator).to(device=device, dtype=dtype)
        self._seed = seed
        self._step = 0
        self._windows: Sequence[int] = ()

    def start_step(self, step: int, windows: Sequence[int]) -> None:
        """Begin a step, with the indices in the whole batch of the windows that this process computes."""
        self._step, self._windows = step, windows

    def draw(self, shape: torch.Size, site: int) -> Tensor:
        """Normals of the shape [windows, ...], in the pool's dtype, for one of at most 997 sites."""
        count = shape[1:].numel()
        if count > self._pool.numel():
            raise ValueError(f"a slice of {count} normals does not fit the pool of {self._pool.numel()}")
        starts = self._pool.numel() - count + 1
        drawn = []
        for window in self._windows:
            key = ((self._seed * 1_000_003 + self._step) * 1009 + window) * 997 + site
            offset = int(torch.randint(starts, (1,), generator=torch.Generator().manual_seed(key % 2**63)))
            drawn.append(self._pool[offset : offset + count].view(shape[1:]))
        return torch.stack(drawn)


def pool_size(topology: Topology, seq_len: int) -> int:
    """Normals for one window at the widest site of a gate, with room for offsets."""
    return 2 * seq_len * max(topology.hidden, topology.intermediate, topology.kv_heads * topology.query_rows)


class PaperGates:
    """Means, log-variances and Lagrange multipliers, all by gradient.

    Axes outside of `axes` stay whole. `target_sparsity` is the share of the decoder layers' parameters to remove.
    """

    def __init__(
        self,
        topology: Topology,
        options: PaperOptions,
        target_sparsity: float,
        axes: tuple[Axis, ...],
        device: torch.device,
        seed: int,
    ) -> None:
        self.topology, self.options, self.target_sparsity, self.axes = topology, options, target_sparsity, axes
        self._seed = seed
        generator = torch.Generator().manual_seed(seed)

        def normal(axis: Axis, mean: float) -> Tensor:
            return (mean + 0.01 * torch.randn(topology.gate_shape(axis), generator=generator)).to(device)

        self.mean = {axis: normal(axis, 1.0) for axis in AXES}
        self.log_var = {axis: normal(axis, options.init_log_var) for axis in AXES}
        self.multipliers = torch.zeros(2, device=device)
        self._optimizer = adamw([*self.mean.values(), *self.log_var.values()], options.lr)
        self._ascent = adamw([self.multipliers], options.lambda_lr, maximize=True)
        self._noise: NoisePool | None = None

    def start(self, gated: GatedModel, input_ids: Tensor, world: World, progress: bool) -> None:
        """Nothing is measured before the first step."""

    def step(self, gated: GatedModel, input_ids: Tensor, index: int, world: World) -> Row:
        """One step with every gate open and noisy, the sparsity pulled by a penalty on its expectation."""
        options, topology = self.options, self.topology
        progress = (index + 1) / options.steps
        scheduled = linear_ramp(progress, self.target_sparsity, options.ramp)
        mean = {axis: self.mean[axis].clone().requires_grad_() for axis in AXES}
        log_var = {axis: self.log_var[axis].clone().requires_grad_() for axis in AXES}
        multipliers = self.multipliers.clone().requires_grad_()
        gated.set(mean, topology.hidden, sample=self._sampler(gated, input_ids, log_var, index, world))
        loss = objective(gated.model, input_ids)
        keep = {axis: torch.ones_like(mean[axis]) for axis in AXES}
        for axis in self.axes:
            keep[axis] = torch.sigmoid(options.slope * log_alpha(mean[axis], log_var[axis]))
        sparsity = expected_sparsity(topology, keep)
        gap = sparsity - scheduled
        penalty = (multipliers[0] * gap + multipliers[1] * gap.square()).float()
        bottleneck = sum(getattr(options.kl_weight, axis) * kl(mean[axis], log_var[axis]) for axis in self.axes)
        (loss + bottleneck + penalty).backward()
        leaves = [*mean.values(), *log_var.values()]
        gradients = [gradient(leaf) for leaf in leaves]
        loss = average(world, loss, gradients)
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if options.clip is not None and norm > options.clip:
            for each in gradients:
                each.mul_(options.clip / norm)
        take_step(self._optimizer, gradients, options.lr * (1 - progress + 1 / options.steps))
        take_step(self._ascent, [gradient(multipliers)], options.lambda_lr)
        return row(loss, norm, float(sparsity.detach()), scheduled, keep["hidden"].detach().sum())

    def _sampler(
        self, gated: GatedModel, input_ids: Tensor, log_var: dict[Axis, Tensor], index: int, world: World
    ) -> Any:
        """What multiplies an activation: the gate plus sigma times noise."""
        if self._noise is None:
            weight = next(gated.model.parameters())
            size = pool_size(self.topology, input_ids.shape[1])
            self._noise = NoisePool(self._seed, weight.device, weight.dtype, size)
        noise, rows = self._noise, self.topology.query_rows
        size = self.options.batch_size
        noise.start_step(index, range(size)[world.part(size, "learn_masks.paper.batch_size")])
        sigma = {axis: torch.exp(log_var[axis] / 2) for axis in self.axes}

        def sample(axis: Axis, layer: int, site: Site | None, gate: Tensor, shape: torch.Size) -> Tensor:
            if axis not in sigma:
                return gate
            spread = sigma[axis] if axis == "hidden" else sigma[axis][layer]
            if axis == "kv_heads":
                spread = spread.repeat_interleave(rows)
            of_layer = 3 if site is None else GATED_SITES.index(site)
            number = 0 if axis == "hidden" and site is None else 1 + 4 * layer + of_layer
            drawn = noise.draw(shape, number)
            return torch.addcmul(gate.to(drawn.dtype), drawn, spread.to(drawn.dtype))

        return sample

    def learned(self) -> tuple[Masks, WeightUpdate]:
        """Masks from log_alpha, projected onto the target, and means; on the CPU."""
        scores = {axis: log_alpha(self.mean[axis], self.log_var[axis]).cpu() for axis in AXES}
        means = {axis: mean.cpu() for axis, mean in self.mean.items()}
        return project(self.topology, scores, self.target_sparsity, self.axes), WeightUpdate(means)

    def state_dict(self) -> dict[str, Any]:
        return {
            "mean": self.mean,
            "log_var": self.log_var,
            "multipliers": self.multipliers,
            "optimizer": self._optimizer.state_dict(),
            "ascent": self._ascent.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for axis in AXES:
            self.mean[axis].copy_(state["mean"][axis])
            self.log_var[axis].copy_(state["log_var"][axis])
        self.multipliers.copy_(state["multipliers"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._ascent.load_state_dict(state["ascent"])
