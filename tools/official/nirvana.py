"""NIRVANA's code: https://github.com/iDEA-iSAIL-Lab-UIUC/NIRVANA."""

import sys
from argparse import Namespace
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import torch

from tools.official.record import MANY_HEADS, SEED, TOKENS, Published, Record, functions

REPLACED = [
    "functions of main.py are run without its module, which imports the published copy of transformers",
    "no model, tokenizer or text is downloaded: from_pretrained gives the tiny Llama, get_examples the windows",
]


def _nirvana(clone: Path) -> list[Record]:
    """Runs of main.py's main: scores, thresholds and how many units each layer has left."""
    return [
        _run(clone, gamma, changed)
        for gamma, changed in ((1.0, {}), (3.36, {}), (3.0, {"num_key_value_heads": 4, "num_hidden_layers": 4}))
    ]


def _run(clone: Path, gamma: float, changed: Record) -> Record:
    model = MANY_HEADS.model(**changed).requires_grad_(True)
    hub = SimpleNamespace(from_pretrained=lambda *_, **__: model)
    given = {
        "torch": torch,
        "AutoTokenizer": hub,
        "LlamaConfig": hub,
        "LlamaForCausalLM": hub,
        "get_examples": lambda *_, **__: MANY_HEADS.token_windows(),
    }
    settings = {"prune_type": "NIRVANA", "sparsity": 0.5, "gamma": gamma, "llama": changed}
    arguments = Namespace(
        **settings, base_model="", data="", num_examples=MANY_HEADS.windows, seq_len=TOKENS, data_idx=-1, seed=SEED,
        device="cpu", verbose=False, select=False, torch_version=2.0, prune=True, get_kl=False, test_after_prune=False,
        save_model=None,
    )  # fmt: skip
    published = functions(clone / "Llama/main.py", {"structure_prune_weight", "get_pruning_idx", "main"}, given)
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
        "settings": settings,
        "scores": {axis: torch.stack([scores[f"{name}.{block}"] for name in layers]) for axis, block in axes.items()},
        "thresholds": {"kv_heads": variables["attn_threshold"], "intermediate": variables["mlp_threshold"]},
        "pruned": {"kv_heads": variables["prune_attn"], "intermediate": variables["prune_mlp"]},
        "widths": {
            "kv_heads": [len(model.get_submodule(f"{name}.self_attn.k_proj").weight) // head_dim for name in layers],
            "intermediate": [len(model.get_submodule(f"{name}.mlp.up_proj").weight) for name in layers],
        },
    }


NIRVANA = Published("iDEA-iSAIL-Lab-UIUC/NIRVANA", "Llama/main.py:175 main", REPLACED, MANY_HEADS, _nirvana)
