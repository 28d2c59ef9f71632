"""Decoding one token with a packed model: the computation of the stock forward with fewer Python calls.

Stock modules spend more time on calling each other, whatever the widths, than a narrow layer takes to compute.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

# What `DecoderForward` computes itself; with any other input it calls the stock forward.
_HANDLED = {"attention_mask", "position_ids", "past_key_values", "use_cache", "return_dict"}


class DecoderForward:
    """The forward of a packed decoder: the stock one, except for single tokens with a growing cache."""

    def __init__(self, body: Any) -> None:
        self.config, self.stock = body.config, body.forward
        self.embed, self.rotary, self.norm = body.embed_tokens, body.rotary_emb, body.norm
        self.layers = [LayerStep(layer) for layer in body.layers]
        self.cached = 1 + max((layer.index for layer in self.layers if layer.has_heads), default=0)

    def __call__(self, input_ids: Tensor | None = None, **inputs: Any) -> Any:
        if input_ids is None or input_ids.shape[1] != 1 or not self._handles(inputs):
            return self.stock(input_ids=input_ids, **inputs)
        cache, position_ids = inputs["past_key_values"], inputs.get("position_ids")
        if position_ids is None:
            position_ids = torch.full_like(input_ids[:1], cache.get_seq_length())
        hidden = self.embed(input_ids[:, 0])
        cos, sin = self.rotary(hidden, position_ids)
        for layer in self.layers:
            hidden = layer(hidden, cos, sin, cache)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden).unsqueeze(1), past_key_values=cache)

    def _handles(self, inputs: dict[str, Any]) -> bool:
        """Whether nothing is padded, nothing else is asked for, and the cache holds all past tokens of each layer."""
        cache: Any = inputs.get("past_key_values")
        mask = inputs.get("attention_mask")
        return (
            type(cache) is DynamicCache
            and not cache.offloading
            and len(cache.layers) >= self.cached
            and all(type(layer) is DynamicLayer for layer in cache.layers)
            and (mask is None or (mask.dim() == 2 and bool(mask.all())))
            and not (self.config.output_attentions or self.config.output_hidden_states)
            and all(value is None for name, value in inputs.items() if name not in _HANDLED)
        )


class LayerStep:
    """A packed decoder layer for one token a sequence.

    It keeps the submodules' functions as attributes, because looking up a submodule costs as much as a small operation.
    Only the norms are called as modules, so that hooks on them can time the blocks.
    """

    def __init__(self, layer: Any) -> None:
        self.input_norm, self.post_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.attention, self.mlp = layer.self_attn, layer.mlp
        self.index: int = layer.self_attn.layer_idx
        self.has_heads, self.has_mlp = hasattr(layer.self_attn, "qkv"), hasattr(layer.mlp, "gate_up")
        if self.has_heads:
            attention = layer.self_attn
            self.qkv, self.add_output = attention.qkv.forward, attention.output.add_to
            self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
            self.heads, self.kv_heads, self.head_dim = attention.heads, attention.kv_heads, attention.head_dim
            self.scaling = attention.scaling
            self.stacked = (-1, self.kv_heads, attention.num_key_value_groups, self.head_dim)
        if self.has_mlp:
            self.gate_up, self.add_down = layer.mlp.gate_up.forward, layer.mlp.down.add_to
            self.activation = layer.mlp.activation.forward

    def __call__(
        self, hidden: Float[Tensor, "batch hidden"], cos: Tensor, sin: Tensor, cache: DynamicCache
    ) -> Float[Tensor, "batch hidden"]:
        """`cos`, `sin`: from `SignedRotary`, [batch or 1, 1, 1, head_dim]; the cache gets the key and the value."""
        normed = self.input_norm(hidden)
        if self.has_heads:
            hidden = self.add_output(hidden, self._attend(normed, cos, sin, cache))
        else:
            hidden = hidden + self.attention(normed.unsqueeze(1), past_key_values=cache)[0]
        normed = self.post_norm(hidden)
        if not self.has_mlp:
            return hidden + self.mlp(normed)
        gate, up = self.gate_up(normed).chunk(2, 1)
        return self.add_down(hidden, self.activation(gate).mul_(up))

    def _attend(
        self, normed: Float[Tensor, "batch hidden"], cos: Tensor, sin: Tensor, cache: DynamicCache
    ) -> Float[Tensor, "batch heads_width"]:
        heads, kv_heads, width = self.heads, self.kv_heads, self.head_dim
        projected = self.qkv(normed).view(-1, heads + 2 * kv_heads, 1, width)
        turned = projected.narrow(1, 0, heads + kv_heads)
        if self.q_norm is not None:
            query = self.q_norm(turned[:, :heads].reshape(-1, width)).view(-1, heads, 1, width)
            key = self.k_norm(turned[:, heads:].reshape(-1, width)).view(-1, kv_heads, 1, width)
            turned = torch.cat([query, key], dim=1)
        turned = turned.roll(width // 2, -1).mul_(sin).addcmul_(turned, cos)
        keys, values = cache.layers[self.index].update(
            turned.narrow(1, heads, kv_heads), projected.narrow(1, heads + kv_heads, kv_heads)
        )
        # The heads of a group as rows of one product with their keys: torch's kernel is 4 times slower otherwise.
        query = turned.narrow(1, 0, heads).view(self.stacked)
        attended = functional.scaled_dot_product_attention(query, keys, values, scale=self.scaling)
        return attended.reshape(-1, heads * width)
