"""LoRAPrune's code: https://github.com/aim-uofa/LoRAPrune."""

from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from tools.official.record import MANY_HEADS, SEED, Published, Record, functions

REPLACED = [
    "functions of utils.py are run without its module, which imports bitsandbytes",
    "NUM_ATTENTION_HEADS, a constant of that module, is the tiny Llama's",
]


def factors(module: nn.Linear, rank: int, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """LoRA's A [rank, in] and B [out, rank] and gradients of both, uniform, for the module at this place."""
    generator = torch.Generator().manual_seed(SEED + 2 + index)
    shapes = 2 * [(rank, module.in_features), (module.out_features, rank)]
    a, b, on_a, on_b = (torch.rand(shape, generator=generator) - 0.5 for shape in shapes)
    return a, b, on_a, on_b


def _loraprune(clone: Path) -> list[Record]:
    """The importance of every matrix by loraprune/utils.py, and the schedule of the sparsity."""
    names = {"compute_sensitivity", "schedule_sparsity_ratio"}
    model = MANY_HEADS.model()
    given = {"torch": torch, "NUM_ATTENTION_HEADS": model.config.num_attention_heads}
    published = functions(clone / "loraprune/utils.py", names, given)
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
            "settings": {"lora_r": rank, "lora_alpha": alpha, "ratio": 0.5, "warmup_iters": 0.1, "cooldown_iters": 0.1},
            "scores": scores,
            "schedule": {"steps": steps, "ratios": ratios},
        }
    ]


LORAPRUNE = Published(
    "aim-uofa/LoRAPrune",
    "loraprune/utils.py:60 compute_sensitivity, 171 schedule_sparsity_ratio",
    REPLACED,
    MANY_HEADS,
    _loraprune,
)
