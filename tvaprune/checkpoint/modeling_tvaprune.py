"""A decoder whose layers have widths of their own: Llama, Mistral, Qwen2 or Qwen3 blocks from transformers.

This file travels with the checkpoint, so it imports torch and transformers alone. Every layer is the stock
decoder layer of the base family, built with that layer's sizes; a block that lost every unit is left out.
"""

import copy
import sys
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils import can_return_tuple


class TvaPruneConfig(PreTrainedConfig):
    """The base model's config, with the pruned widths.

    Args:
        base_model_type: llama, mistral, qwen2 or qwen3.
        base_config: the dense model's config as a dict. Its keys are attributes here too, and it is these that count:
            an argument of from_pretrained, or an edit of config.json, replaces the dense model's value.
        hidden_size: kept residual dimensions.
        intermediate_sizes: MLP units per layer; 0 = no MLP.
        kv_head_counts: key-value heads per layer; 0 = no attention.
        projection_bias: o_proj and down_proj have biases that the base model has not.
    """

    model_type = "tvaprune"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        base_model_type: str = "llama",
        base_config: dict[str, Any] | None = None,
        hidden_size: int | None = None,
        intermediate_sizes: list[int] | None = None,
        kv_head_counts: list[int] | None = None,
        projection_bias: bool = False,
        **kwargs: Any,
    ) -> None:
        base = CONFIG_MAPPING[base_model_type](**(base_config or {}))
        kwargs.pop("per_layer_config", None)  # follows from the counts
        for key, value in base.to_dict().items():
            if key not in ("model_type", "architectures", "transformers_version", "dtype", "auto_map"):
                kwargs.setdefault(key, value)
        self.base_model_type = base_model_type
        self.base_config = base_config or {}
        self.intermediate_sizes = intermediate_sizes or [base.intermediate_size] * base.num_hidden_layers
        self.kv_head_counts = kv_head_counts or [base.num_key_value_heads] * base.num_hidden_layers
        self.projection_bias = projection_bias
        kwargs["hidden_size"] = hidden_size or base.hidden_size
        kwargs["head_dim"] = getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads
        use_cache = kwargs.pop("use_cache", True)
        super().__init__(**kwargs)
        self.use_cache = use_cache  # which the constructor would drop, as a parameter of generation
        # Static caches and serving backends read the counts of each layer here. The global ones stay readable: they are
        # the dense model's, and transformers warns whoever reads them.
        self.allow_global_per_layer_attribute_access = True
        group_size = base.num_attention_heads // base.num_key_value_heads
        self.per_layer_config = {
            layer: {
                "num_key_value_heads": self.cached_heads(layer),
                "num_attention_heads": self.cached_heads(layer) * group_size,
                "intermediate_size": self.intermediate_sizes[layer],
            }
            for layer in range(base.num_hidden_layers)
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """What save_pretrained writes: also values that are a default of the class, but not the dense model's."""
        dense = CONFIG_MAPPING[self.base_model_type](**self.base_config).to_dict()
        changed = {key: value for key, value in self.to_dict().items() if key in dense and value != dense[key]}
        return {**changed, **super().to_diff_dict()}

    def cached_heads(self, layer: int) -> int:
        """Key-value heads that the layer's cache holds: one where the layer has none.

        Caches of transformers read the length off layer 0, and vLLM takes no layer without a cache.
        """
        return max(self.kv_head_counts[layer], 1)

    def layer_config(self, layer: int) -> PreTrainedConfig:
        """The base family's config with the sizes of one layer."""
        base = CONFIG_MAPPING[self.base_model_type](**self.base_config)
        group_size = base.num_attention_heads // base.num_key_value_heads
        own = vars(self)
        vars(base).update({key: own[key] for key in vars(base).keys() & own.keys() if not key.startswith("_")})
        # Past the constructor, whose check of hidden_size against the head count (LlamaConfig) is about
        # deriving head_dim; here head_dim is explicit.
        vars(base).update(
            hidden_size=self.hidden_size,
            head_dim=self.head_dim,
            intermediate_size=self.intermediate_sizes[layer],
            num_key_value_heads=self.kv_head_counts[layer],
            num_attention_heads=self.kv_head_counts[layer] * group_size,
        )
        return base


class _Constant(nn.Module):
    """What is left of a projection without inputs: its bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self) -> torch.Tensor:
        """The bias, through a call, because that is where weights that were offloaded come back."""
        return self.bias


class _NoHeads(nn.Module):
    """Stands where a layer has no key-value head left: adds o_proj's bias to the residual, or nothing.

    (transformers takes a module file with a class named *Attention* for one with attention code of its own.)
    """

    def __init__(self, config: TvaPruneConfig, layer_idx: int, o_proj: _Constant | None) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.o_proj = o_proj

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor | float, torch.Tensor | None]:
        batch, tokens, _ = hidden_states.shape
        sliding = getattr(self.config, "sliding_window", None) is not None
        if past_key_values is not None and (self.layer_idx == 0 or sliding):
            # Caches read the sequence length off layer 0, and those of a sliding window crop no layer without keys.
            placeholder = hidden_states.new_zeros(batch, 1, tokens, self.config.head_dim)
            past_key_values.update(placeholder, placeholder, self.layer_idx)
        implementation = self.config._attn_implementation
        if implementation == "vllm":
            # vLLM takes no layer that does not call the attention function, which it looks for in the source: one
            # assignment of its own, one call. The result of the empty head is not used.
            attend = ALL_ATTENTION_FUNCTIONS["vllm"]
            own: Any = self.config.per_layer_config[self.layer_idx]
            query = hidden_states.new_zeros(batch, own.num_attention_heads, tokens, self.config.head_dim)
            key = query[:, : own.num_key_value_heads]
            attend(self, query, key, key, attention_mask, **kwargs)
        # With output_attentions, which only eager gives, every layer has an entry; here one of no heads.
        weights = hidden_states.new_zeros(batch, 0, tokens, tokens) if implementation == "eager" else None
        return 0.0 if self.o_proj is None else self.o_proj(), weights


class _NoMLP(nn.Module):
    """Stands where a layer has no intermediate unit left: adds down_proj's bias to the residual, or nothing."""

    def __init__(self, down_proj: _Constant | None) -> None:
        super().__init__()
        self.down_proj = down_proj

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor | float:
        return 0.0 if self.down_proj is None else self.down_proj()


def _uneven_pages(pages: Any, kv_heads: int) -> Any:
    """The cache of continuous batching for layers of fewer heads than its pages hold, which are the dense model's.

    A copy that shares the pages; the heads that a layer lost stay zeros in them.
    """

    def update(
        key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        own = key_states.shape[1]
        lost = (0, 0, 0, 0, 0, kv_heads - own)
        padded = (nn.functional.pad(states, lost) for states in (key_states, value_states))
        keys, values = pages.update(*padded, layer_idx, kwargs)
        for name in {"k_cache", "v_cache"} & kwargs.keys():  # what flash attention reads, [pages, tokens, heads, dim]
            kwargs[name] = kwargs[name][:, :, :own]
        return keys[:, :own], values[:, :own]

    copied = copy.copy(pages)
    copied.update = update
    return copied


class TvaPrunePreTrainedModel(PreTrainedModel):
    """What both models have in common."""

    config_class = TvaPruneConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True


class TvaPruneModel(TvaPrunePreTrainedModel):
    """The decoder without its head: embedding, layers of widths of their own, and last norm.

    Servers with a transformers backend build this class and bring their own head and attention. The base family's
    forward runs on it, which hands keyword arguments down to the attention function.
    """

    def __init__(self, config: TvaPruneConfig) -> None:
        shared = config.layer_config(0)
        dense = CONFIG_MAPPING[config.base_model_type](**config.base_config)
        vars(shared).update(
            num_hidden_layers=0,
            num_attention_heads=dense.num_attention_heads,
            num_key_value_heads=dense.num_key_value_heads,
        )
        self._stock_class = MODEL_MAPPING[type(shared)]
        recorded = dict(self._stock_class._can_record_outputs)
        self._can_record_outputs = {**recorded, "attentions": [recorded["attentions"], _NoHeads]}
        self._no_split_modules = self._stock_class._no_split_modules
        super().__init__(config)
        stock = self._stock_class(shared)
        for name, module in stock.named_children():
            self.add_module(name, module)
        self.has_sliding_layers = getattr(stock, "has_sliding_layers", False)
        self.gradient_checkpointing = False
        family = sys.modules[self._stock_class.__module__]
        layer_class = getattr(family, self._stock_class.__name__.removesuffix("Model") + "DecoderLayer")
        for index in range(config.num_hidden_layers):
            self.layers.append(self._layer(layer_class, config, index))
        self.post_init()

    @staticmethod
    def _layer(layer_class: Any, config: TvaPruneConfig, index: int) -> nn.Module:
        own = config.layer_config(index)
        has_attention, has_mlp = config.kv_head_counts[index] > 0, config.intermediate_sizes[index] > 0
        buildable = copy.copy(own)
        if not has_attention:
            vars(buildable).update(num_attention_heads=1, num_key_value_heads=1)
        if not has_mlp:
            vars(buildable).update(intermediate_size=1)
        layer = layer_class(buildable, index)
        attention, mlp = layer.self_attn, layer.mlp
        width, extra = own.hidden_size, config.projection_bias
        output_bias = extra or attention.o_proj.bias is not None
        down_bias = extra or mlp.down_proj.bias is not None
        if has_attention:
            # One config for all layers, so that a change of attention implementation reaches each of them.
            attention.config = config
            if extra:
                attention.o_proj = nn.Linear(attention.o_proj.in_features, width, bias=True)
        else:
            layer.self_attn = _NoHeads(config, index, _Constant(width) if output_bias else None)
            layer.input_layernorm = nn.Identity()
        if not has_mlp:
            layer.mlp = _NoMLP(_Constant(width) if down_bias else None)
            layer.post_attention_layernorm = nn.Identity()
        elif extra:
            mlp.down_proj = nn.Linear(own.intermediate_size, width, bias=True)
        return layer

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[torch.Tensor, ...]:
        """As the base family's model; a tuple where `return_dict` is False."""
        if kwargs.get("cache") is not None:  # which only continuous batching gives
            kwargs["cache"] = _uneven_pages(kwargs["cache"], vars(self.config)["num_key_value_heads"])
        return self._stock_class.forward(
            self,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )


def _kept(states: torch.Tensor, positions: int | torch.Tensor) -> torch.Tensor:
    """The states, [batch, tokens, hidden], of some positions.

    Args:
        positions: a number of last ones (0 for all), the same ones of every sequence [kept], those of each sequence
            [batch, kept], or booleans [batch, tokens], which give states of [all that are true, hidden].
    """
    if isinstance(positions, int):
        return states[:, -positions:]
    if positions.dtype == torch.bool and positions.dim() == 2:
        return states[positions]
    if positions.dim() == 2:
        return states[torch.arange(len(states), device=positions.device)[:, None], positions]
    return states[:, positions]


class TvaPruneForCausalLM(TvaPrunePreTrainedModel, GenerationMixin):
    """A causal language model with per-layer widths. Tensor names are those of the base family."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: TvaPruneConfig) -> None:
        super().__init__(config)
        self.model = TvaPruneModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As the base family's ForCausalLM; a tuple where `return_dict` is False."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(_kept(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
