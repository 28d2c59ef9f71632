"""What each model writes after the same prompts, greedily."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tvaprune.checkpoint.loading import load
from tvaprune.progress import Progress


@torch.inference_mode()
def continuations(
    models: dict[str, Path],
    tokenizer: Any,
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
            model: Any = load(path, dtype, device)
            found[name] = []
            for prompt in prompts:
                ids = tokenizer(prompt, return_tensors="pt").to(device)
                out = model.generate(**ids, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
                found[name].append(tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True))
                progress.update()
    return found
