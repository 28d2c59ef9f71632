"""Scores of Bonsai's, NIRVANA's and LoRAPrune's own code on a tiny random Llama.

tests/unit/test_official_bonsai_nirvana.py compares them with ours.

    git clone https://github.com/ldery/Bonsai clone
    python -m tools.official_bonsai_nirvana --method bonsai --clone clone

The published functions run as they are. What is replaced around them, because they want a GPU, a download or another
transformers, is listed in the record. Nothing of their code is in this repository.
"""

import ast
import importlib
import json
import random
import subprocess
import sys
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Annotated, Any
from unittest.mock import patch

import numpy
import torch
import transformers
from jaxtyping import Int
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from typer import Option

from stages._command import command

LLAMA = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
SEED, WINDOWS, TOKENS = 0, 4, 16

Record = dict[str, Any]


@dataclass(frozen=True)
class Published:
    """Where a method's code is published, the files of it that run, and what records its scores, given the clone."""

    repository: str
    files: tuple[str, ...]
    record: Callable[[Path], list[Record]]


def tiny_llama(**changed: Any) -> PreTrainedModel:
    """A float32 Llama with the settings above, uniform weights and no biases: the same bits wherever it is built."""
    return fill(LlamaForCausalLM(LlamaConfig(**{**LLAMA, **changed})))


@torch.no_grad()
def fill(model: PreTrainedModel) -> PreTrainedModel:
    """Uniform weights by the order of their names, frozen."""
    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in sorted(model.named_parameters()):
        uniform = torch.rand(parameter.shape, generator=generator)
        # Norms around 1; the rest large enough for logits to differ visibly.
        parameter.copy_(uniform + 0.5 if "norm" in name else uniform - 0.5)
    return model.float().eval().requires_grad_(False)


def token_windows() -> Int[Tensor, "windows seq"]:
    """Calibration windows, int64."""
    generator = torch.Generator().manual_seed(SEED + 1)
    return torch.randint(0, int(LLAMA["vocab_size"]), (WINDOWS, TOKENS), generator=generator)


def factors(module: nn.Linear, rank: int, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """LoRA's A [rank, in] and B [out, rank] and gradients of both, uniform, for the module at this place."""
    generator = torch.Generator().manual_seed(SEED + 2 + index)
    shapes = 2 * [(rank, module.in_features), (module.out_features, rank)]
    a, b, on_a, on_b = (torch.rand(shape, generator=generator) - 0.5 for shape in shapes)
    return a, b, on_a, on_b


def _functions(file: Path, names: set[str], given: dict[str, Any]) -> dict[str, Any]:
    """Functions of a file whose module cannot be imported, run with these globals."""
    tree = ast.parse(file.read_text())
    chosen: list[ast.stmt] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    namespace = dict(given)
    exec(compile(ast.Module(chosen, []), str(file), "exec"), namespace)
    return namespace


def _plain(value: Any) -> Any:
    """Tensors and arrays as lists."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, Tensor):
        value = value.detach().int() if value.dtype == torch.bool else value.detach()
    return value.tolist() if hasattr(value, "tolist") else value


# ---- Bonsai


BONSAI_SETTINGS = {
    "prune_frac": 0.1,
    "masks_per_iter": 30,
    "nsamples": WINDOWS,
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
BONSAI_FUNCTIONS = {
    "set_masks", "get_random_mask", "get_random_mask_scores", "hook_fn", "get_score_models", "get_param_count",
    "run_data_to_sampling_proba", "get_linearmodel_hpdict", "investigate_score_based_mask",
}  # fmt: skip
BONSAI_REPLACED = [
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
    published = _functions(clone / "main.py", BONSAI_FUNCTIONS, given)
    watched = ("run_data_to_sampling_proba", "get_random_mask_scores", "get_score_models")
    seen = {name: _watch(published, name) for name in watched}
    model: Any = fill(llama.LlamaForCausalLM(LlamaConfig(**LLAMA)))
    model.seqlen, model.original_param_count = TOKENS, published["get_param_count"](model)
    windows = [(window[None], None) for window in token_windows()]
    random.seed(SEED)
    numpy.random.seed(SEED)
    with ExitStack() as stack:
        stack.enter_context(patch.object(evaluation, "get_loaders", lambda *_, **__: (windows, None)))
        stack.enter_context(patch.object(Tensor, "cuda", lambda tensor: tensor))
        stack.enter_context(patch.object(Tensor, "cpu", lambda tensor: tensor.clone()))
        stack.enter_context(patch.object(nn.Module, "cuda", lambda module: module))
        stack.enter_context(patch.object(scoring.ScoreModelHP, "plot_best", lambda _: None))
        arguments = Namespace(**BONSAI_SETTINGS, model="", dataset="", no_perturb=False)
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
        "modules": modules,
        "utilities": next(iter(utilities.values())),
        "coefficients": seen["get_score_models"][0][1]["global"],
        "keep": {name: mask.flatten() > 0 for name, mask in kept.items()},
    }
    source = "main.py:200 investigate_score_based_mask"
    return [{"source": source, "replaced": BONSAI_REPLACED, "settings": BONSAI_SETTINGS, **found}]


def _watch(namespace: dict[str, Any], name: str) -> list[tuple[Any, Any]]:
    """Keep the arguments and a copy of the result of each call of a function, from now on."""
    function, calls = namespace[name], []

    def watched(*args: Any, **named: Any) -> Any:
        found = function(*args, **named)
        calls.append((args, copy(found)))
        return found

    namespace[name] = watched
    return calls


# ---- NIRVANA


def _nirvana(clone: Path) -> list[Record]:
    """Runs of main.py's main: scores, thresholds and how many units each layer has left."""
    return [
        _nirvana_run(clone, gamma, changed)
        for gamma, changed in ((1.0, {}), (3.36, {}), (3.0, {"num_key_value_heads": 4, "num_hidden_layers": 4}))
    ]


def _nirvana_run(clone: Path, gamma: float, changed: Record) -> Record:
    model = tiny_llama(**changed).requires_grad_(True)
    hub = SimpleNamespace(from_pretrained=lambda *_, **__: model)
    given = {
        "torch": torch,
        "AutoTokenizer": hub,
        "LlamaConfig": hub,
        "LlamaForCausalLM": hub,
        "get_examples": lambda *_, **__: token_windows(),
    }
    settings = {"prune_type": "NIRVANA", "sparsity": 0.5, "gamma": gamma, "llama": changed}
    arguments = Namespace(
        **settings, base_model="", data="", num_examples=WINDOWS, seq_len=TOKENS, data_idx=-1, seed=SEED, device="cpu",
        verbose=False, select=False, torch_version=2.0, prune=True, get_kl=False, test_after_prune=False,
        save_model=None,
    )  # fmt: skip
    published = _functions(clone / "Llama/main.py", {"structure_prune_weight", "get_pruning_idx", "main"}, given)
    variables: Record = {}

    def keep_variables(frame: FrameType, event: str, _: Any) -> None:
        if event == "return" and frame.f_code is published["main"].__code__:
            variables.update(frame.f_locals)

    sys.setprofile(keep_variables)
    try:
        published["main"](arguments)
    finally:
        sys.setprofile(None)
    layers = [f"model.layers.{layer}" for layer in range(model.config.num_hidden_layers)]
    scores, axes = variables["score_norms"], {"kv_heads": "self_attn", "intermediate": "mlp"}
    head_dim = model.config.hidden_size // model.config.num_attention_heads
    return {
        "source": "Llama/main.py:175 main",
        "replaced": [
            "functions of main.py are run without its module, which imports the published copy of transformers",
            "no model, tokenizer or text is downloaded: from_pretrained gives the tiny Llama, get_examples the windows",
        ],
        "settings": settings,
        "scores": {axis: torch.stack([scores[f"{name}.{block}"] for name in layers]) for axis, block in axes.items()},
        "thresholds": {"kv_heads": variables["attn_threshold"], "intermediate": variables["mlp_threshold"]},
        "pruned": {"kv_heads": variables["prune_attn"], "intermediate": variables["prune_mlp"]},
        "widths": {
            "kv_heads": [len(model.get_submodule(f"{name}.self_attn.k_proj").weight) // head_dim for name in layers],
            "intermediate": [len(model.get_submodule(f"{name}.mlp.up_proj").weight) for name in layers],
        },
    }


# ---- LoRAPrune


def _loraprune(clone: Path) -> list[Record]:
    """The importance of every matrix by loraprune/utils.py, and the schedule of the sparsity."""
    names = {"compute_sensitivity", "schedule_sparsity_ratio"}
    model = tiny_llama()
    given = {"torch": torch, "NUM_ATTENTION_HEADS": model.config.num_attention_heads}
    published = _functions(clone / "loraprune/utils.py", names, given)
    rank, alpha, scores = 8, 16.0, {}
    modules = [(name, module) for name, module in model.model.layers.named_modules() if isinstance(module, nn.Linear)]
    for index, (name, module) in enumerate(modules):
        a, b, on_a, on_b = factors(module, rank, index)
        pair = {"lora_A": nn.Parameter(a), "lora_B": nn.Parameter(b)}
        pair["lora_A"].grad, pair["lora_B"].grad = on_a, on_b
        layer = SimpleNamespace(weight=module.weight, scaling=alpha / rank, out_features=module.out_features)
        for key, weight in pair.items():
            setattr(layer, key, SimpleNamespace(weight=weight))
        arguments = "self_attn" in name, "lora", name.endswith(("o_proj", "down_proj"))
        scores[f"model.layers.{name}"] = published["compute_sensitivity"](layer, *arguments)
    steps = list(range(0, 101, 5))
    ratios = [published["schedule_sparsity_ratio"](step, 100, 0.1, 0.1, 0.0, 0.5) for step in steps]
    return [
        {
            "source": "loraprune/utils.py:60 compute_sensitivity, 171 schedule_sparsity_ratio",
            "replaced": [
                "functions of utils.py are run without its module, which imports bitsandbytes",
                "NUM_ATTENTION_HEADS, a constant of that module, is the tiny Llama's",
            ],
            "settings": {"lora_r": rank, "lora_alpha": alpha, "ratio": 0.5, "warmup_iters": 0.1, "cooldown_iters": 0.1},
            "scores": scores,
            "schedule": {"steps": steps, "ratios": ratios},
        }
    ]


PUBLISHED = {
    "bonsai": Published(
        "ldery/Bonsai", ("main.py", "lib/eval.py", "lib/scoring_model.py", "lib/modelling_llama_mod.py"), _bonsai
    ),
    "nirvana": Published("iDEA-iSAIL-Lab-UIUC/NIRVANA", ("Llama/main.py",), _nirvana),
    "loraprune": Published("aim-uofa/LoRAPrune", ("loraprune/utils.py",), _loraprune),
}


def _git(clone: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(clone), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{clone}: {done.stderr.strip()}")
    return done.stdout.strip()


@command
def main(
    method: Annotated[str, Option(help="The baseline.")],
    clone: Annotated[Path, Option(help="A clone of its published repository, without changes.")],
    out: Annotated[Path, Option(help="Directory of the records.")] = Path("tests/official"),
) -> None:
    """Reads the clone; writes METHOD.json with the scores, the repository, the commit and the settings."""
    if method not in PUBLISHED:
        raise ValueError(f"--method {method}: use one of {', '.join(PUBLISHED)}")
    published = PUBLISHED[method]
    if changed := _git(clone, "diff", "--name-only", "HEAD", "--", *published.files):
        raise ValueError(f"{clone}: {changed} is not as in the commit")
    commit = _git(clone, "rev-parse", "HEAD")
    sys.path.insert(0, str(clone.resolve()))
    record = {
        "repository": published.repository,
        "commit": commit,
        "recorded_with": {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__},
        "llama": LLAMA,
        "seed": SEED,
        "windows": [WINDOWS, TOKENS],
        "runs": _plain(published.record(clone.resolve())),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{method}.json").write_text(json.dumps(record) + "\n")
