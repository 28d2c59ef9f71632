"""Speed of models side by side: prefill and decode apart, warmed, synchronised, interleaved.

Whatever else slows the machine for a while slows every model alike, because each repetition times them all, in
an order that rotates. Beside each speedup stands its limit: the ratio of what the hardware has to do.
"""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import PreTrainedModel

from tvaprune.device import synchronise
from tvaprune.runtime.packed import Runtime, prepare
from tvaprune.runtime.passes import Decoding, RecordedDecoding, prefill, recorded_prefill

# Warm-up ends when every probe's latency differs from its last one by no more than this fraction.
STABLE = 0.05


@dataclass(frozen=True)
class Phase:
    """Prefill or decode of all models at one batch size.

    Attributes:
        latency_ms: by model, one value a repetition: a whole prefill, or the mean of the decode steps.
        tokens: processed in that time, all sequences of the batch together.
        work: by model, what bounds the latency: FLOPs of a prefill, or bytes read by a decode step.
    """

    latency_ms: dict[str, list[float]]
    tokens: int
    work: dict[str, float]


def load_timed(
    loaders: dict[str, Callable[[], PreTrainedModel]],
) -> tuple[dict[str, PreTrainedModel], dict[str, float]]:
    """Load models, and time it in seconds with the files in the page cache and the code imported.

    Each is loaded twice and the second load is timed, else the first in line would pay for the imports.
    """
    models, seconds = {}, {}
    for name, loader in loaders.items():
        loader()
        start = time.perf_counter()
        models[name] = loader()
        seconds[name] = time.perf_counter() - start
    return models, seconds


def checkpoint_bytes(directory: Path) -> int:
    """Size of a model's weights on disk."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


@torch.inference_mode()
def prefill_flops(model: PreTrainedModel, batch: int, tokens: int) -> int:
    """Floating-point operations of one prefill: every matrix product that runs, and causal attention.

    A multiplication and its addition are two. Counted while the model runs, so uneven widths, dropped
    blocks and a vocabulary product of the last position alone are counted as they are.
    """

    def attention(
        query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, out_shape: Any = None, **__: Any
    ) -> int:
        # Query i reads the keys up to its own; torch's own formula counts all keys, twice what kernels do.
        heads, queries, keys = query[0] * query[1], query[2], key[2]
        return 2 * heads * (queries * keys - queries * (queries - 1) // 2) * (query[3] + value[3])

    aten = torch.ops.aten
    kernels = (
        aten._scaled_dot_product_flash_attention_for_cpu,
        aten._scaled_dot_product_flash_attention,
        aten._scaled_dot_product_efficient_attention,
        aten._scaled_dot_product_cudnn_attention,
    )
    counter = FlopCounterMode(display=False, custom_mapping=dict.fromkeys(kernels, attention))
    with torch.compiler.set_stance("force_eager"), counter:
        prefill(model, random_prompt(model, batch, tokens))
    return counter.get_total_flops()


@torch.inference_mode()
def decode_bytes(model: PreTrainedModel, batch: int, prompt_tokens: int, steps: int) -> float:
    """Bytes that a decode step reads, mean over `steps`: weights once, and the cache.

    Of the embedding only the batch's rows are read; where it is tied, the vocabulary product reads it
    whole. The cache at step i holds the prompt, the i tokens before it and its own.
    """
    weights = {id(weight): weight.nbytes for weight in model.parameters()}  # a tied one once
    embedding = model.get_input_embeddings().weight
    if embedding is not model.get_output_embeddings().weight:
        weights[id(embedding)] = 0
    rows = batch * embedding.shape[1] * embedding.element_size()
    with torch.compiler.set_stance("force_eager"):
        _, cache = prefill(model, random_prompt(model, 1, 2))
    states = [state for layer in cache.layers for state in (layer.keys, layer.values) if state is not None]
    per_position = sum(state.nbytes for state in states) / 2
    return sum(weights.values()) + rows + batch * per_position * (prompt_tokens + (steps + 1) / 2)


def interleave(
    probes: dict[str, Callable[[], float]], repeats: int, max_warmup: int, progress: str | None = None
) -> dict[str, list[float]]:
    """Call every probe once a round, each round starting with the next one.

    Args:
        probes: each returns one measurement.
        repeats: rounds that count.
        max_warmup: rounds before those, at most; at least 2, until all are stable.
        progress: what a progress bar says; none is shown without.

    Returns:
        By probe, `repeats` measurements; those at one index are of one round.
    """
    names = list(probes)

    def run(number: int) -> dict[str, float]:
        first = number % len(names)
        return {name: probes[name]() for name in names[first:] + names[:first]}

    bar = tqdm(total=max_warmup + repeats, desc=progress, unit="round", disable=progress is None)
    last: dict[str, float] | None = None
    for number in range(max_warmup):
        new = run(number)
        bar.update()
        if last is not None and all(abs(new[name] - last[name]) <= STABLE * last[name] for name in names):
            break
        last = new
    bar.total = bar.n + repeats
    rounds = []
    for number in range(repeats):
        rounds.append(run(number))
        bar.update()
    bar.close()
    return {name: [values[name] for values in rounds] for name in names}


@torch.inference_mode()
def time_prefill(
    models: dict[str, PreTrainedModel],
    work: dict[str, float],
    batch: int,
    tokens: int,
    repeats: int,
    max_warmup: int,
    runtime: Runtime = "eager",
    progress: str | None = None,
) -> Phase:
    """Time to first token: a forward over the prompt that fills a cache, and the last position's logits."""

    def probe(model: PreTrainedModel) -> Callable[[], float]:
        prompt = random_prompt(model, batch, tokens)
        work = recorded_prefill(model, prompt) if runtime == "graphs" else partial(prefill, model, prompt)
        return lambda: _milliseconds(model.device, work)

    with without_garbage_collection():
        latency = interleave({name: probe(model) for name, model in models.items()}, repeats, max_warmup, progress)
    return Phase(latency_ms=latency, tokens=batch * tokens, work=work)


@torch.inference_mode()
def time_decode(
    models: dict[str, PreTrainedModel],
    work: dict[str, float],
    batch: int,
    prompt_tokens: int,
    steps: int,
    repeats: int,
    max_warmup: int,
    runtime: Runtime = "eager",
    progress: str | None = None,
) -> Phase:
    """Time per generated token after a prompt, whose own reading is not timed."""

    def probe(model: PreTrainedModel) -> Callable[[], float]:
        prompt = random_prompt(model, batch, prompt_tokens)
        decoding = (RecordedDecoding if runtime == "graphs" else Decoding)(model, prompt, steps)

        def measure() -> float:
            decoding.start()
            return _milliseconds(model.device, decoding.run) / steps

        return measure

    with without_garbage_collection():
        latency = interleave({name: probe(model) for name, model in models.items()}, repeats, max_warmup, progress)
    return Phase(latency_ms=latency, tokens=batch, work=work)


def compare(
    models: dict[str, PreTrainedModel],
    batch_sizes: list[int],
    prefill_tokens: int,
    decode_prompt_tokens: int,
    decode_tokens: int,
    repeats: int,
    max_warmup: int,
    runtime: Runtime = "eager",
) -> dict[int, tuple[Phase, Phase]]:
    """Prefill and decode at every batch size, with progress bars.

    Args:
        models: "dense", "compact" and whatever else is to be timed beside them, all on one device; all are changed
            by `prepare` for the runtime, once their work is counted (packed weights are no parameters).
        batch_sizes: sequences at once.

    Returns:
        By batch size, the prefill and the decode.
    """
    flops = {
        batch: {name: float(prefill_flops(model, batch, prefill_tokens)) for name, model in models.items()}
        for batch in batch_sizes
    }
    bytes_read = {
        batch: {name: decode_bytes(model, batch, decode_prompt_tokens, decode_tokens) for name, model in models.items()}
        for batch in batch_sizes
    }
    models = {name: prepare(model, runtime) for name, model in models.items()}
    return {
        batch: (
            time_prefill(
                models, flops[batch], batch, prefill_tokens, repeats, max_warmup, runtime, f"prefill, batch {batch}"
            ),
            time_decode(
                models,
                bytes_read[batch],
                batch,
                decode_prompt_tokens,
                decode_tokens,
                repeats,
                max_warmup,
                runtime,
                f"decode, batch {batch}",
            ),
        )
        for batch in batch_sizes
    }


def random_prompt(model: PreTrainedModel, batch: int, tokens: int) -> Int[Tensor, "batch tokens"]:
    """Random token ids, the same for every model of one vocabulary: what they say changes no shape."""
    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (batch, tokens), generator=generator).to(model.device)


def _milliseconds(device: torch.device, work: Callable[[], object]) -> float:
    """How long the device is busy with it, from an idle device to an idle device."""
    synchronise(device)
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        synchronise(device)
        return start.elapsed_time(end)
    begin = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - begin)


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Keep the collector's pauses out of the timings."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
