"""What each model writes after the same prompts, greedily."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from tvaprune.checkpoint.loading import load
from tvaprune.progress import Progress
from tvaprune.runtime.text import continuation


def continuations(
    models: dict[str, Path],
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, list[str]]:
    """By model, the text that it adds to each prompt: at most `tokens` tokens, each the likeliest.

    One model is in memory at a time.
    """
    if not prompts:
        return {}
    found: dict[str, list[str]] = {}
    with Progress(total=len(models) * len(prompts), desc="generated text", unit="prompt") as progress:
        for name, path in models.items():
            model = load(path, dtype, device)
            found[name] = []
            for prompt in prompts:
                encoded = tokenizer(prompt, return_tensors="pt")
                found[name].append(continuation(model, tokenizer, encoded, tokens))
                progress.update()
            del model  # before the next one is loaded
    return found
