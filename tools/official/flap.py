"""FLAP's code and its Wanda-sp: https://github.com/CASIA-IVA-Lab/FLAP."""

import importlib
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tools.official.record import TOKENS, WIDE_HEADS, Published, Record, fingerprint
from tvaprune.architecture.topology import decoder_layers, layer_modules

REPLACED = [
    "lib.prune.get_loaders, which downloads texts, gives the token windows",
    "decoder layers of today's transformers are also given position_embeddings, which theirs computed inside",
    "self_attn.num_heads is set, which today's transformers keep in the config",
    "Tensor.cuda stays on the CPU",
    "torch.half is float32 for the means of the inputs",
]


class _FlapRun:
    """A run of one of the published functions, and what passes through it."""

    def __init__(self, **changed: Any) -> None:
        self.model = WIDE_HEADS.model(**changed)
        for layer in layer_modules(self.model):
            layer.attention.num_heads = self.model.config.num_attention_heads
            for module in (layer.o_proj, layer.down_proj):
                # As main.py:34-38: the published model has these biases, at 0.
                module.bias = nn.Parameter(torch.zeros(module.out_features), requires_grad=False)
        self.model.seqlen = TOKENS
        self.thresholded: list[Tensor] = []  # the argument of each Tensor.cuda(): a score per unit
        self.concatenated: list[Tensor] = []  # that of the one torch.cat: standardised scores of heads, then of units
        self.masks: dict[str, list[Tensor]] = {"kv_heads": [], "intermediate": []}

    def start(self, function: str, ratio: float, structure: str = "AL-AM", compress: bool = True) -> None:
        """Call lib.prune's function with the published scripts' settings; without `compress` the masks are not used."""
        prune = importlib.import_module("lib.prune")
        cut = prune.compress

        def recorded(layer: nn.Module, heads: Tensor | None, units: Tensor | None, *others: Any, **named: Any) -> None:
            for axis, mask in (("kv_heads", heads), ("intermediate", units)):
                if mask is not None:
                    self.masks[axis].append(mask.clone())
            if compress:
                cut(layer, heads, units, *others, **named)

        def on_cpu(tensor: Tensor) -> Tensor:
            self.thresholded.append(tensor.clone())
            return tensor

        def cat(tensors: list[Tensor]) -> Tensor:
            self.concatenated += tensors
            return torch.cat(tensors)

        settings = Namespace(nsamples=WIDE_HEADS.windows, seed=0, pruning_ratio=ratio, structure=structure, unstr=True)
        settings.metrics, settings.remove_heads = "WIFV", -1
        batches = [(window[None], None) for window in WIDE_HEADS.token_windows()]
        with ExitStack() as stack:
            stack.enter_context(patch.object(prune, "get_loaders", lambda *_, **__: (batches, None)))
            stack.enter_context(patch.object(prune, "compress", recorded))
            stack.enter_context(patch.object(prune, "torch", _Torch(half=torch.float32, cat=cat)))
            stack.enter_context(patch.object(Tensor, "cuda", on_cpu))
            stack.enter_context(_position_embeddings(self.model))
            getattr(prune, function)(settings, self.model, None, torch.device("cpu"))


class _Torch(ModuleType):
    """torch, but for some names."""

    def __init__(self, **replaced: Any) -> None:
        super().__init__("torch")
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def _position_embeddings(model: PreTrainedModel) -> Iterator[None]:
    """Give each decoder layer the rotary embeddings of the positions that it is given."""

    def add(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        embeddings = model.model.rotary_emb(args[0], kwargs["position_ids"])
        return args, {**kwargs, "position_embeddings": embeddings}

    with ExitStack() as hooks:
        for layer in decoder_layers(model):
            hooks.enter_context(layer.register_forward_pre_hook(add, with_kwargs=True))
        yield


def _flap(_: Path) -> list[Record]:
    """Scores with the published AL-AM structure, of query heads; masks and biases with both structures."""
    records = []
    for structure, ratio, changed in (
        ("AL-AM", 0.2, {}),
        ("AL-AM", 0.5, {}),
        ("UL-UM", 0.25, {}),
        ("AL-AM", 0.5, {"num_key_value_heads": 2}),
    ):
        run = _FlapRun(**changed)
        # With groups the published code scores, but cannot cut: its masks are of query heads, for k and v too.
        run.start("prune_flap", ratio, structure, compress=not changed)
        settings = {"pruning_ratio": ratio, "metrics": "WIFV", "structure": structure, "llama": changed}
        found: Record = {"settings": settings, "weights": fingerprint(WIDE_HEADS.model(**changed))}
        if structure == "AL-AM":
            heads, units = (part.view(WIDE_HEADS.config["num_hidden_layers"], -1) for part in run.concatenated)
            found["scores"] = {"kv_heads": heads, "intermediate": units}
        if not changed:
            found["keep"] = {axis: torch.stack(masks) for axis, masks in run.masks.items()}
            modules = [(name, module) for name, module in run.model.named_modules() if isinstance(module, nn.Linear)]
            found["bias"] = {name: module.bias for name, module in modules if module.bias is not None}
        records.append(found)
    return records


def _wanda_sp(_: Path) -> list[Record]:
    records = []
    for ratio in (0.25, 0.5):
        run = _FlapRun()
        run.start("prune_wanda_sp", ratio)
        scores = {"kv_heads": torch.stack(run.thresholded[::2]), "intermediate": torch.stack(run.thresholded[1::2])}
        keep = {axis: torch.stack(masks) for axis, masks in run.masks.items()}
        weights = fingerprint(WIDE_HEADS.model())
        records.append({"settings": {"pruning_ratio": ratio}, "weights": weights, "scores": scores, "keep": keep})
    return records


FLAP = Published("CASIA-IVA-Lab/FLAP", "lib/prune.py:280 prune_flap", REPLACED, WIDE_HEADS, _flap)
WANDA_SP = Published("CASIA-IVA-Lab/FLAP", "lib/prune.py:413 prune_wanda_sp", REPLACED, WIDE_HEADS, _wanda_sp)
