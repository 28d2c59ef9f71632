"""Run a GGUF file on a CPU in llama.cpp, from the optional package xllamacpp, which is imported here alone."""

import json
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tvaprune.errors import MissingPackageError


class GreedyStep(NamedTuple):
    """One generated token."""

    token: int  # the likeliest
    logprobs: dict[int, float]  # natural logarithms, of the likeliest tokens by token, the best first


class Timing(NamedTuple):
    """Times of one request by llama.cpp's own clock: reading the prompt, and the mean of a generated token."""

    prefill_ms: float
    decode_ms: float


def greedy_steps(file: Path, prompts: list[list[int]], tokens: int, top: int = 1) -> list[list[GreedyStep]]:
    """Generate greedily, and do not stop at end-of-text tokens; in float32, whatever the weights are stored in.

    Nothing is put before the prompts. `top` is how many of the likeliest tokens to give probabilities of; with all of
    the vocabulary they are the logits but for one constant a step. Where the next token is part of a character, whose
    bytes are no text, llama.cpp's server does not say which it is: the steps of that prompt end before it.

    Raises:
        MissingPackageError: xllamacpp is not installed.
        ValueError: llama.cpp does not load the file.
    """
    server = start_server(file, context=max(len(prompt) for prompt in prompts) + tokens)
    return [_generate(server, prompt, tokens, top) for prompt in prompts]


def timed(file: Path, prompt: list[int], tokens: int) -> Callable[[], Timing]:
    """Load the model with llama.cpp's default attention and cache, on as many threads as torch uses.

    Each call of the result reads the prompt anew, generates past end-of-text tokens too, and returns the times.
    Raises what `greedy_steps` raises.
    """
    server = start_server(file, context=len(prompt) + tokens, exact=False)
    request = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}

    def measure() -> Timing:
        times = server.handle_completions(request)["timings"]
        return Timing(times["prompt_ms"], times["predicted_per_token_ms"])

    return measure


def final_states(file: Path, windows: Int[Tensor, "windows tokens"]) -> Iterator[Float[Tensor, "tokens hidden"]]:
    """What llama.cpp computes for each window up to the last matrix, after the final norm: float32, a window at a time.

    With llama.cpp's default attention. Raises what `greedy_steps` raises.
    """
    server = start_server(file, context=windows.shape[1], exact=False, states=True)
    for window in windows.tolist():
        # The one request that gives the states of all tokens, which the package's own methods do not offer.
        body = json.dumps({"content": window, "embd_normalize": -1}).encode()
        request = urllib.request.Request(
            f"{server.listening_address}/embedding", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            (result,) = json.load(answer)
        yield torch.tensor(result["embedding"])


def start_server(file: Path, context: int, exact: bool = True, states: bool = False) -> Any:
    """llama.cpp's server with the model loaded.

    `exact` computes attention and caches in float32. With `states` it answers with hidden states instead of text.
    """
    try:
        import xllamacpp
    except ModuleNotFoundError as error:
        raise MissingPackageError("running a GGUF file needs llama.cpp: pip install xllamacpp") from error
    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.n_ctx = settings.n_batch = settings.n_ubatch = context
    if exact:
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if states:
        settings.embedding, settings.embd_normalize = True, -1
        settings.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
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
        answer = server.handle_completions(request)["choices"][0]["logprobs"]
        if answer is None:
            break
        (best,) = answer["content"]
        steps.append(GreedyStep(best["id"], {one["id"]: one["logprob"] for one in best["top_logprobs"]}))
        ids.append(best["id"])
    return steps
