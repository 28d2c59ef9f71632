"""Figures of the compact model."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer

from tvaprune.checkpoint.compact import CheckpointSize
from tvaprune.checkpoint.loading import load_config
from tvaprune.checkpoint.parity import compact_logits, compare, masked_dense_logits
from tvaprune.checkpoint.update import WeightUpdate
from tvaprune.cost import peak_memory_bytes
from tvaprune.model.topology import Topology
from tvaprune.widths.masks import Masks, sparsity

PROMPTS = (
    "The history of the city begins with a small settlement by the river, where traders met in the spring.",
    "Water boils at a lower temperature on a mountain because the pressure of the air is lower there.",
    "def area(radius):\n    return 3.14159 * radius ** 2\n\n# The area of a circle grows with the square of",
)


class Cost(NamedTuple):
    seconds: float
    peak_memory_bytes: int


def measured(work: Callable[[], CheckpointSize]) -> tuple[CheckpointSize, Cost]:
    """Run, and say how long it took and how high the memory of the process stood by then."""
    started = time.perf_counter()
    result = work()
    return result, Cost(time.perf_counter() - started, peak_memory_bytes(torch.device("cpu")))


def compact_metrics(
    dense: Path,
    masks: Masks,
    update: WeightUpdate,
    compact: Path,
    size: CheckpointSize,
    cost: Cost,
    prompt_tokens: int,
) -> dict[str, Any]:
    """metrics/compact.json: sizes as counted in the files, and the logits of masked dense against reloaded compact."""
    topology = Topology.of(load_config(dense))
    tokenizer = AutoTokenizer.from_pretrained(dense)
    tokens = [tokenizer(prompt * 8, add_special_tokens=False)["input_ids"][:prompt_tokens] for prompt in PROMPTS]
    shortest = min(map(len, tokens))
    input_ids = torch.tensor([row[:shortest] for row in tokens])
    parity = compare(masked_dense_logits(dense, masks, update, input_ids), compact_logits(compact, input_ids))
    return {
        "sparsity_decoder": sparsity(topology, masks),
        "sparsity_model": 1 - size.parameters_kept / size.parameters_dense,
        "params_dense": size.parameters_dense,
        "params_kept": size.parameters_kept,
        "bytes_dense": size.bytes_dense,
        "bytes_compact": size.bytes_kept,
        **parity._asdict(),
        **cost._asdict(),
    }
