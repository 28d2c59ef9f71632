"""What a model directory computes in fresh processes, compared with a reference."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from gguf import GGMLQuantizationType, GGUFReader
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

import tvaprune
from tvaprune.progress import Progress
from tvaprune.proof import gguf_runtime, reload_script
from tvaprune.proof.certificate import GGUF, Check, DamagedDirectoryError, Reference
from tvaprune.proof.parity import compare, mean_kl, same_choices

# Tokens of each prompt that generation starts from, and new tokens. Few: without a cache each costs a whole pass.
GENERATE_AFTER, NEW_TOKENS = 16, 32
# Models whose logits differ by at most d can choose tokens whose logits differ by at most twice d.
TIE = 2
# Nats, of the likeliest token after each prompt, for files of rounded weights. A pruned SmolLM2-135M differs by 0.01 in
# bf16 and 0.07 in q8_0. Unlikely tokens differ by more (0.7 in q8_0): reported, not bounded.
ROUNDED_BOUND = 0.5
# Mean KL in nats that rounding of folded weights may cause: a multiple of the stored dtype's squared rounding.
# SmolLM2-135M pruned by half, in bfloat16, has 1.1e-4 nats; the bound there is 0.005.
FOLD_FACTOR, FOLD_FLOOR = 80, 1e-6
# Names of environment variables that hold tokens, keys and passwords.
_CREDENTIAL = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|_KEY$|_KEY_ID$|^AWS_", re.IGNORECASE)
LEAST_LOGPROB = -80  # llama.cpp reports probabilities in float32, which ends at exp(-87)

# Reads [prompts, tokens] from its input. Prints the tokens with their log-probabilities, and those of all at the first.
_RUN_GGUF = f"""
import json, sys
from pathlib import Path
from {gguf_runtime.__name__} import greedy_steps
file, (prompts, tokens, vocabulary) = Path(sys.argv[1]), json.load(sys.stdin)
first = [steps[0].logprobs if steps else {{}} for steps in greedy_steps(file, prompts, 1, top=vocabulary)]
chosen = [[step.token for step in steps] for steps in greedy_steps(file, prompts, tokens)]
print(json.dumps({{"chosen": chosen, "first": [[list(one), list(one.values())] for one in first]}}))
"""


def against_reference(
    name: str, reference: Reference, logits: Float[Tensor, "prompts tokens vocab"], bound: float
) -> Check:
    """Compare logits with the reference's, at the positions that it has; `bound` as in `fresh_checks`."""
    tie = tie_width(reference.logits, bound)
    parity = compare(reference.logits, logits[:, -reference.logits.shape[1] :], tie)
    return bounded_check(name, parity._asdict(), {"max_rel_logit_diff": bound, "argmax_agreement": 1})


def against_gates(gated: Float[Tensor, "*logits"], logits: Float[Tensor, "*logits"], stored: torch.dtype) -> Check:
    """Compare the compact model's logits with those of the gates over unfolded weights, both computed in float32.

    The folded weights are rounded to the stored dtype, which no exact comparison survives. The bound on the mean KL
    grows with the square of that dtype's rounding: 0.005 nats for bfloat16, 8e-5 for float16, 1e-6 for float32.
    """
    bound = max(FOLD_FLOOR, FOLD_FACTOR * torch.finfo(stored).eps ** 2)
    figures = {"mean_kl": mean_kl(gated, logits), "argmax_agreement": compare(gated, logits).argmax_agreement}
    return bounded_check("gates over the dense weights = compact", figures, {"mean_kl": bound})


def tie_width(logits: Tensor, bound: float) -> float:
    """Logits this close may change places within the relative bound."""
    return TIE * bound * float(logits.abs().max())


def bounded_check(name: str, figures: dict[str, float], bounds: dict[str, float]) -> Check:
    """Differences may be at most their bounds, agreements at least; figures are kept to two significant digits.

    A figure that two digits put on the other side of its bound, or on it, keeps as many as tell them apart.
    """
    passed = all(
        figures[key] >= bound if key.endswith("agreement") else figures[key] <= bound for key, bound in bounds.items()
    )
    # Further digits change with the number of threads.
    return Check(name, passed, {key: _shortened(value, bounds.get(key)) for key, value in figures.items()}, bounds)


def _shortened(value: float, bound: float | None) -> float:
    for digits in range(1, 17):
        short = float(f"{value:.{digits}e}")
        if bound is None or value == bound or (short != bound and (short < bound) == (value < bound)):
            return short
    return value


def fresh_checks(directory: Path, reference: Reference, bound: float, *, trust_remote_code: bool) -> list[Check]:
    """Check a directory in fresh processes: reloaded, generating with a cache and without, and in llama.cpp.

    The directory may have been moved, and may hold a model.gguf. `bound` is of the difference of logits as a share of
    the largest logit: rounding grows with what a model computes, and a damaged model computes larger numbers. With
    trust_remote_code the directory's own modeling file computes.

    Raises:
        DamagedDirectoryError: transformers or llama.cpp does not load it; the error is quoted.
    """
    beginnings, tokens = generation(directory, reference.input_ids)
    has_gguf = (directory / GGUF).is_file()
    with Progress(total=1 + has_gguf, desc=f"check {directory.name} in fresh processes", unit="process") as bar:
        found = reload_fresh(directory, reference.input_ids, beginnings, tokens, trust_remote_code)
        bar.update()
        checks = [
            against_reference("reloaded in a fresh process", reference, found["logits"], bound),
            _cache_check(beginnings, found, bound),
        ]
        if has_gguf:
            checks.append(_gguf_check(directory / GGUF, beginnings, found, bound))
            bar.update()
    return checks


def generation(directory: Path, input_ids: Int[Tensor, "prompts tokens"]) -> tuple[Int[Tensor, "prompts fewer"], int]:
    """What to generate: the prompts' beginnings, and how many tokens after them, within the model's positions."""
    config = json.loads((directory / "config.json").read_text())
    positions = config.get("max_position_embeddings") or config.get("base_config", {}).get("max_position_embeddings")
    beginnings = input_ids[:, :GENERATE_AFTER].clone()  # safetensors takes no view of another tensor
    return beginnings, max(1, min(NEW_TOKENS, (positions or sys.maxsize) - beginnings.shape[1]))


def _cache_check(beginnings: Tensor, found: dict[str, Tensor], bound: float) -> Check:
    cached, uncached = found["tokens"], found["tokens_uncached"]
    # A step's logits are comparable while all tokens before it are the same.
    comparable = torch.ones_like(cached, dtype=torch.bool)
    comparable[:, 1:] = (cached == uncached).cumprod(1)[:, :-1].bool()
    parity = compare(found["step_logits_uncached"][comparable], found["step_logits"][comparable])
    figures = {
        "prompt_tokens": beginnings.shape[1],
        "tokens": cached.shape[1],
        "max_abs_logit_diff": parity.max_abs_logit_diff,
        "max_rel_logit_diff": parity.max_rel_logit_diff,
        "token_agreement": same_choices(
            found["step_logits_uncached"], uncached, cached, tie_width(found["step_logits_uncached"], bound)
        ),
    }
    return bounded_check(
        "generation with cache = without", figures, {"max_rel_logit_diff": bound, "token_agreement": 1}
    )


def reload_fresh(
    directory: Path,
    input_ids: Tensor,
    beginnings: Tensor,
    tokens: int,
    trust_remote_code: bool,
    python: str = sys.executable,
) -> dict[str, Tensor]:
    """The results of `reload_script`, run by this interpreter or another environment's."""
    with tempfile.TemporaryDirectory() as temporary:
        prompts, results = Path(temporary, "prompts.safetensors"), Path(temporary, "results.safetensors")
        save_file({"input_ids": input_ids, "beginnings": beginnings}, prompts)
        # Empty caches: no code that an earlier run or a download left there is used.
        caches = dict.fromkeys(("HF_HOME", "HF_HUB_CACHE", "HF_MODULES_CACHE"), temporary)
        command = [python, "-P", reload_script.__file__, str(directory.resolve()), str(prompts), str(results)]
        command += [str(tokens), str(int(trust_remote_code))]
        run_fresh(command, directory, "transformers", cwd=temporary, variables=caches)
        return load_file(results)


def _gguf_check(file: Path, beginnings: Tensor, found: dict[str, Tensor], bound: float) -> Check:
    """Compare llama.cpp with transformers: greedy tokens, and the probabilities of all tokens after the prompts.

    A file of float32 weights must be within the bound and give the same tokens. In a file of rounded weights only
    the log-probability of the likeliest first token is bounded, by ROUNDED_BOUND.
    """
    name = "llama.cpp from model.gguf"
    if find_spec("xllamacpp") is None:
        return Check(name, None, {"skipped": "xllamacpp is not installed (pip install xllamacpp)"}, {})
    expected = found["step_logits"]
    request = json.dumps([beginnings.tolist(), expected.shape[1], expected.shape[2]])
    # llama.cpp ends the process at a failed assertion, so it gets one of its own.
    command = [sys.executable, "-c", _RUN_GGUF, str(file.resolve())]
    answer = run_fresh(command, file, "llama.cpp", cwd=Path(tvaprune.__file__).parent.parent, given=request)
    answered = json.loads(answer.splitlines()[-1])
    if not any(answered["chosen"]):
        return Check(
            name, None, {"skipped": "every prompt goes on with part of a character, which llama.cpp hides"}, {}
        )
    ours, theirs, best = [], [], []
    for logits, (ids, logprobs) in zip(expected[:, 0], answered["first"], strict=True):
        if not ids:
            continue
        own = logits.double().log_softmax(-1)[ids]
        representable = own > LEAST_LOGPROB
        ours.append(own[representable])
        theirs.append(torch.tensor(logprobs, dtype=torch.float64)[representable])
        best.append(abs(float(own[0]) - logprobs[0]))
    first = compare(torch.cat(ours), torch.cat(theirs))
    chosen = found["tokens"].clone()  # what llama.cpp did not say counts as the same, and not as compared
    for own, said in zip(chosen, answered["chosen"], strict=True):
        own[: len(said)] = torch.tensor(said)
    figures = {
        "prompt_tokens": beginnings.shape[1],
        "tokens": min(len(said) for said in answered["chosen"]),
        "max_abs_logprob_diff": first.max_abs_logit_diff,
        "max_rel_logprob_diff": first.max_rel_logit_diff,
        "first_token_logprob_diff": max(best),
        "token_agreement": same_choices(expected, found["tokens"], chosen, tie_width(expected, bound)),
    }
    if all(tensor.tensor_type == GGMLQuantizationType.F32 for tensor in GGUFReader(file).tensors):
        return bounded_check(name, figures, {"max_rel_logprob_diff": bound, "token_agreement": 1})
    return bounded_check(name, figures, {"first_token_logprob_diff": ROUNDED_BOUND})


def run_fresh(
    command: list[str],
    what: Path,
    runtime: str,
    cwd: Path | str,
    given: str = "",
    variables: Mapping[str, str] | None = None,
    cause: re.Pattern[str] | None = None,
) -> str:
    """Run a program on a directory or file, and return what it printed.

    It gets this process's variables but credentials, and `variables`; `cause` finds the error in its messages.

    Raises:
        DamagedDirectoryError: it ended by an error, which is quoted (the last line where `cause` finds none), or by a
            signal.
    """
    # What a directory runs, its own code among it, needs no credentials.
    kept = {name: value for name, value in os.environ.items() if not _CREDENTIAL.search(name)}
    environment = kept | {"HF_HUB_OFFLINE": "1", **(variables or {})}
    done = subprocess.run(command, input=given, env=environment, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        if done.returncode < 0:  # its last message is of before
            last = f"it was ended by signal {-done.returncode}" + ", as where memory runs out" * (done.returncode == -9)
        said = next(iter(cause.findall(done.stderr)), last) if cause else last
        raise DamagedDirectoryError(f"{what}: {runtime} does not run it in a fresh process: {said}")
    return done.stdout
