"""How a loaded model runs: as it is, compiled, or packed for a CPU, with reordered weights and fewer operations.

On a CPU, decoding a token is reading every weight and calling some 2,500 operations. With stock modules, pruning gains
little: torch reads bfloat16 at half the speed of oneDNN's own format, and smaller operations are no faster to call.
"""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tvaprune.architecture.topology import decoder, decoder_layers, final_norm
from tvaprune.runtime.single_token import DecoderForward

Runtime = Literal["eager", "packed", "graphs", "compile"]


def pick_runtime(name: Runtime | Literal["auto"], device: torch.device) -> Runtime:
    """`auto`: graphs on CUDA, packed on a CPU with oneDNN, else eager. Raises ValueError for graphs without CUDA."""
    if name == "graphs" and device.type != "cuda":
        raise ValueError(f"runtime graphs: needs a CUDA device, not {device}; use auto or eager")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "graphs"
    return "packed" if device.type == "cpu" and torch.backends.mkldnn.is_available() else "eager"


def prepare(model: PreTrainedModel, runtime: Runtime) -> PreTrainedModel:
    """Change a model in evaluation mode for inference, in place; its logits change only by rounding.

    eager and graphs change nothing; the caller captures CUDA graphs (`runtime.passes`). compile is torch.compile, at
    the first calls. packed reorders the weights: the model can no longer be trained or saved, and `parameters()` no
    longer yields them. Raises ValueError if packed lacks a CPU with oneDNN, float32 or bfloat16, or sdpa.
    """
    if runtime == "compile":
        model.compile()
    elif runtime == "packed":
        _check_packable(model)
        model.requires_grad_(False)
        _pack(model)
    return model


def _check_packable(model: PreTrainedModel) -> None:
    attention = model.config._attn_implementation
    if model.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        raise ValueError(f"runtime packed: needs a CPU and torch with oneDNN, not {model.device}; use eager or compile")
    if model.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"runtime packed: no kernels for {model.dtype}; load the model as float32 or bfloat16")
    if attention != "sdpa":
        raise ValueError(f"runtime packed: replaces sdpa attention, not {attention!r}; load the model with sdpa")


def _pack(model: PreTrainedModel) -> None:
    body = decoder(model)
    for layer in decoder_layers(model):
        # A block without units, or only a bias, has nothing to pack.
        if hasattr(layer.self_attn, "q_proj"):
            layer.self_attn = PackedAttention(layer.self_attn)
            layer.input_layernorm = PackedNorm(layer.input_layernorm)
        if hasattr(layer.mlp, "gate_proj"):
            layer.mlp = PackedMLP(layer.mlp)
            layer.post_attention_layernorm = PackedNorm(layer.post_attention_layernorm)
    body.norm = PackedNorm(final_norm(model))
    body.rotary_emb = SignedRotary(body.get_submodule("rotary_emb"))
    body.forward = DecoderForward(body)
    model.lm_head = PackedLinear(model.lm_head)


class PackedLinear(nn.Module):
    """Linear layers with the same input as one product; their outputs are concatenated.

    bfloat16 weights are in oneDNN's own format, which it reads 1.6 times as fast; processors without AVX-512 have none.
    In float32 the library is MKL, which is faster with column-major weights for wide outputs and row-major for others.
    """

    def __init__(self, *linears: Any) -> None:
        super().__init__()
        weight = torch.cat([linear.weight for linear in linears])
        self.blocked = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if self.blocked:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        elif weight.dtype == torch.float32 and weight.shape[0] >= weight.shape[1]:
            weight = weight.t().contiguous().t()
        self.packed, self.transposed = weight, weight.t()
        self.bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])

    def forward(self, inputs: Float[Tensor, "*batch in_width"]) -> Float[Tensor, "*batch out_width"]:
        if self.blocked:
            return torch.ops.mkldnn._linear_pointwise(inputs, self.packed, self.bias, "none", [], "")
        return functional.linear(inputs, self.packed, self.bias)

    def add_to(
        self, residual: Float[Tensor, "batch out_width"], inputs: Float[Tensor, "batch in_width"]
    ) -> Float[Tensor, "batch out_width"]:
        """The residual plus the product, a new tensor."""
        if self.blocked or self.bias is not None:
            return self(inputs).add_(residual)
        return torch.addmm(residual, inputs, self.transposed)


class PackedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up as one product."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_up = PackedLinear(mlp.gate_proj, mlp.up_proj)
        self.down = PackedLinear(mlp.down_proj)
        self.activation = mlp.act_fn

    def forward(self, hidden_states: Float[Tensor, "batch seq hidden"]) -> Float[Tensor, "batch seq hidden"]:
        gate, up = self.gate_up(hidden_states).chunk(2, dim=-1)
        return self.down(self.activation(gate) * up)


class PackedAttention(nn.Module):
    """Grouped-query attention; query, key and value as one product, rotated together."""

    is_causal = True

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.qkv = PackedLinear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.output = PackedLinear(attention.o_proj)
        self.q_norm, self.k_norm = (
            PackedNorm(getattr(attention, name)) if hasattr(attention, name) else None for name in ("q_norm", "k_norm")
        )
        self.head_dim, self.scaling, self.layer_idx = attention.head_dim, attention.scaling, attention.layer_idx
        self.num_key_value_groups = attention.num_key_value_groups
        self.heads = attention.q_proj.out_features // self.head_dim
        self.kv_heads = attention.k_proj.out_features // self.head_dim

    def forward(
        self,
        hidden_states: Float[Tensor, "batch seq hidden"],
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> tuple[Float[Tensor, "batch seq hidden"], None]:
        batch, length, _width = hidden_states.shape
        heads, kv_heads = self.heads, self.kv_heads
        cos, sin = position_embeddings
        projected = self.qkv(hidden_states).view(batch, length, -1, self.head_dim)
        turned, value = projected.split((heads + kv_heads, kv_heads), dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            turned = torch.cat([self.q_norm(turned[:, :, :heads]), self.k_norm(turned[:, :, heads:])], dim=2)
        turned = turned * cos + turned.roll(self.head_dim // 2, -1) * sin
        query, key = turned.transpose(1, 2).split((heads, kv_heads), dim=1)
        value = value.transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        if length == 1 and attention_mask is None:
            # The heads of a group as rows of one product with their keys: torch's kernel is 4 times slower otherwise.
            query = query.reshape(batch, kv_heads, self.num_key_value_groups, self.head_dim)
            attended = functional.scaled_dot_product_attention(query, key, value, scale=self.scaling)
        else:
            attended, _weights = sdpa_attention_forward(self, query, key, value, attention_mask, scaling=self.scaling)
        return self.output(attended.reshape(batch, length, -1)), None


class SignedRotary(nn.Module):
    """The model's rotary embedding with the first half of the sine negated: rotating is a roll and two products."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, hidden_states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines, each [batch, seq, 1, head_dim]."""
        cos, sin = self.rotary(hidden_states, position_ids)
        first, second = sin.chunk(2, dim=-1)
        return cos.unsqueeze(2), torch.cat([-first, second], dim=-1).unsqueeze(2)


class PackedNorm(nn.Module):
    """RMSNorm; for single tokens by torch's LayerNorm, which is one operation instead of eight.

    [x, -x] has mean 0 and variance mean(x^2), so the first half of its LayerNorm is x / sqrt(mean(x^2) + eps).
    """

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon
        self.width = norm.weight.shape[0]
        self.doubled = torch.cat([norm.weight, norm.weight])
        self.signs = norm.weight.new_tensor([[1.0], [-1.0]])

    def forward(self, inputs: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Two dimensions mean single tokens."""
        if inputs.dim() > 2:
            return functional.rms_norm(inputs, (self.width,), self.weight, self.eps)
        mirrored = (inputs.unsqueeze(1) * self.signs).view(-1, 2 * self.width)
        normed = torch.layer_norm(mirrored, (2 * self.width,), self.doubled, None, self.eps)
        return normed.narrow(1, 0, self.width).contiguous()
