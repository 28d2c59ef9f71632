"""Prefill and decode of models of published shapes with random weights: dense, and pruned in several ways."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from tools.alignment_table import by_multiple
from tools.gpu.parts import BATCHES, MODELS, Settings
from tools.mask_speed import against_dense, time_widths
from tvaprune.architecture.parameter_counts import sparsity
from tvaprune.architecture.topology import LayerWidths, Topology
from tvaprune.checkpoint.config import load_config
from tvaprune.device import pick_device, pick_dtype
from tvaprune.estimate import random_masks
from tvaprune.masks.adapt import adapt, nearest_multiple
from tvaprune.measures.comparison import spread_evenly
from tvaprune.measures.latency import Benchmark
from tvaprune.options.axes import AXES
from tvaprune.runtime.packed import pick_runtime

SHARES = (0.2, 0.5)
_TINY = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "vocab_size": 512,
    "head_dim": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def decode(step: str, settings: Settings) -> dict[str, Any]:
    """`MODEL, batch N`: pruned at random on all axes, in multiples of 128 within the parameters."""
    model, batch = step.split(", batch ")
    config = shapes(model, settings)
    topology, multiple = Topology.of(config), _multiple(settings)
    masks = {
        str(share): adapt(topology, random_masks(topology, share), share, "budget", multiple, multiple)
        for share in SHARES
    }
    return speed(
        config, {name: LayerWidths.of_counts(each.widths()) for name, each in masks.items()}, int(batch), settings
    )


def multiples(step: str, settings: Settings) -> dict[str, Any]:
    """`batch N`: random masks at 0.5, adapted to each multiple within the same parameters."""
    config = shapes("Mistral-7B", settings)
    topology = Topology.of(config)
    masks = by_multiple(topology, random_masks(topology, 0.5), 0.5)
    widths = {name: LayerWidths.of_counts(each.widths()) for name, each in masks.items()}
    return speed(config, widths, int(step.removeprefix("batch ")), settings)


def axes(step: str, settings: Settings) -> dict[str, Any]:
    """`AXIS, batch N`: without shares of the units of one axis."""
    axis, batch = step.split(", batch ")
    config = shapes("Mistral-7B", settings)
    topology = Topology.of(config)
    widths = {str(share): without(topology, axis, share, _multiple(settings)) for share in SHARES}
    return speed(config, widths, int(batch), settings)


def without(topology: Topology, axis: str, share: float, multiple: int) -> LayerWidths:
    """Widths without a share of one axis: units to the nearest multiple, heads or whole layers spread evenly."""
    hidden, layers, heads = topology.hidden, topology.layers, topology.kv_heads
    units, kept_heads = [topology.intermediate] * layers, [heads] * layers
    if axis == "hidden":
        hidden = nearest_multiple(round((1 - share) * hidden), multiple, hidden)
    elif axis == "intermediate":
        units = [nearest_multiple(round((1 - share) * topology.intermediate), multiple, topology.intermediate)] * layers
    elif axis == "kv_heads":
        for head in spread_evenly(layers * heads, round(share * layers * heads)):
            kept_heads[head // heads] -= 1
    else:
        for layer in spread_evenly(layers, round(share * layers)):
            units[layer] = kept_heads[layer] = 0
    return LayerWidths(hidden, units, kept_heads)


def shapes(model: str, settings: Settings) -> PreTrainedConfig:
    """The published config."""
    config = load_config(Path("configs/models") / MODELS[model])
    if settings.tiny:
        config.update(_TINY)
    return config


def _multiple(settings: Settings) -> int:
    return 16 if settings.tiny else 128


def speed(config: PreTrainedConfig, pruned: dict[str, LayerWidths], batch: int, settings: Settings) -> dict[str, Any]:
    """Medians of interleaved rounds of the dense model and the pruned ones, and the widths that they are of."""
    device = pick_device()
    dtype, runtime = pick_dtype(device), pick_runtime(settings.runtime, device)  # type: ignore[arg-type]
    benchmark = Benchmark(BATCHES[batch], decode_prompt_tokens=128, decode_tokens=64, repeats=7, max_warmup=3)
    if settings.tiny:
        batch, benchmark = min(batch, 2), Benchmark(8, decode_prompt_tokens=4, decode_tokens=2, repeats=3, max_warmup=2)
    topology = Topology.of(config)
    models = {"dense": LayerWidths.dense(topology), **pruned}
    prefilled, decoded = time_widths(config, models, [batch], benchmark, runtime, dtype, device)[batch]
    widths = {
        name: {
            "sparsity": sparsity(topology, {axis: torch.tensor(getattr(each, axis)) for axis in AXES}),
            "hidden": each.hidden,
            "intermediate": sum(each.intermediate) / topology.layers,
            "kv_heads": sum(each.kv_heads) / topology.layers,
        }
        for name, each in models.items()
    }
    return {
        "batch": batch,
        "prefill_tokens": benchmark.prefill_tokens,
        "decode_prompt_tokens": benchmark.decode_prompt_tokens,
        "decode_tokens": benchmark.decode_tokens,
        "repeats": benchmark.repeats,
        "runtime": runtime,
        "dtype": str(dtype).removeprefix("torch."),
        "widths": widths,
        "prefill": against_dense(prefilled, "flops"),
        "decode": against_dense(decoded, "bytes_read"),
    }
