"""Gates put into a dense model's forward, over frozen weights.

Where they multiply (TVA-Prune section 3.1; method per axis):
    hidden        the embedding output, the output of every o_proj, the output of every down_proj
    intermediate  act(gate)·up, the input of down_proj
    kv_heads      the attention output before o_proj, all query heads of the group together

Query head h belongs to key-value head h // group_size (repeat_interleave, as in transformers). The paper's
Eq. 2 and the published code tile (h mod kv_heads), which is wrong for every Hugging Face checkpoint.

Departure: at the outputs of o_proj and down_proj and before o_proj, a mean by channel and layer may multiply as well
(`channel_mu`). It folds into the same rows and columns, and a gate's one mean for a whole head, or for a residual
dimension in all layers, is coarse.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tvaprune.architecture.topology import AXES, Axis, Site, Topology, embedding, final_norm, layer_modules


class NoisePool:
    """Standard normals drawn once and read at random offsets.

    A gate's noise takes a draw per token and unit, tens of millions a step, which costs more than the
    model's own matmuls on a CPU. Slices of one large pool cost a read. Draws within a slice are
    independent; slices may overlap between sites and steps.

    Every window has offsets of its own, a function of the seed, the step and its index in the whole batch, so that a
    batch draws the same on one process and on many.

    Args:
        seed: of the pool and of the offsets.
        size: normals in the pool; a window's slice larger than this raises.
    """

    def __init__(self, seed: int, device: torch.device, dtype: torch.dtype, size: int = 1 << 23) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._pool = torch.randn(size, generator=generator).to(device=device, dtype=dtype)
        self._seed = seed
        self._offsets: list[torch.Generator] = []

    def start_step(self, step: int, windows: Sequence[int]) -> None:
        """Begin a step.

        Args:
            step: from 0.
            windows: indices in the whole batch of the windows that this process computes, in order.
        """
        self._offsets = [
            torch.Generator().manual_seed((self._seed * 1_000_003 + step) * 1009 + window) for window in windows
        ]

    def draw(self, shape: torch.Size) -> Tensor:
        """Normals of the shape [windows, ...], in the pool's dtype."""
        count = shape[1:].numel()
        if count > self._pool.numel():
            raise ValueError(f"a slice of {count} normals does not fit the pool of {self._pool.numel()}")
        starts = self._pool.numel() - count + 1
        drawn = []
        for offsets in self._offsets:
            offset = int(torch.randint(starts, (1,), generator=offsets))
            drawn.append(self._pool[offset : offset + count].view(shape[1:]))
        return drawn[0][None] if len(drawn) == 1 else torch.stack(drawn)


class GradientDraws:
    """Squares of the gates' gradients, each the sum over one stretch of tokens, summed over a backward's stretches.

    Each is a draw of a gate's Fisher information. A window's sum squared is one draw with a relative standard deviation
    of √2; its stretches give many from the same backward. What is lost are the products of positions in different
    stretches, which a gate reaches together through attention.

    Args:
        tokens: of a stretch; a window must be a multiple of it.

    Attributes:
        squares: float32 per axis, shapes of `Topology.gate_shape`; the backward adds to it.
    """

    def __init__(self, topology: Topology, tokens: int, device: torch.device) -> None:
        self._tokens = tokens
        self.squares = {axis: torch.zeros(topology.gate_shape(axis), device=device) for axis in AXES}

    def split(self, gate: Tensor, tokens: int, axis: Axis, layer: int) -> Tensor:
        """One gate for each stretch, [units] to [stretches, units], whose gradients are seen on their way back."""
        squares = self.squares[axis] if axis == "hidden" else self.squares[axis][layer]
        rows = gate.expand(tokens // self._tokens, -1)

        def add(gradient: Tensor) -> None:
            squares.add_(gradient.square().sum(0))

        if rows.requires_grad:
            rows.register_hook(add)
        return rows


class _Multiply(torch.autograd.Function):
    """x · z + x · sigma · eps, with gradients for x, z and sigma and nothing kept that can be read again.

    z is [width], or [stretches, width] with one row for each of equally many consecutive tokens.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor, sigma: Tensor | None, noise: Tensor | None) -> Tensor:
        shape = x.shape
        ctx.stretches = z.dim() == 2
        if ctx.stretches:
            x = x.reshape(len(z), -1, shape[-1])
            z = z[:, None]
            noise = None if noise is None else noise.reshape(x.shape)
        if sigma is not None and noise is not None:
            factor = torch.addcmul(z.to(x.dtype), noise, sigma.to(x.dtype))
        else:
            factor = z.to(x.dtype)
        ctx.save_for_backward(x, factor, noise)
        return (x * factor).view(shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (gradient,) = gradients
        x, factor, noise = ctx.saved_tensors
        shape = gradient.shape
        gradient = gradient.reshape(x.shape)
        grad_z = grad_sigma = None
        if ctx.needs_input_grad[1]:
            product = gradient * x
            over = 1 if ctx.stretches else tuple(range(x.dim() - 1))
            grad_z = product.sum(over, dtype=torch.float32)
            if ctx.needs_input_grad[2]:
                grad_sigma = (product * noise).flatten(0, -2).sum(0, dtype=torch.float32)
        grad_x = (gradient * factor).view(shape) if ctx.needs_input_grad[0] else None
        return grad_x, grad_z, grad_sigma, None


class GatedModel:
    """A dense model whose forward multiplies by gates, for as long as the context lasts.

    Set the gates with `set` before each forward. Without gates the model is the dense one.

    Args:
        model: a causal LM of a supported family; its weights are not touched.
        topology: its sizes.
    """

    def __init__(self, model: nn.Module, topology: Topology) -> None:
        self.model = model
        self.topology = topology
        self._gates: dict[Axis, Tensor] = {}
        self._sigma: dict[Axis, Tensor] = {}
        self._channel_mu: dict[Site, Tensor] = {}
        self._noise: NoisePool | None = None
        self._draws: GradientDraws | None = None
        self._hidden_rows: Tensor | None = None
        self._norm_scale = 1.0

    def set(
        self,
        gates: dict[Axis, Tensor],
        kept_hidden: int,
        sigma: dict[Axis, Tensor] | None = None,
        noise: NoisePool | None = None,
        channel_mu: dict[Site, Tensor] | None = None,
        draws: GradientDraws | None = None,
    ) -> None:
        """Use these gates from the next forward on.

        Args:
            gates: float32 per axis, shapes of `Topology.gate_shape`; 0 drops a unit. Gradients flow to them.
            kept_hidden: residual dimensions whose gate is not 0. RMSNorm takes its mean square over these only,
                as the compact model will; the published training averages over all of them, and leaks.
            sigma: standard deviations of multiplicative noise, same shapes; 0 for a dropped unit.
            noise: where the normals come from; needed with sigma.
            channel_mu: float32 per site, shapes of `Topology.site_shape`, beside the gates' own means; noise is
                relative to it. Gradients flow to it.
            draws: where the next backward adds the squares of the gates' gradients.
        """
        self._gates, self._sigma, self._noise, self._channel_mu = gates, sigma or {}, noise, channel_mu or {}
        self._draws, self._hidden_rows = draws, None
        self._norm_scale = (self.topology.hidden / kept_hidden) ** 0.5

    def clear(self) -> None:
        """The dense model again."""
        self._gates, self._sigma, self._channel_mu, self._noise, self._norm_scale = {}, {}, {}, None, 1.0
        self._draws = self._hidden_rows = None

    def _multiply(self, x: Tensor, axis: Axis, layer: int, site: Site | None) -> Tensor:
        gate = self._gates.get(axis)
        if gate is None:
            return x
        sigma = self._sigma.get(axis)
        if axis != "hidden":
            gate = gate[layer]
            sigma = None if sigma is None else sigma[layer]
        if self._draws is not None:
            gate = self._split(self._draws, gate, x.shape[:-1].numel(), axis, layer)
        if axis == "kv_heads":
            rows = self.topology.query_rows
            gate = gate.repeat_interleave(rows, -1)
            sigma = None if sigma is None else sigma.repeat_interleave(rows)
        if site in self._channel_mu:
            mean = self._channel_mu[site][layer]
            gate = gate * mean
            sigma = None if sigma is None else sigma * mean.detach().abs()
        noise = self._noise.draw(x.shape) if sigma is not None and self._noise is not None else None
        return _Multiply.apply(x, gate, sigma, noise)

    def _split(self, draws: GradientDraws, gate: Tensor, tokens: int, axis: Axis, layer: int) -> Tensor:
        if axis != "hidden":
            return draws.split(gate, tokens, axis, layer)
        # One for all sites, so that a stretch's gradients are summed over them before they are squared.
        if self._hidden_rows is None:
            self._hidden_rows = draws.split(gate, tokens, axis, layer)
        return self._hidden_rows

    @contextmanager
    def inserted(self) -> Iterator["GatedModel"]:
        """Attach the gates; detach them on leaving, whatever happens."""
        handles = []

        def before(module: nn.Module, axis: Axis, layer: int, site: Site | None) -> None:
            def hook(_: nn.Module, args: Any) -> Any:
                return (self._multiply(args[0], axis, layer, site), *args[1:])

            handles.append(module.register_forward_pre_hook(hook))

        def after_hidden(module: nn.Module, layer: int, site: Site | None) -> None:
            def hook(_: nn.Module, args: Any, out: Tensor) -> Tensor:
                return self._multiply(out, "hidden", layer, site)

            handles.append(module.register_forward_hook(hook))

        norms: list[tuple[nn.Module, float]] = []
        try:
            after_hidden(embedding(self.model), 0, None)
            norms.append((final_norm(self.model), 0.0))
            for index, layer in enumerate(layer_modules(self.model)):
                before(layer.o_proj, "kv_heads", index, "attention_in")
                after_hidden(layer.o_proj, index, "attention_out")
                before(layer.down_proj, "intermediate", index, None)
                after_hidden(layer.down_proj, index, "mlp_out")
                norms += [(layer.input_norm, 0.0), (layer.post_norm, 0.0)]
            norms = [(norm, norm.variance_epsilon) for norm, _ in norms]  # type: ignore[misc]
            for norm, epsilon in norms:
                handles.append(norm.register_forward_pre_hook(self._before_norm(epsilon)))
                handles.append(norm.register_forward_hook(self._after_norm))
            yield self
        finally:
            self.clear()
            for handle in handles:
                handle.remove()
            for norm, epsilon in norms:
                norm.variance_epsilon = epsilon  # type: ignore[assignment]

    # With the dropped dimensions at zero, a mean square over the d' kept ones is the stock norm with
    # eps · d'/d, its output divided by sqrt(d / d'): x / sqrt(sum/d' + eps) = x·sqrt(d'/d) / sqrt(sum/d + eps·d'/d).
    def _before_norm(self, epsilon: float) -> Any:
        def hook(norm: nn.Module, args: Any) -> None:
            norm.variance_epsilon = epsilon / self._norm_scale**2  # type: ignore[assignment]

        return hook

    def _after_norm(self, norm: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out if self._norm_scale == 1.0 else out / self._norm_scale


def hard_gates(keep: dict[Axis, Tensor], mu: dict[Axis, Tensor] | None = None) -> dict[Axis, Tensor]:
    """Evaluation gates z = mu · keep (bool masks and float32 means to float32); mu 1 where none is given."""
    return {axis: keep[axis].float() * (1 if mu is None else mu[axis]) for axis in AXES}
