"""GlassLM weights (an npz file and its own tokenizer format) as a Llama model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tvaprune.architecture.topology import EMBEDDING, FINAL_NORM, HEAD
from tvaprune.inputs.sources import InputError

_SPECIALS = ("<pad>", "<unk>", "<bos>", "<eos>")
_SPACE = "\u2581"
# Llama's tensor of a layer -> GlassLM's.
_LAYER = {"input_layernorm": "norm1.gamma", "post_attention_layernorm": "norm2.gamma"}
_LAYER |= {f"self_attn.{letter}_proj": f"attn.W_{letter.upper()}" for letter in "qkvo"}
_LAYER |= {"mlp.gate_proj": "ffn.W1", "mlp.up_proj": "ffn.W3", "mlp.down_proj": "ffn.W2"}


def read_glassllm(weights: Path, vocabulary: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A float32 Llama model and a fast tokenizer that compute what GlassLM computes."""
    try:
        with np.load(weights, allow_pickle=False) as arrays:
            settings = json.loads(str(arrays["__config__"]))
            tensors = {name: torch.from_numpy(arrays[name].astype(np.float32)) for name in arrays if name[0] != "_"}
        config = _config(settings, tensors)
        model = LlamaForCausalLM(config)
        model.load_state_dict(_state(tensors, config), strict=True)  # strict: every tensor must be given
    except (KeyError, ValueError, RuntimeError) as error:
        raise InputError(f"{weights.name}: not GlassLM weights: {error}") from error
    return model, _tokenizer(json.loads(vocabulary.read_text(encoding="utf-8")), config.max_position_embeddings)


def _config(settings: dict[str, Any], tensors: dict[str, Tensor]) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=settings["vocab_size"],
        hidden_size=settings["d_model"],
        intermediate_size=tensors["blocks.0.ffn.W1"].shape[1],
        num_hidden_layers=settings["n_layers"],
        num_attention_heads=settings["n_heads"],
        num_key_value_heads=settings["n_kv_heads"],
        max_position_embeddings=settings["max_len"],
        rms_norm_eps=settings["eps"],
        rope_parameters={"rope_type": "default", "rope_theta": settings["rope_base"]},
        initializer_range=settings["init_std"],
        tie_word_embeddings=True,
        pad_token_id=_SPECIALS.index("<pad>"),
        bos_token_id=_SPECIALS.index("<bos>"),
        eos_token_id=_SPECIALS.index("<eos>"),
    )


def _state(tensors: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    """GlassLM multiplies x @ W, so its matrices are [in, out]; Llama's are [out, in]. The head is the embedding."""
    state = {EMBEDDING: tensors["E"], HEAD: tensors["E"], FINAL_NORM: tensors["norm_f.gamma"]}
    rotated_heads = {"attn.W_Q": config.num_attention_heads, "attn.W_K": config.num_key_value_heads}
    for layer in range(config.num_hidden_layers):
        for name, own in _LAYER.items():
            tensor = tensors[f"blocks.{layer}.{own}"]
            tensor = tensor.T if tensor.dim() == 2 else tensor
            if own in rotated_heads:
                tensor = _half_rotation_order(tensor, rotated_heads[own])
            state[f"model.layers.{layer}.{name}.weight"] = tensor
    return state


def _half_rotation_order(weight: Float[Tensor, "rows hidden"], heads: int) -> Float[Tensor, "rows hidden"]:
    """Reorder the rows of a query or key projection from interleaved to half RoPE.

    GlassLM rotates the pairs (2i, 2i+1) of a head, transformers' Llama the pairs (i, i + head_dim/2), by the
    same angle: row 2i of each head goes to i, row 2i+1 to i + head_dim/2.
    """
    rows, hidden = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, hidden).transpose(1, 2).reshape(rows, hidden)


def _tokenizer(content: dict[str, Any], max_length: int) -> PreTrainedTokenizerFast:
    """GlassLM's character BPE: NFC, spaces as U+2581, merges within words only."""
    merges = [(left, right) for left, right in content["merges"]]
    tokens = [*_SPECIALS, *content["alphabet"], *(left + right for left, right in merges)]
    ids = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", _SPACE)])
    words = Regex(rf"\n|{_SPACE}*[^{_SPACE}\n]+|{_SPACE}+")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(words, behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIALS])
    options: dict[str, Any] = {f"{token[1:-1]}_token": token for token in _SPECIALS}
    options |= {"model_max_length": max_length, "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)
