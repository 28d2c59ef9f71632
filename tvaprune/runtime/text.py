"""The text that a model writes after a prompt."""

import torch
from transformers import BatchEncoding, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer


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
        temperature: 0 takes the likeliest token each time, whatever generation_config.json says; above, tokens are
            drawn, by its settings.
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
    choice = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    room, own = min(new_tokens, context - length), model.generation_config
    try:
        if temperature <= 0:  # a configuration that is given to generate() is completed from the model's
            model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id)
        found = model.generate(**inputs, **choice, max_new_tokens=room, pad_token_id=padding, streamer=streamer)
    finally:
        model.generation_config = own
    return str(tokenizer.decode(found[0, length:], skip_special_tokens=True))
