"""What a model directory computes, in processes of its own, held against a reference."""

import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tvaprune
from tvaprune.proof import gguf_runtime, reload_script
from tvaprune.proof.certificate import GGUF, Check, DamagedDirectoryError, Reference
from tvaprune.proof.parity import compare, same_choices

# Generated after the first tokens of each prompt: without a cache every token costs a pass over all before it.
GENERATE_AFTER, NEW_TOKENS = 16, 32
# Two models whose logits differ by the bound can choose two tokens that are apart by twice the bound, and no more.
TIE = 2
# Nats, of the likeliest token after each prompt. A file of rounded weights answers a little differently: a pruned
# SmolLM2-135M by 0.01 in bf16 and 0.07 in q8_0. Unlikely tokens differ by more (0.7 in q8_0): reported, not bounded.
ROUNDED_BOUND = 0.5
# llama.cpp reports probabilities in float32, which ends at exp(-87).
LEAST_LOGPROB = -80

# Reads [prompts, tokens] from its input. Prints the tokens with their log-probabilities, and those of all at the first.
_RUN_GGUF = f"""
import json, sys
from pathlib import Path
from {gguf_runtime.__name__} import greedy_steps
file, (prompts, tokens, vocabulary) = Path(sys.argv[1]), json.load(sys.stdin)
first = [step.logprobs for step, in greedy_steps(file, prompts, 1, top=vocabulary)]
chosen = [[step.token for step in steps] for steps in greedy_steps(file, prompts, tokens)]
print(json.dumps({{"chosen": chosen, "first": [[list(one), list(one.values())] for one in first]}}))
"""


def against_reference(name: str, reference: Reference, logits: Tensor, bound: float) -> Check:
    """Logits [prompts, tokens, vocab] against the reference's, at its positions."""
    parity = compare(reference.logits, logits[:, -reference.logits.shape[1] :], tie=TIE * bound)
    passed = parity.max_abs_logit_diff <= bound and parity.argmax_agreement == 1
    return Check(name, passed, _digits(**parity._asdict()), {"max_abs_logit_diff": bound, "argmax_agreement": 1})


def fresh_checks(directory: Path, reference: Reference, bound: float, *, trust_remote_code: bool) -> list[Check]:
    """The directory in processes of their own: reloaded, generating with a cache and without, and in llama.cpp.

    Args:
        directory: with config, weights, and perhaps model.gguf; it may have been moved.
        bound: of the absolute logit difference.
        trust_remote_code: the directory brings the modeling file that computes it.

    Raises:
        DamagedDirectoryError: transformers or llama.cpp does not load it; the error is quoted.
    """
    positions = json.loads((directory / "config.json").read_text()).get("max_position_embeddings") or sys.maxsize
    beginnings = reference.input_ids[:, :GENERATE_AFTER].clone()  # safetensors takes no view of another tensor
    tokens = max(1, min(NEW_TOKENS, positions - beginnings.shape[1]))
    found = _reload(directory, reference.input_ids, beginnings, tokens, trust_remote_code)
    checks = [
        against_reference("reloaded in a fresh process", reference, found["logits"], bound),
        _cache_check(beginnings, found, bound),
    ]
    if (directory / GGUF).is_file():
        checks.append(_gguf_check(directory / GGUF, beginnings, found, bound))
    return checks


def _cache_check(beginnings: Tensor, found: dict[str, Tensor], bound: float) -> Check:
    cached, uncached = found["tokens"], found["tokens_uncached"]
    same = same_choices(found["step_logits_uncached"], uncached, cached, TIE * bound)
    # A step's logits compare while all tokens before it are the same.
    comparable = torch.ones_like(cached, dtype=torch.bool)
    comparable[:, 1:] = (cached == uncached).cumprod(1)[:, :-1].bool()
    parity = compare(found["step_logits_uncached"][comparable], found["step_logits"][comparable])
    figures = {
        "prompt_tokens": float(beginnings.shape[1]),
        "tokens": float(cached.shape[1]),
        **_digits(max_abs_logit_diff=parity.max_abs_logit_diff, max_rel_logit_diff=parity.max_rel_logit_diff),
        "token_agreement": same,
    }
    passed = same == 1 and parity.max_abs_logit_diff <= bound
    bounds: dict[str, float] = {"max_abs_logit_diff": bound, "token_agreement": 1}
    return Check("generation with cache = without", passed, figures, bounds)


def _reload(
    directory: Path, input_ids: Tensor, beginnings: Tensor, tokens: int, trust_remote_code: bool
) -> dict[str, Tensor]:
    """What `reload_script` says it computes."""
    with tempfile.TemporaryDirectory() as temporary:
        prompts, results = Path(temporary, "prompts.safetensors"), Path(temporary, "results.safetensors")
        save_file({"input_ids": input_ids, "beginnings": beginnings}, prompts)
        # Nothing but the directory itself: no hub, and no code that an earlier run or a download left in a cache.
        caches = dict.fromkeys(("HF_HOME", "HF_HUB_CACHE", "HF_MODULES_CACHE"), temporary)
        command = [sys.executable, "-P", reload_script.__file__, str(directory.resolve()), str(prompts), str(results)]
        _run([*command, str(tokens), str(int(trust_remote_code))], directory, "transformers", cwd=temporary, **caches)
        return load_file(results)


def _gguf_check(file: Path, beginnings: Tensor, found: dict[str, Tensor], bound: float) -> Check:
    """Greedy tokens of llama.cpp against transformers', and the probabilities of all tokens after the prompts.

    A file that holds the weights as float32 is held to the bound, and to the same tokens. In rounded ones the
    log-probability of the first token alone is held to ROUNDED_BOUND.
    """
    name = "llama.cpp from model.gguf"
    if find_spec("xllamacpp") is None:
        return Check(name, None, {"skipped": "xllamacpp is not installed (pip install 'tvaprune[gguf]')"}, {})
    expected = found["step_logits"]
    request = json.dumps([beginnings.tolist(), expected.shape[1], expected.shape[2]])
    # llama.cpp ends the process at a failed assertion, so it gets one of its own.
    command = [sys.executable, "-c", _RUN_GGUF, str(file.resolve())]
    answer = _run(command, file, "llama.cpp", cwd=Path(tvaprune.__file__).parent.parent, given=request)
    answered = json.loads(answer.splitlines()[-1])
    chosen = torch.tensor(answered["chosen"])
    ours, theirs, best = [], [], []
    for logits, (ids, logprobs) in zip(expected[:, 0], answered["first"], strict=True):
        own = logits.double().log_softmax(-1)[ids]
        told = own > LEAST_LOGPROB
        ours.append(own[told])
        theirs.append(torch.tensor(logprobs, dtype=torch.float64)[told])
        best.append(abs(float(own[0]) - logprobs[0]))
    first = compare(torch.cat(ours), torch.cat(theirs))
    same = same_choices(expected, found["tokens"], chosen, TIE * bound)
    figures = {
        "prompt_tokens": float(beginnings.shape[1]),
        "tokens": float(chosen.shape[1]),
        **_digits(
            max_abs_logprob_diff=first.max_abs_logit_diff,
            max_rel_logprob_diff=first.max_rel_logit_diff,
            first_token_logprob_diff=max(best),
            token_agreement=same,
        ),
    }
    if _holds_float32(file):
        passed = same == 1 and first.max_abs_logit_diff <= bound
        return Check(name, passed, figures, {"max_abs_logprob_diff": bound, "token_agreement": 1})
    return Check(name, max(best) <= ROUNDED_BOUND, figures, {"first_token_logprob_diff": ROUNDED_BOUND})


def _run(command: list[str], what: Path, runtime: str, cwd: Path | str, given: str = "", **environment: str) -> str:
    done = subprocess.run(
        command,
        input=given,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        cause = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise DamagedDirectoryError(f"{what}: {runtime} does not run it in a fresh process: {cause}")
    return done.stdout


def _holds_float32(file: Path) -> bool:
    from gguf import GGMLQuantizationType, GGUFReader

    return all(tensor.tensor_type == GGMLQuantizationType.F32 for tensor in GGUFReader(file).tensors)


def _digits(**figures: float) -> dict[str, float]:
    """Two significant digits: the rest changes with the number of threads."""
    return {name: float(f"{value:.1e}") if value != 1 else 1.0 for name, value in figures.items()}
