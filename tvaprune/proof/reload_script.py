"""Compute logits and generations from a model directory with transformers alone; run as a script.

    python -P reload_script.py DIRECTORY PROMPTS RESULTS TOKENS TRUST

PROMPTS is a safetensors file with input_ids, int64 [prompts, tokens], and beginnings, int64 [prompts, fewer]. TOKENS is
how many to generate greedily after the beginnings. TRUST is 1 where the directory brings its own modeling file, else 0.
RESULTS is the safetensors file to write: logits, float32 [prompts, tokens, vocab]; tokens and tokens_uncached, int64
[prompts, TOKENS], generated with and without a cache; and the logits that chose them, step_logits and
step_logits_uncached, float32 [prompts, TOKENS, vocab].
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel


def generate(model: PreTrainedModel, input_ids: torch.Tensor, tokens: int, cache: bool) -> tuple[torch.Tensor, ...]:
    """Greedy tokens and the logits that chose them; on beyond end-of-text tokens."""
    model.generation_config = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, use_cache=cache, output_logits=True, return_dict_in_generate=True
    )
    out = model.generate(input_ids, attention_mask=torch.ones_like(input_ids))
    return out.sequences[:, input_ids.shape[1] :].clone(), torch.stack(out.logits, dim=1).float()


@torch.inference_mode()
def main(directory: str, prompts: str, results: str, tokens: str, trust: str) -> None:
    # Quantised weights keep the dtype of their scales.
    quantised = "quantization_config" in json.loads(Path(directory, "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto" if quantised else torch.float32, use_safetensors=True, trust_remote_code=trust == "1"
    ).eval()
    given = load_file(prompts)
    found = {"logits": model(input_ids=given["input_ids"], use_cache=False).logits.float()}
    for name, cache in (("", True), ("_uncached", False)):
        found["tokens" + name], found["step_logits" + name] = generate(model, given["beginnings"], int(tokens), cache)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, results)
    assert "tvaprune" not in sys.modules


if __name__ == "__main__":
    main(*sys.argv[1:])
