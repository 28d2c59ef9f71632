"""The text that a model writes after a prompt."""

from typing import Any

import torch
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

# Of the checkpoint's generation_config.json nothing may change which token is the likeliest.
_LIKELIEST: dict[str, Any] = {
    "do_sample": False,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}


@torch.inference_mode()
def continuation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: BatchEncoding,
    new_tokens: int,
    temperature: float = 0.0,
    streamer: TextStreamer | None = None,
) -> str:
    """At most `new_tokens` tokens after one tokenised prompt, or as many as the model's context has room for, as text.

    Args:
        temperature: 0 takes the likeliest token each time; above, tokens are drawn.
        streamer: is given the tokens as they come.

    Raises:
        ValueError: the prompt has no token, or fills the model's context.
    """
    length, context = prompt["input_ids"].shape[1], model.config.max_position_embeddings
    if length >= context:
        raise ValueError(f"the prompt has {length} tokens, and the model's context {context}; shorten the prompt")
    if length == 0:
        raise ValueError("the prompt is empty: this model's tokenizer has no token that begins a text; give a prompt")
    inputs = {name: prompt[name].to(model.device) for name in ("input_ids", "attention_mask")}
    choice = {"do_sample": True, "temperature": temperature} if temperature > 0 else _LIKELIEST
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    room = min(new_tokens, context - length)
    found = model.generate(**inputs, **choice, max_new_tokens=room, pad_token_id=padding, streamer=streamer)
    return str(tokenizer.decode(found[0, length:], skip_special_tokens=True))
