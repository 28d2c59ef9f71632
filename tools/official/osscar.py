"""OSSCAR's code: https://github.com/mazumder-lab/OSSCAR."""

import importlib
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from tools.official.record import MANY_HEADS, TOKENS, Published, Record, fingerprint
from tvaprune.architecture.topology import decoder_layers, layer_modules
from tvaprune.options.axes import Axis

# Of the published class: whatever is not the attention's output projection is pruned by single inputs.
LAYER_NAMES: dict[Axis, str] = {"kv_heads": "self_attn.out_proj", "intermediate": "fc2"}
# Defaults of opt_prune.py, which the README's command does not change.
SETTINGS = {"update_iter": 10, "update_iter2": 2, "lambda2": 1e-2}
ROWS = 8  # of the last layer's matrices, for the record
REPLACED = [
    "opt_sequential, which walks OPT's modules, is walked over Llama's: o_proj is its out_proj, down_proj its fc2",
    "Tensor.to stays on the CPU",
]


def _on_cpu(to: Any) -> Any:
    return lambda tensor, *args, **named: tensor if args[:1] == ("cuda",) else to(tensor, *args, **named)


@torch.no_grad()
def _osscar(_: Path) -> list[Record]:
    """Which units stay, and rows of the last layer's matrices, which depend on all before them."""
    published = importlib.import_module("osscar_prune").OSSCAR_prune
    records = []
    for sparsity in (0.25, 0.5):
        model = MANY_HEADS.model()
        keep: dict[Axis, list[Tensor]] = {axis: [] for axis in LAYER_NAMES}
        with patch.object(Tensor, "to", _on_cpu(Tensor.to)):
            matrices = _prune(model, published, sparsity, keep)
        settings = {"algo": "OSSCAR_prune", "sp": sparsity, **SETTINGS}
        records.append(
            {
                "settings": settings,
                "weights": fingerprint(MANY_HEADS.model()),
                "keep": {axis: torch.stack(masks) for axis, masks in keep.items()},
                "last_layer": {axis: module.weight[:ROWS] for axis, module in matrices.items()},
            }
        )
    return records


def _adding_to(solver: Any) -> Any:
    return lambda _, args, out: solver.add_batch(args[0], out)


def _prune(model: nn.Module, published: Any, sparsity: float, keep: dict[Axis, list[Tensor]]) -> dict[Axis, nn.Linear]:
    """As opt_prune.py:155-178: a layer's matrices from one pass of the whole layer, then its outputs once pruned."""
    heads = MANY_HEADS.config["num_attention_heads"]
    windows = MANY_HEADS.token_windows()
    hidden = model.get_submodule("model.embed_tokens")(windows)
    others = {"position_embeddings": model.model.rotary_emb(hidden, torch.arange(TOKENS)[None])}  # type: ignore[union-attr,operator]
    matrices: dict[Axis, nn.Linear] = {}
    for block, modules in zip(decoder_layers(model), layer_modules(model), strict=True):
        matrices = {"kv_heads": modules.o_proj, "intermediate": modules.down_proj}
        solvers = {
            axis: published(
                module, "OSSCAR_prune", nsamples=len(windows), seqlen=TOKENS, layername=LAYER_NAMES[axis],
                num_heads=heads, **SETTINGS,
            )
            for axis, module in matrices.items()
        }  # fmt: skip
        handles = [module.register_forward_hook(_adding_to(solvers[axis])) for axis, module in matrices.items()]
        for states in hidden:
            block(states[None], **others)
        for handle in handles:
            handle.remove()
        for axis, module in matrices.items():
            solvers[axis].prune(sp_fc=sparsity, sp_out=sparsity)
            units = heads if axis == "kv_heads" else module.in_features
            keep[axis].append(module.weight.view(len(module.weight), units, -1).any(-1).any(0))
        hidden = torch.cat([block(states[None], **others) for states in hidden])
    return matrices


OSSCAR = Published(
    "mazumder-lab/OSSCAR", "osscar_prune.py:128 prune, prune_algo.py:40 OSSCAR_fastprune", REPLACED, MANY_HEADS, _osscar
)
