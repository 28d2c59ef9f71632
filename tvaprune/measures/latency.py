"""Prefill and decode latency of several models, timed in turn.

Each round times every model, in an order that rotates, so that other load on the machine slows all of them alike.
"""

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from tvaprune.device import synchronise
from tvaprune.progress import Progress
from tvaprune.runtime.packed import Runtime, prepare
from tvaprune.runtime.passes import Decoding, RecordedDecoding, prefill, recorded_prefill

# Warm-up ends when every probe's latency differs from its last one by no more than this fraction.
STABLE = 0.05


@dataclass(frozen=True)
class Benchmark:
    """What is timed, and how often."""

    prefill_tokens: int
    decode_prompt_tokens: int
    decode_tokens: int  # greedy steps after that prompt
    repeats: int  # rounds that count
    max_warmup: int  # rounds before those, at most

    @classmethod
    def of(cls, settings: object) -> "Benchmark":
        """From an object with attributes of these names, such as a stage's parameters."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})


@dataclass(frozen=True)
class PhaseTimes:
    """Prefill or decode of all models at one batch size."""

    latency_ms: dict[str, list[float]]  # by model, one value a round: a prefill, or the mean of the decode steps
    tokens: int  # processed in that time, in all sequences of the batch
    work: dict[str, float]  # by model, what bounds the latency: FLOPs of a prefill, or bytes that a decode step reads


def load_timed(
    loaders: dict[str, Callable[[], PreTrainedModel]],
) -> tuple[dict[str, PreTrainedModel], dict[str, float]]:
    """Load each model twice and time the second load in seconds: the first fills the page cache and imports code."""
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
    """FLOPs of one prefill's matrix products and causal attention; a multiplication and its addition are two."""

    def attention(
        query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, out_shape: Any = None, **__: Any
    ) -> int:
        # Query i reads the keys up to its own; torch's formula counts all keys.
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
    """Bytes that a decode step reads, mean over `steps`: every weight once, and the cache.

    Of an untied embedding, only the batch's rows. At step i, from 0, the cache holds the prompt and i + 1 tokens.
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
    """Call every probe, for one measurement, once a round; each round starts with the next probe.

    `repeats` rounds count, after at most `max_warmup` (2 or more) that end once all probes are stable. Returns them by
    probe, where one index is of one round. `progress` is the progress bar's text; None shows no bar.
    """
    names = list(probes)

    def run(number: int) -> dict[str, float]:
        first = number % len(names)
        return {name: probes[name]() for name in names[first:] + names[:first]}

    bar = Progress(total=max_warmup + repeats, desc=progress, unit="round", disable=progress is None)
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


def compare(
    models: dict[str, PreTrainedModel], batch_sizes: list[int], benchmark: Benchmark, runtime: Runtime = "eager"
) -> dict[int, tuple[PhaseTimes, PhaseTimes]]:
    """Time prefill and decode of "dense", "compact" and any other models on one device; returns both by batch size.

    A prefill is a forward over the prompt that fills a cache, and the logits of the last position. A decode is the mean
    of the steps after a prompt, whose own prefill is not timed. `prepare` changes the models for the runtime, after
    their FLOPs and bytes are counted (packed weights are no parameters).
    """
    lengths = benchmark.decode_prompt_tokens, benchmark.decode_tokens
    work = {
        batch: (
            {name: float(prefill_flops(model, batch, benchmark.prefill_tokens)) for name, model in models.items()},
            {name: decode_bytes(model, batch, *lengths) for name, model in models.items()},
        )
        for batch in batch_sizes
    }
    models = {name: prepare(model, runtime) for name, model in models.items()}

    @torch.inference_mode()
    def timed(name: str, probe: Callable[..., Callable[[], float]], batch: int) -> dict[str, list[float]]:
        with without_garbage_collection():
            return interleave(
                {key: probe(model, batch, benchmark, runtime) for key, model in models.items()},
                benchmark.repeats,
                benchmark.max_warmup,
                f"{name}, batch {batch}",
            )

    return {
        batch: (
            PhaseTimes(timed("prefill", prefill_probe, batch), batch * benchmark.prefill_tokens, flops),
            PhaseTimes(timed("decode", decode_probe, batch), batch, bytes_read),
        )
        for batch, (flops, bytes_read) in work.items()
    }


def together(parts: Iterable[dict[int, tuple[PhaseTimes, PhaseTimes]]]) -> dict[int, tuple[PhaseTimes, PhaseTimes]]:
    """What `compare` gave for some models and for others, as if they had been timed in turn."""
    first, *others = parts
    for part in others:
        for batch, phases in part.items():
            for phase, more in zip(first[batch], phases, strict=True):
                phase.latency_ms.update(more.latency_ms)
                phase.work.update(more.work)
    return first


def prefill_probe(model: PreTrainedModel, batch: int, benchmark: Benchmark, runtime: Runtime) -> Callable[[], float]:
    """Each call of the result is a prefill; returns its milliseconds."""
    prompt = random_prompt(model, batch, benchmark.prefill_tokens)
    work = recorded_prefill(model, prompt) if runtime == "graphs" else partial(prefill, model, prompt)
    return lambda: _milliseconds(model.device, work)


def decode_probe(model: PreTrainedModel, batch: int, benchmark: Benchmark, runtime: Runtime) -> Callable[[], float]:
    """Each call of the result reads the prompt and decodes; returns a decoded token's milliseconds."""
    prompt = random_prompt(model, batch, benchmark.decode_prompt_tokens)
    decoding = (RecordedDecoding if runtime == "graphs" else Decoding)(model, prompt, benchmark.decode_tokens)

    def measure() -> float:
        decoding.start()
        return _milliseconds(model.device, decoding.run) / benchmark.decode_tokens

    return measure


def random_prompt(model: PreTrainedModel, batch: int, tokens: int) -> Int[Tensor, "batch tokens"]:
    """Random token ids, the same for every model of one vocabulary; int64."""
    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (batch, tokens), generator=generator).to(model.device)


def _milliseconds(device: torch.device, work: Callable[[], object]) -> float:
    """Time from an idle device until the work is done."""
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
    """Keep pauses of the garbage collector out of the timings."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
