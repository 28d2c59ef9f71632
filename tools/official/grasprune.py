"""GRASPrune's code: https://github.com/ZiY-Wang/GRASPrune."""

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tools.official.record import MANY_HEADS, SEED, Published, Record
from tvaprune.options.axes import AXES, Axis

KV_HEADS = 4  # of 8 heads, so that a head of keys serves two of queries
SETTINGS = {"epochs": 4, "rescale_epochs": 3, "lr": 0.05, "rescale_lr": 0.05, "tau": 1.5, "rescale_alpha": 0.5}
# Shares to keep, and what is taken from the first scores of the first layer's heads, so that all of them are dropped.
RUNS = ((0.7, 0.0), (0.5, 4.0))
ATTRIBUTES: dict[Axis, tuple[str, str]] = {
    "intermediate": ("mlp", "gate_score"),
    "kv_heads": ("self_attn", "gate_score_kv"),
}
REPLACED = [
    "load_text_dataset and TokenBlockDataset, which download and tokenize texts, give the token windows",
    "DataLoader does not shuffle, and tqdm draws nothing",
    "scores start at random numbers and not at 0, where all are equal and rounding decides the ranking",
    "the module rebuild, which imports what transformers has moved, is empty: nothing is loaded again here",
    "transformers has renamed past_key_value, so the attention gate keeps no cache",
]


def _first_scores(layers: int, axis: Axis, units: int) -> Tensor:
    """Where the scores of an axis start: normal, [layers, units]."""
    generator = torch.Generator().manual_seed(SEED + 2 + AXES.index(axis))
    return torch.randn(layers, units, generator=generator)


class _Windows(Dataset[dict[str, Tensor]]):
    """The token windows in place of the published data set."""

    def __init__(self, *_: Any) -> None:
        self._windows = MANY_HEADS.token_windows()

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._windows[index], "attention_mask": torch.ones_like(self._windows[index])}


def _grasprune(clone: Path) -> list[Record]:
    """Masks and scores after train_gates, and scales after train_rescale, for each share to keep."""
    with patch.dict("sys.modules", {"rebuild": SimpleNamespace(load_pruned_model=None)}):
        pipeline = importlib.import_module("pipeline")
    in_order = patch.object(pipeline, "DataLoader", lambda data, **named: DataLoader(data, batch_size=1))
    quiet = patch.object(pipeline, "tqdm", lambda loader, **_: _Bar(loader))
    texts = patch.object(pipeline, "load_text_dataset", lambda *_: None)
    with in_order, quiet, texts, patch.object(pipeline, "TokenBlockDataset", _Windows):
        return [_run(pipeline, *run) for run in RUNS]


def _run(pipeline: Any, ratio: float, shift: float) -> Record:
    model = MANY_HEADS.model(num_key_value_heads=KV_HEADS)
    settings = pipeline.PruningConfig(
        **SETTINGS, keep_ratio=ratio, dtype=torch.float32, device="cpu", num_samples=MANY_HEADS.windows,
        output_dir="unused",
    )  # fmt: skip
    pipeline.attach_pruning_gates(model, gate_init=0.0, tau=settings.tau, device="cpu")
    layers = pipeline.get_transformer_layers(model)

    def read(part: str | None = None) -> dict[Axis, Tensor]:
        found = {}
        for axis, (block, score) in ATTRIBUTES.items():
            modules = [getattr(layer, block) for layer in layers]
            name = score if part is None else part + score.removeprefix("gate_score")
            found[axis] = torch.stack([getattr(module, name).detach().clone() for module in modules])
        return found

    for axis, (block, score) in ATTRIBUTES.items():
        starts = _first_scores(len(layers), axis, getattr(getattr(layers[0], block), score).numel())
        starts[0] -= shift if axis == "kv_heads" else 0
        for layer, start in zip(layers, starts, strict=True):
            getattr(getattr(layer, block), score).data.copy_(start)
    first_scores = read()
    first = [take for _, _, take in _masks(pipeline, model, settings)]
    pipeline.train_gates(model, None, settings)
    scores = read()
    pipeline.apply_final_hard_masks(model, settings)
    pipeline.train_rescale(model, None, settings)
    return {
        "settings": {**SETTINGS, "keep_ratio": ratio, "llama": {"num_key_value_heads": KV_HEADS}},
        "first_scores": first_scores,
        "first_keep": {"intermediate": torch.stack(first[::2]), "kv_heads": torch.stack(first[1::2])},
        "scores": scores,
        "keep": {axis: mask.bool() for axis, mask in read("eval_keep_mask").items()},
        "rescale": read(),
    }


def _masks(pipeline: Any, model: Any, settings: Any) -> Any:
    """The masks of a step, by layer: of the MLP, then of the heads."""
    prices = pipeline.compute_ffn_unit_cost("cpu"), pipeline.compute_attention_group_cost(model.config, "cpu")
    return pipeline.build_batch_budget_masks(model, *prices, settings.keep_ratio, settings.tau)


class _Bar:
    """tqdm's interface as far as it is used."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __iter__(self) -> Any:
        return iter(self._loader)

    def set_postfix(self, **_: Any) -> None:
        """Nothing is drawn."""


GRASPRUNE = Published(
    "ZiY-Wang/GRASPrune",
    "pipeline.py:52 build_batch_budget_masks, 121 train_gates, 368 train_rescale",
    REPLACED,
    MANY_HEADS,
    _grasprune,
)
