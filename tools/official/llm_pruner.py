"""LLM-Pruner's code, and the magnitude in it: https://github.com/horseee/LLM-Pruner."""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tools.official.record import WIDE_HEADS, Published, Record, fingerprint

LLAMA = WIDE_HEADS.config
REPLACED = [
    "the __init__ of LLMPruner and LLMPruner.pruner, which import models that need other packages",
    "MetaPruner is given an output_transform that takes the logits, as the model's output is no tensor",
]


def _run(clone: Path, settings: Record, importance: str, **arguments: Any) -> Record:
    """The published block-wise run of hf_prune.py:95-150 on the layers between the first and the last one.

    Multi-head attention only: with groups the published code adds up query heads of other groups
    (LLMPruner/pruner/hf_llama_pruner.py:334-336).
    """
    for name in ("LLMPruner", "LLMPruner.pruner"):
        # Without their __init__, which import models that need other packages.
        package = ModuleType(name)
        package.__path__ = [str(clone.joinpath(*name.split(".")))]
        sys.modules[name] = package
    tp = importlib.import_module("LLMPruner.torch_pruning")
    llama_pruner = importlib.import_module("LLMPruner.pruner.hf_llama_pruner")
    model, windows = WIDE_HEADS.model().requires_grad_(True), WIDE_HEADS.token_windows()
    weights, score, scores = fingerprint(model), getattr(llama_pruner, importance)(**arguments), []

    def recorded(*args: Any, **named: Any) -> Tensor:
        scores.append(score(*args, **named))
        return scores[-1]

    inner = list(model.model.layers)[1:-1]
    pruner = tp.pruner.MetaPruner(
        model,
        windows[:2, :8],
        importance=recorded,
        ch_sparsity=settings["pruning_ratio"],
        ignored_layers=[],
        channel_groups={},
        consecutive_groups={layer.self_attn.q_proj: LLAMA["head_dim"] for layer in model.model.layers},
        customized_pruners={type(model.model.norm): llama_pruner.hf_rmsnorm_pruner},
        root_module_types=None,
        root_instances=[layer.self_attn.q_proj for layer in inner] + [layer.mlp.gate_proj for layer in inner],
        output_transform=lambda output: output.logits,
    )
    model.zero_grad()
    model(windows, labels=windows).loss.backward()
    pruner.step()
    heads = [each.view(-1, LLAMA["head_dim"]).sum(1) for each in scores if len(each) != LLAMA["intermediate_size"]]
    units = [each for each in scores if len(each) == LLAMA["intermediate_size"]]
    return {
        "settings": settings,
        "weights": weights,
        "scores": {"kv_heads": torch.stack(heads), "intermediate": torch.stack(units)},
        "keep": _kept(pruner.pruning_history()),
    }


def _kept(history: list[tuple[str, bool, list[int]]]) -> dict[str, Tensor]:
    """What the pruning history leaves: bool [layers, units] per axis."""
    layers, head_dim = LLAMA["num_hidden_layers"], LLAMA["head_dim"]
    keep = {
        "kv_heads": torch.ones(layers, LLAMA["num_attention_heads"], dtype=torch.bool),
        "intermediate": torch.ones(layers, LLAMA["intermediate_size"], dtype=torch.bool),
    }
    for name, _, dropped in history:
        layer = int(name.split(".")[2])
        if name.endswith("q_proj"):
            keep["kv_heads"][layer, torch.tensor(dropped) // head_dim] = False
        else:
            keep["intermediate"][layer, dropped] = False
    return keep


def _llm_pruner(clone: Path) -> list[Record]:
    settings = {"pruning_ratio": 0.25, "pruner_type": "taylor"}
    return [
        _run(clone, {**settings, "taylor": taylor}, "TaylorImportance", group_reduction="sum", taylor=taylor)
        for taylor in ("param_first", "vectorize")
    ]


def _magnitude(clone: Path) -> list[Record]:
    return [_run(clone, {"pruning_ratio": 0.25, "pruner_type": "l2"}, "MagnitudeImportance", p=2)]


LLM_PRUNER = Published(
    "horseee/LLM-Pruner",
    "LLMPruner/pruner/hf_llama_pruner.py:215 TaylorImportance, in hf_prune.py:95-150",
    REPLACED,
    WIDE_HEADS,
    _llm_pruner,
)
MAGNITUDE = Published(
    "horseee/LLM-Pruner",
    "LLMPruner/pruner/hf_llama_pruner.py:131 MagnitudeImportance, in hf_prune.py:95-150",
    REPLACED,
    WIDE_HEADS,
    _magnitude,
)
