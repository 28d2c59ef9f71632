"""Run a GGUF file in llama.cpp, on CPU: what the exported file computes, not what it should.

llama.cpp comes prebuilt in the package xllamacpp, which is not needed for anything else and imported here alone.
"""

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch


class GreedyStep(NamedTuple):
    """One generated token.

    Attributes:
        token: the likeliest.
        logprobs: natural logarithms of the probabilities of the likeliest tokens, by token, the best first.
    """

    token: int
    logprobs: dict[int, float]


class Timing(NamedTuple):
    """One request, by llama.cpp's own clock.

    Attributes:
        prefill_ms: reading the prompt.
        decode_ms: a generated token, mean.
    """

    prefill_ms: float
    decode_ms: float


def greedy_tokens(file: Path, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """Generate greedily, on beyond end-of-text tokens.

    Args:
        file: GGUF.
        prompts: token ids; nothing is put before them.
        tokens: how many to generate for each.

    Returns:
        The generated token ids of each prompt.

    Raises:
        ModuleNotFoundError: xllamacpp is not installed.
        ValueError: llama.cpp does not load the file.
    """
    return [[step.token for step in steps] for steps in greedy_steps(file, prompts, tokens)]


def greedy_steps(file: Path, prompts: list[list[int]], tokens: int, top: int = 1) -> list[list[GreedyStep]]:
    """As `greedy_tokens`, with the probabilities of the `top` likeliest tokens at each step.

    With `top` the size of the vocabulary, these are all logits but for one constant a step.
    """
    server = _server(file, context=max(len(prompt) for prompt in prompts) + tokens)
    return [_generate(server, prompt, tokens, top) for prompt in prompts]


def tokenize(file: Path, texts: list[str]) -> list[list[int]]:
    """Token ids by the file's own tokenizer, with the special tokens that it adds and those named in the text."""
    server = _server(file, context=32)
    return [_tokenize(server, text) for text in texts]


def timed(file: Path, prompt: list[int], tokens: int) -> Callable[[], Timing]:
    """Load the model as llama.cpp serves it by default, with its own choice of attention and cache, on torch's threads.

    Args:
        file: GGUF.
        prompt: token ids, read anew by every call.
        tokens: to generate after it, on beyond end-of-text.

    Returns:
        Makes the request and returns its times.

    Raises:
        ModuleNotFoundError: xllamacpp is not installed.
        ValueError: llama.cpp does not load the file.
    """
    server = _server(file, context=len(prompt) + tokens, exact=False)
    request = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}

    def measure() -> Timing:
        times = server.handle_completions(request)["timings"]
        return Timing(times["prompt_ms"], times["predicted_per_token_ms"])

    return measure


def _server(file: Path, context: int, exact: bool = True) -> Any:
    """llama.cpp with the model loaded; exact computes and caches in float32, whatever the weights are stored in."""
    try:
        import xllamacpp
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "running a GGUF file needs llama.cpp: pip install 'tvaprune[gguf]' (the package xllamacpp)"
        ) from error
    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.n_ctx = settings.n_batch = settings.n_ubatch = context
    if exact:
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
    settings.n_gpu_layers = 0
    settings.n_threads_http = 1
    settings.cache_ram_mib = 0
    settings.warmup = settings.fit_params = settings.ui = False
    settings.verbosity = -1
    try:
        return xllamacpp.Server(settings)
    except RuntimeError as error:
        raise ValueError(f"{file}: llama.cpp does not load this file ({error}); export it again") from error


def _generate(server: Any, prompt: list[int], tokens: int, top: int) -> list[GreedyStep]:
    # One token a request, because llama.cpp stops after an end-of-text token; it keeps what it computed for the last.
    steps: list[GreedyStep] = []
    ids = list(prompt)
    for _ in range(tokens):
        request = {"prompt": ids, "max_tokens": 1, "temperature": 0, "n_probs": top, "cache_prompt": True}
        (best,) = server.handle_completions(request)["choices"][0]["logprobs"]["content"]
        steps.append(GreedyStep(best["id"], {one["id"]: one["logprob"] for one in best["top_logprobs"]}))
        ids.append(best["id"])
    return steps


def _tokenize(server: Any, text: str) -> list[int]:
    content = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
    address = f"{server.listening_address}/tokenize"
    request = urllib.request.Request(address, content, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["tokens"]
