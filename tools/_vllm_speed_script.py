"""Time one model directory in vLLM on request; run as a script by an environment that has vLLM.

    python -P _vllm_speed_script.py DIRECTORY BACKEND DTYPE VOCABULARY PROMPT_TOKENS NEW_TOKENS

BACKEND is vLLM's model_impl. Prints `RESULT {"vllm": VERSION}` when the model is loaded. Each line of its input is a
number of requests to send at once; the answer is `RESULT {"first_s": ..., "whole_s": ...}`: seconds until all of them
have their first token, and until all have NEW_TOKENS.
"""

import json
import random
import sys
import time


def main(directory: str, backend: str, dtype: str, vocabulary: str, prompt_tokens: str, new_tokens: str) -> None:
    import vllm

    length, tokens = int(prompt_tokens), int(new_tokens)
    model = vllm.LLM(
        model=directory,
        model_impl=backend,
        trust_remote_code=True,
        skip_tokenizer_init=True,
        dtype=dtype,
        max_model_len=length + tokens,
        enforce_eager=True,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.3,
        disable_log_stats=True,
    )

    def seconds(requests: int, wanted: int) -> float:
        prompts = [{"prompt_token_ids": random.choices(range(int(vocabulary)), k=length)} for _ in range(requests)]
        settings = vllm.SamplingParams(temperature=0, max_tokens=wanted, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        model.generate(prompts, settings, use_tqdm=False)
        return time.perf_counter() - start

    print("RESULT " + json.dumps({"vllm": vllm.__version__}), flush=True)
    for line in sys.stdin:
        requests = int(line)
        found = {"first_s": seconds(requests, 1), "whole_s": seconds(requests, tokens)}
        print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
