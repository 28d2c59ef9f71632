"""The models of a whole run in vLLM."""

from typing import Any

from tools.gpu.parts import Settings
from tools.gpu.resumable import NotPossibleError
from tools.gpu.whole import COMPACT, DENSE, workspace
from tools.vllm_speed import compare_served


def vllm(step: str, settings: Settings) -> dict[str, Any]:
    """The dense and the pruned model of `whole`, at 1, 16 and 64 requests at once."""
    if settings.vllm is None:
        raise NotPossibleError("no interpreter of an environment that has vLLM was given")
    dense, compact = (workspace(settings) / name for name in (DENSE, COMPACT))
    if not (compact / "config.json").is_file():
        raise NotPossibleError("needs the models of part whole, on this machine")
    requests, tokens, repeats = ([1, 2], (8, 4), 1) if settings.tiny else ([1, 16, 64], (128, 64), 3)
    return compare_served(settings.vllm, dense, compact, requests, tokens, repeats, "bfloat16")
