"""Gates put into a dense model's forward, over frozen weights.

Where they multiply (TVA-Prune section 3.1; method per axis):
    hidden        the embedding output, the output of every o_proj, the output of every down_proj
    intermediate  act(gate)·up, the input of down_proj
    kv_heads      the attention output before o_proj, all query heads of the group together
The output of every k_proj is multiplied where factors are given for it (`grasprune`); a gate of kv_heads is not there.

Query head h belongs to key-value head h // group_size (repeat_interleave, as in transformers). The paper's
Eq. 2 and the published code tile (h mod kv_heads), which is wrong for every Hugging Face checkpoint.

Departure: a mean per channel and layer may multiply as well at the outputs of o_proj and down_proj and before o_proj.
It folds into the same rows and columns. One mean for a whole head, or for a dimension in all layers, is coarse.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tvaprune.architecture.topology import Site, Topology, embedding, final_norm, layer_modules
from tvaprune.options.axes import AXES, Axis

# From an axis, a layer, a site, a gate [channels] and an activation's shape to the factor that multiplies it.
Sample = Callable[[Axis, int, Site | None, Tensor, torch.Size], Tensor]


class SquaredGradients:
    """Squares of the gates' gradients, each summed over one block of tokens; the sum over a backward's blocks.

    Each square is a draw of a gate's Fisher information. A whole window gives one draw, with a relative standard
    deviation of √2; its blocks give many from the same backward. The products of positions in different blocks, which
    a gate reaches together through attention, are lost. A window must be a multiple of `block_tokens`. The backward
    adds to `sums`, which has the shapes of `Topology.gate_shape`.
    """

    def __init__(self, topology: Topology, block_tokens: int, device: torch.device) -> None:
        self._block_tokens = block_tokens
        self.sums = {axis: torch.zeros(topology.gate_shape(axis), device=device) for axis in AXES}

    def expand(
        self, gate: Float[Tensor, " units"], tokens: int, axis: Axis, layer: int
    ) -> Float[Tensor, "blocks units"]:
        """One gate for each block, whose gradients are squared and added on their way back."""
        sums = self.sums[axis] if axis == "hidden" else self.sums[axis][layer]
        rows = gate.expand(tokens // self._block_tokens, -1)

        def add(gradient: Tensor) -> None:
            sums.add_(gradient.square().sum(0))

        if rows.requires_grad:
            rows.register_hook(add)
        return rows


class _Multiply(torch.autograd.Function):
    """x · z, with z [channels] or [blocks, channels], one row for each of equally many consecutive tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor) -> Tensor:
        shape = x.shape
        ctx.blocks = z.dim() == 2
        if ctx.blocks:
            x = x.reshape(len(z), -1, shape[-1])
            z = z[:, None]
        factor = z.to(x.dtype)
        ctx.save_for_backward(x, factor)
        return (x * factor).view(shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, Tensor | None]:
        x, factor = ctx.saved_tensors
        shape = gradients[0].shape
        gradient = gradients[0].reshape(x.shape)
        grad_z = None
        if ctx.needs_input_grad[1]:
            over = 1 if ctx.blocks else tuple(range(x.dim() - 1))
            grad_z = (gradient * x).sum(over, dtype=torch.float32)
        grad_x = (gradient * factor).view(shape) if ctx.needs_input_grad[0] else None
        return grad_x, grad_z


class GatedModel:
    """A dense causal LM whose forward multiplies by gates, for as long as the context lasts.

    Set the gates with `set` before each forward. Without gates the model is the dense one.
    """

    def __init__(self, model: nn.Module, topology: Topology) -> None:
        self.model = model
        self.topology = topology
        self.clear()

    def set(
        self,
        gates: dict[Axis, Float[Tensor, "..."]],
        kept_hidden: int,
        channel_means: dict[Site, Float[Tensor, "..."]] | None = None,
        squares: SquaredGradients | None = None,
        sample: Sample | None = None,
    ) -> None:
        """Use these gates from the next forward on.

        Args:
            gates: shapes of `Topology.gate_shape`; 0 drops a unit. Gradients flow to them and to the channel means.
            kept_hidden: residual dimensions whose gate is not 0. RMSNorm takes its mean square over these only,
                as the compact model will; the published training averages over all of them.
            channel_means: shapes of `Topology.site_shape`, multiplied with the gates; at keys there is no gate.
            squares: where the next backward adds the squares of the gates' gradients.
            sample: gives what multiplies an activation in place of its gate; gates with noise.
        """
        self._gates, self._channel_means, self._sample = gates, channel_means or {}, sample
        self._squares = squares
        self._hidden_rows: Tensor | None = None
        self._norm_scale = (self.topology.hidden / kept_hidden) ** 0.5

    def clear(self) -> None:
        """The dense model again."""
        self.set({}, self.topology.hidden)

    def _multiply(self, x: Tensor, axis: Axis, layer: int, site: Site | None) -> Tensor:
        gate = self._gates.get(axis)
        if gate is None:
            return x
        if axis != "hidden":
            gate = gate[layer]
        if self._squares is not None:
            gate = self._by_blocks(self._squares, gate, x.shape[:-1].numel(), axis, layer)
        if axis == "kv_heads":
            gate = gate.repeat_interleave(self.topology.query_rows, -1)
        if site in self._channel_means:
            gate = gate * self._channel_means[site][layer]
        if self._sample is not None:
            return x * self._sample(axis, layer, site, gate, x.shape).to(x.dtype)
        return _Multiply.apply(x, gate)

    def _multiply_keys(self, keys: Tensor, layer: int) -> Tensor:
        factor = self._channel_means.get("keys")
        return keys if factor is None else _Multiply.apply(keys, factor[layer])

    def _by_blocks(self, squares: SquaredGradients, gate: Tensor, tokens: int, axis: Axis, layer: int) -> Tensor:
        if axis != "hidden":
            return squares.expand(gate, tokens, axis, layer)
        # One for all sites, so that a block's gradients are summed over the sites before they are squared.
        if self._hidden_rows is None:
            self._hidden_rows = squares.expand(gate, tokens, axis, layer)
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

        def after_keys(module: nn.Module, layer: int) -> None:
            def hook(_: nn.Module, args: Any, out: Tensor) -> Tensor:
                return self._multiply_keys(out, layer)

            handles.append(module.register_forward_hook(hook))

        norms = [final_norm(self.model)]
        for layer in layer_modules(self.model):
            norms += [layer.input_norm, layer.post_norm]
        epsilons: list[Any] = [norm.variance_epsilon for norm in norms]
        try:
            after_hidden(embedding(self.model), 0, None)
            for index, layer in enumerate(layer_modules(self.model)):
                after_keys(layer.k_proj, index)
                before(layer.o_proj, "kv_heads", index, "attention_in")
                after_hidden(layer.o_proj, index, "attention_out")
                before(layer.down_proj, "intermediate", index, None)
                after_hidden(layer.down_proj, index, "mlp_out")
            for norm, epsilon in zip(norms, epsilons, strict=True):
                handles.append(norm.register_forward_pre_hook(self._before_norm(epsilon)))
                handles.append(norm.register_forward_hook(self._after_norm))
            yield self
        finally:
            self.clear()
            for handle in handles:
                handle.remove()
            for norm, epsilon in zip(norms, epsilons, strict=True):
                norm.variance_epsilon = epsilon

    # With the dropped dimensions at zero, a mean square over the d' kept ones is the stock norm with
    # eps · d'/d, its output divided by sqrt(d / d'): x / sqrt(sum/d' + eps) = x·sqrt(d'/d) / sqrt(sum/d + eps·d'/d).
    def _before_norm(self, epsilon: float) -> Any:
        def hook(norm: nn.Module, args: Any) -> None:
            norm.variance_epsilon = epsilon / self._norm_scale**2

        return hook

    def _after_norm(self, norm: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out if self._norm_scale == 1.0 else out / self._norm_scale


def hard_gates(
    keep: dict[Axis, Bool[Tensor, "..."]], mean: dict[Axis, Float[Tensor, "..."]] | None = None
) -> dict[Axis, Float[Tensor, "..."]]:
    """Evaluation gates z = mean · keep; the mean is 1 where none is given."""
    return {axis: keep[axis].float() * (1 if mean is None else mean[axis]) for axis in AXES}
