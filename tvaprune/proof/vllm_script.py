"""Generate from a model directory in vLLM, with vLLM and safetensors alone; run as a script.

    python -P vllm_script.py DIRECTORY PROMPTS RESULTS TOKENS TOP TRUST

PROMPTS is a safetensors file with beginnings, int64 [prompts, tokens]. TOKENS is how many to generate greedily after
them, TOP how many log-probabilities to report of each, TRUST is 1 where the directory brings its own modeling file,
else 0. RESULTS is the JSON file to write: version, that of vLLM; chosen, [prompts][TOKENS] token ids; and logprobs,
[prompts][TOKENS] objects of log-probability by token id, TOP of them or one more.
"""

import json
import sys
from pathlib import Path
from typing import Any


def main(directory: str, prompts: str, results: str, tokens: str, top: str, trust: str) -> None:
    import vllm
    from safetensors.torch import load_file

    beginnings = load_file(prompts)["beginnings"].tolist()
    own: dict[str, Any] = {"model_impl": "transformers", "trust_remote_code": True} if trust == "1" else {}
    model = vllm.LLM(
        model=directory,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=len(beginnings[0]) + int(tokens),
        enforce_eager=True,
        gpu_memory_utilization=memory_share(Path(directory)),
        disable_log_stats=True,
        **own,
    )
    settings = vllm.SamplingParams(
        temperature=0, max_tokens=int(tokens), ignore_eos=True, logprobs=int(top), detokenize=False
    )
    answers = model.generate([{"prompt_token_ids": ids} for ids in beginnings], settings, use_tqdm=False)
    found = [answer.outputs[0] for answer in answers]
    logprobs = [[{token: one.logprob for token, one in step.items()} for step in out.logprobs] for out in found]
    answered = {"version": vllm.__version__, "chosen": [list(out.token_ids) for out in found], "logprobs": logprobs}
    Path(results).write_text(json.dumps(answered))


def memory_share(directory: Path) -> float:
    """The share of a GPU's memory that the weights need in float32, with 4 GB for the rest; at least 0.3."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return 0.3
    weights = 2 * sum(file.stat().st_size for file in directory.glob("*.safetensors"))  # stored in 16 bits
    return min(0.95, max(0.3, (weights + 4e9) / current_platform.get_device_total_memory()))


if __name__ == "__main__":  # vLLM starts processes that import this file
    main(*sys.argv[1:])
