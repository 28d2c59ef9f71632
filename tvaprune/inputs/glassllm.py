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

from tvaprune.inputs.sources import InputError

_SPECIALS = ("<pad>", "<unk>", "<bos>", "<eos>")
_SPACE = "\u2581"


def half_rotation_order(weight: Float[Tensor, "rows hidden"], heads: int) -> Float[Tensor, "rows hidden"]:
    """Reorder the rows of a query or key projection from interleaved to half RoPE.

    GlassLM rotates the pairs (2i, 2i+1) of a head, transformers' Llama the pairs (i, i + head_dim/2), by the
    same angle: row 2i of each head goes to i, row 2i+1 to i + head_dim/2.
    """
    rows, hidden = weight.shape
    return weight.view(heads, rows // heads // 2, 2, hidden).transpose(1, 2).reshape(rows, hidden)


def read_glassllm(weights: Path, vocabulary: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A float32 Llama model and a fast tokenizer that compute what GlassLM computes."""
    try:
        with np.load(weights, allow_pickle=False) as arrays:
            settings = json.loads(str(arrays["__config__"]))
            tensors = {name: torch.from_numpy(arrays[name].astype(np.float32)) for name in arrays if name[0] != "_"}
        config = _config(settings, tensors)
        model = LlamaForCausalLM(config)
        # strict: every tensor of the model must be given; the head is the embedding.
        state = _state(tensors, config)
        model.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]}, strict=True)
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
    """GlassLM multiplies x @ W, so its matrices are [in, out]; Llama's are [out, in]."""
    state = {"model.embed_tokens.weight": tensors["E"], "model.norm.weight": tensors["norm_f.gamma"]}
    for layer in range(config.num_hidden_layers):
        old, new = f"blocks.{layer}.", f"model.layers.{layer}."
        state[new + "input_layernorm.weight"] = tensors[old + "norm1.gamma"]
        state[new + "post_attention_layernorm.weight"] = tensors[old + "norm2.gamma"]
        query, key = tensors[old + "attn.W_Q"].T, tensors[old + "attn.W_K"].T
        state[new + "self_attn.q_proj.weight"] = half_rotation_order(query.contiguous(), config.num_attention_heads)
        state[new + "self_attn.k_proj.weight"] = half_rotation_order(key.contiguous(), config.num_key_value_heads)
        state[new + "self_attn.v_proj.weight"] = tensors[old + "attn.W_V"].T
        state[new + "self_attn.o_proj.weight"] = tensors[old + "attn.W_O"].T
        state[new + "mlp.gate_proj.weight"] = tensors[old + "ffn.W1"].T
        state[new + "mlp.up_proj.weight"] = tensors[old + "ffn.W3"].T
        state[new + "mlp.down_proj.weight"] = tensors[old + "ffn.W2"].T
    return state


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
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
