"""Bonsai's code: https://github.com/ldery/Bonsai."""

import importlib
import random
import time
from argparse import Namespace
from collections import defaultdict
from contextlib import ExitStack
from copy import copy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy
import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from tools.official.record import MANY_HEADS, SEED, TOKENS, Published, Record, fill, functions

SETTINGS = {
    "prune_frac": 0.1,
    "masks_per_iter": 30,
    "nsamples": MANY_HEADS.windows,
    "bsz": 1,
    "prune_method": "wanda",
    "mlp_attn_ratio": 1.0,
    "sm_reg_weight": "[1e2, 1e-4, 0]",
    "sm_lr_factor": "[100, 10, 1, 0.1]",
    "sm_bsz": "[32, 64, 128]",
    "sm_reg_type": "l1",
    "sm_nepochs": 50,
    "sm_lin_model_type": "global",
}
FUNCTIONS = {
    "set_masks", "get_random_mask", "get_random_mask_scores", "hook_fn", "get_score_models", "get_param_count",
    "run_data_to_sampling_proba", "get_linearmodel_hpdict", "investigate_score_based_mask",
}  # fmt: skip
REPLACED = [
    "functions of main.py are run without its module, which imports wandb",
    "lib.eval.get_loaders, which downloads texts, gives the token windows, and no tokenizer is loaded",
    "Tensor.cuda and Module.cuda stay on the CPU, and so does the perplexity",
    "Tensor.cpu copies, as it does from a GPU (main.py:48 changes what it gets)",
    "ScoreModelHP.plot_best, which draws figures for wandb, does nothing",
]


def _bonsai(clone: Path) -> list[Record]:
    """One round by main.py's investigate_score_based_mask: priors, sub-models, coefficients and what it drops."""
    evaluation = importlib.import_module("lib.eval")
    scoring = importlib.import_module("lib.scoring_model")
    llama = importlib.import_module("lib.modelling_llama_mod")
    given: dict[str, Any] = {
        "torch": torch,
        "np": numpy,
        "defaultdict": defaultdict,
        "random": random,
        "time": time.time,
        "INF": 1e8,
        "ScoreModelHP": scoring.ScoreModelHP,
        "AutoTokenizer": SimpleNamespace(from_pretrained=lambda *_, **__: None),
        "eval_ppl_trainonly": partial(evaluation.eval_ppl_trainonly, device=torch.device("cpu")),
    }
    published = functions(clone / "main.py", FUNCTIONS, given)
    watched = ("run_data_to_sampling_proba", "get_random_mask_scores", "get_score_models")
    seen = {name: _watch(published, name) for name in watched}
    model: Any = fill(llama.LlamaForCausalLM(LlamaConfig(**MANY_HEADS.config)))
    model.seqlen, model.original_param_count = TOKENS, published["get_param_count"](model)
    windows = [(window[None], None) for window in MANY_HEADS.token_windows()]
    random.seed(SEED)
    numpy.random.seed(SEED)
    with ExitStack() as stack:
        stack.enter_context(patch.object(evaluation, "get_loaders", lambda *_, **__: (windows, None)))
        stack.enter_context(patch.object(Tensor, "cuda", lambda tensor: tensor))
        stack.enter_context(patch.object(Tensor, "cpu", lambda tensor: tensor.clone()))
        stack.enter_context(patch.object(nn.Module, "cuda", lambda module: module))
        stack.enter_context(patch.object(scoring.ScoreModelHP, "plot_best", lambda _: None))
        arguments = Namespace(**SETTINGS, model="", dataset="", no_perturb=False)
        kept = published["investigate_score_based_mask"](arguments, model, SimpleNamespace(log=lambda _: None))
    masks, utilities = seen["get_random_mask_scores"][0][1]
    modules = {}
    for name, (args, (probability, _, candidates)) in zip(masks, seen["run_data_to_sampling_proba"], strict=True):
        count, total = args[0]["in"]
        modules[name] = {
            "prior": (total / count).flatten(),
            "candidates": candidates,
            "probability": probability[candidates],
            "masks": [mask.int() for mask in masks[name]],
        }
    found = {
        "settings": SETTINGS,
        "modules": modules,
        "utilities": next(iter(utilities.values())),
        "coefficients": seen["get_score_models"][0][1]["global"],
        "keep": {name: mask.flatten() > 0 for name, mask in kept.items()},
    }
    return [found]


def _watch(namespace: dict[str, Any], name: str) -> list[tuple[Any, Any]]:
    """Keep the arguments and a copy of the result of each call of a function, from now on."""
    function, calls = namespace[name], []

    def watched(*args: Any, **named: Any) -> Any:
        found = function(*args, **named)
        calls.append((args, copy(found)))
        return found

    namespace[name] = watched
    return calls


BONSAI = Published("ldery/Bonsai", "main.py:200 investigate_score_based_mask", REPLACED, MANY_HEADS, _bonsai)
