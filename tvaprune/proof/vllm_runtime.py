"""A model directory in vLLM, which another environment's interpreter runs, compared with transformers here."""

import json
import re
import tempfile
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor

from tvaprune.proof import vllm_script
from tvaprune.proof.certificate import Certificate, Check
from tvaprune.proof.checks import bounded_check, generation, reload_fresh, run_fresh, tie_width
from tvaprune.proof.parity import same_choices

TOP = 5  # likeliest tokens that are compared at each step, as vLLM compares its models with Hugging Face's
# Nats between the log-probabilities of these tokens, both computed in float32 by other kernels. Pruned SmolLM2-135M
# differs by 6e-5. vLLM's own test of float32 probabilities in this backend allows 1e-3.
LOGPROB_BOUND = 1e-3
# vLLM reserves this many GiB for its cache; a check of three short prompts needs a hundredth.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
}
# Even where the model runs eagerly, vLLM compiles its sampling in C++, which takes longer than all of this check.
EAGER = {"TORCHDYNAMO_DISABLE": "1"}
# An error in a process that vLLM started, in its log; the last line of its messages only refers to it.
IN_A_WORKER = re.compile(r"^\(\w+ pid=\d+\) ERROR .*?\] (\w+(?:Error|Exception): .*)$", re.MULTILINE)


def vllm_check(directory: Path, stored: Certificate, python: Path) -> Check:
    """Generate greedily from the certificate's prompts in vLLM and in transformers, both in float32.

    A prompt passes where all tokens are the same, or where at the first that is not, each one's token is among the
    other's TOP likeliest (`top5_agreement`). Log-probabilities of tokens in both lists are compared up to there.

    Raises:
        DamagedDirectoryError: vLLM does not load it; the error is quoted.
    """
    beginnings, tokens = generation(directory, stored.reference.input_ids)
    found = reload_fresh(directory, stored.reference.input_ids, beginnings, tokens, stored.trust_remote_code)
    with tempfile.TemporaryDirectory() as temporary:
        prompts, results = Path(temporary, "prompts.safetensors"), Path(temporary, "results.json")
        save_file({"beginnings": beginnings}, prompts)
        command = [str(python), "-P", vllm_script.__file__, str(directory.resolve()), str(prompts), str(results)]
        command += [str(tokens), str(TOP), str(int(stored.trust_remote_code))]
        environment = {**ENVIRONMENT, **EAGER, "HF_HOME": temporary, "HF_MODULES_CACHE": temporary}
        run_fresh(command, directory, "vLLM", cwd=temporary, variables=environment, cause=IN_A_WORKER)
        answered = json.loads(results.read_text())
    chosen = torch.tensor(answered["chosen"])
    logprobs = [[{int(key): value for key, value in step.items()} for step in row] for row in answered["logprobs"]]
    close, difference = compare_top(found["step_logits"], found["tokens"], chosen, logprobs)
    figures = {
        "prompt_tokens": beginnings.shape[1],
        "tokens": tokens,
        "max_abs_logprob_diff": difference,
        "token_agreement": same_choices(
            found["step_logits"], found["tokens"], chosen, tie_width(found["step_logits"], stored.bound)
        ),
        "top5_agreement": close,
    }
    bounds = {"max_abs_logprob_diff": LOGPROB_BOUND, "top5_agreement": 1}
    return bounded_check(f"vLLM {answered['version']} = transformers", figures, bounds)


def compare_top(
    logits: Float[Tensor, "prompts tokens vocab"],
    chosen: Int[Tensor, "prompts tokens"],
    theirs: Int[Tensor, "prompts tokens"],
    logprobs: list[list[dict[int, float]]],
) -> tuple[float, float]:
    """Share of prompts with close generations, and the largest difference of a log-probability, in nats.

    `chosen` was taken from `logits`; `theirs` has the log-probabilities of its likeliest tokens by token id.
    """
    own, close, largest = logits.double().log_softmax(-1), 0, 0.0
    for prompt, (row, other) in enumerate(zip(chosen.tolist(), theirs.tolist(), strict=True)):
        passed = True
        for step, (token, another) in enumerate(zip(row, other, strict=True)):
            best = set(own[prompt, step].topk(TOP).indices.tolist())
            reported = logprobs[prompt][step]
            shared = sorted(best & reported.keys())
            largest = max([largest, *(abs(float(own[prompt, step, each]) - reported[each]) for each in shared)])
            if token != another:
                passed = token in reported and another in best
                break
        close += passed
    return close / len(chosen), largest
