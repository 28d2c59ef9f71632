"""The latency of each block of a decoder layer, by width, inside a running model.

One model has layers of every intermediate width and number of key-value heads. So each pass times all candidates as in
a served model: weights read from memory, a growing cache, and the framework's overhead.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import transformers
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from tvaprune.architecture.topology import LayerWidths, Topology, block_norms, final_norm
from tvaprune.device import synchronise
from tvaprune.masks.latency_table import BLOCKS, PHASES, Block, LatencyTable, Phase, Times
from tvaprune.measures.latency import Benchmark, interleave, random_prompt, without_garbage_collection
from tvaprune.measures.machine import machine_name
from tvaprune.runtime.packed import Runtime, prepare
from tvaprune.runtime.passes import Decoding, Record, RecordedDecoding, Recording, Work, prefill, recorded_prefill


class Candidates(NamedTuple):
    """The widths to time, ascending; the dense width last, and 0 first except for hidden."""

    hidden: list[int]
    intermediate: list[int]
    kv_heads: list[int]

    def by_model(self) -> list[LayerWidths]:
        """The widths of the models to time, one for each hidden width."""
        return [LayerWidths(hidden, *layers_to_time(self)) for hidden in self.hidden]


def candidates(topology: Topology, hidden_step: int, intermediate_step: int, narrowest_hidden: float) -> Candidates:
    """Multiples of the steps and the dense widths; every number of heads.

    `narrowest_hidden` is the least hidden width to time, as a share of the dense one.
    """
    hidden, intermediate, kv_heads = topology.hidden, topology.intermediate, topology.kv_heads
    return Candidates(
        [*(n for n in range(hidden_step, hidden, hidden_step) if n >= narrowest_hidden * hidden), hidden],
        [*range(0, intermediate, intermediate_step), intermediate],
        list(range(kv_heads + 1)),
    )


def layers_to_time(widths: Candidates) -> tuple[list[int], list[int]]:
    """Intermediate widths and numbers of heads by layer, so that each candidate has one layer or more.

    The order is random, so that no block always follows one of its own size. The first layer has heads, because caches
    count positions there.
    """
    count = max(len(widths.intermediate), 3 * len(widths.kv_heads))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    intermediate = [widths.intermediate[index % len(widths.intermediate)] for index in order]
    kv_heads = [widths.kv_heads[-1 - index % len(widths.kv_heads)] for index in range(count)]
    return intermediate, kv_heads


def made_on(
    device: torch.device, dtype: torch.dtype, runtime: Runtime, topology: Topology, batch: int, benchmark: Benchmark
) -> dict[str, Any]:
    """The conditions of a table: processor, dtype, runtime, threads, versions, lengths, and the number of layers."""
    return {
        "device": device.type,
        "processor": machine_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "runtime": runtime,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "layers": topology.layers,
        "batch": batch,
        "prefill_tokens": benchmark.prefill_tokens,
        "decode_prompt_tokens": benchmark.decode_prompt_tokens,
        "decode_tokens": benchmark.decode_tokens,
    }


def profile(
    models: Sequence[PreTrainedModel], widths: Candidates, benchmark: Benchmark, conditions: dict[str, Any]
) -> LatencyTable:
    """Time models of the widths `widths.by_model()`, which change for the runtime; `conditions`: from `made_on`."""
    batch, runtime = conditions["batch"], conditions["runtime"]
    by_hidden = {hidden: prepare(model, runtime) for hidden, model in zip(widths.hidden, models, strict=True)}
    return table_of(time_blocks(by_hidden, batch, benchmark, runtime), widths, conditions)


@torch.inference_mode()
def time_blocks(
    models: dict[int, PreTrainedModel], batch: int, benchmark: Benchmark, runtime: Runtime
) -> dict[Phase, dict[int, Float[Tensor, "repeats blocks"]]]:
    """Time all blocks of all models, which are by hidden width and prepared for the runtime, in turn.

    Returns float64 milliseconds of a prefill or of one decode step in each round that counts, by phase and hidden
    width. The blocks are each layer's attention and MLP, alternating, and last everything else.
    """
    times: dict[Phase, dict[int, list[Tensor]]] = {phase: {hidden: [] for hidden in models} for phase in PHASES}

    def probe(hidden: int, model: PreTrainedModel) -> Callable[[], float]:
        timed_prefill, timed_steps = _passes(model, batch, benchmark, runtime)

        def measure() -> float:
            prefilled, steps = timed_prefill(), timed_steps()
            times["prefill"][hidden].append(prefilled[0])
            times["decode"][hidden].append(steps.median(0).values)
            return float(prefilled.sum() + steps.sum())

        return measure

    repeats = benchmark.repeats
    with without_garbage_collection():
        probes = {str(hidden): probe(hidden, model) for hidden, model in models.items()}
        interleave(probes, repeats, benchmark.max_warmup, "profile")
    return {phase: {h: torch.stack(rounds[-repeats:]) for h, rounds in by.items()} for phase, by in times.items()}


def table_of(
    times: dict[Phase, dict[int, Float[Tensor, "repeats blocks"]]], widths: Candidates, made_on: dict[str, Any]
) -> LatencyTable:
    """Medians by width of each block's share of its round, so that what slowed a whole round does not count.

    The shares are scaled to the median round: the table adds up to what the models took.
    """
    intermediate, kv_heads = (torch.tensor(layers) for layers in layers_to_time(widths))
    blocks: dict[Block, tuple[int, Tensor, list[int]]] = {
        "attention": (0, kv_heads, widths.kv_heads),
        "mlp": (1, intermediate, widths.intermediate),
    }
    ms: Times = {block: {} for block in BLOCKS}
    iqr_ms: Times = {block: {} for block in BLOCKS}
    for phase, by_hidden in times.items():
        rows: dict[Block, list[Tensor]] = {block: [] for block in BLOCKS}
        for rounds in by_hidden.values():
            total = rounds.sum(1, keepdim=True)
            even = rounds / total * total.median()
            even = even * total.median() / even.median(0).values.sum()
            rows["rest"].append(_quartiles(even[:, -1:]))
            pairs = even[:, :-1].view(len(even), -1, 2)
            for block, (index, of_layer, axis) in blocks.items():
                rows[block].append(torch.stack([_quartiles(pairs[:, of_layer == width, index]) for width in axis], -1))
        for block, found in rows.items():
            quartiles = torch.stack(found, 1)  # [3, hidden, ...]
            ms[block][phase], iqr_ms[block][phase] = quartiles[1], quartiles[2] - quartiles[0]
    return LatencyTable(*widths, ms, iqr_ms, made_on)


def _quartiles(values: Tensor) -> Float[Tensor, "3"]:
    return torch.quantile(values.flatten(), torch.tensor([0.25, 0.5, 0.75], dtype=values.dtype))


def _passes(
    model: PreTrainedModel, batch: int, benchmark: Benchmark, runtime: Runtime
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """A prefill, and decode steps after a prompt that is not timed; each returns milliseconds, [passes, blocks]."""
    prompt = random_prompt(model, batch, benchmark.prefill_tokens)
    context = random_prompt(model, batch, benchmark.decode_prompt_tokens)
    steps = benchmark.decode_tokens
    decoding: Decoding
    if runtime == "graphs":
        record = partial(_BlockTimer, model, record=Recording)
        timed_prefill = recorded_prefill(model, prompt, record)
        decoding = recorded = RecordedDecoding(model, context, steps, record)

        def timed_steps() -> Tensor:
            return torch.cat([recorded.step() for _ in range(steps)])

    else:
        timed_prefill = _BlockTimer(model, partial(prefill, model, prompt))
        decoding = Decoding(model, context, steps)
        timed_steps = _BlockTimer(model, decoding.run)

    def generate() -> Tensor:
        decoding.start()
        return timed_steps()

    return timed_prefill, generate


class _BlockTimer:
    """Runs one pass or more, with `record` as one CUDA graph; returns each block's milliseconds, [passes, blocks]."""

    def __init__(self, model: PreTrainedModel, work: Work, record: Record | None = None) -> None:
        self._device, self._work = model.device, work
        self._first_modules = [*(norm for layer in block_norms(model) for norm in layer), final_norm(model)]
        self._marks: list[Any] = []
        self._run = record(self._run_marked) if record else self._run_marked

    def __call__(self) -> Float[Tensor, "passes blocks"]:
        synchronise(self._device)
        self._run()
        synchronise(self._device)
        # From the start to the first block, then from the start of each block to that of the next, or to the end.
        if isinstance(self._marks[0], float):
            intervals = [1000 * (end - start) for start, end in pairwise(self._marks)]
        else:
            intervals = [start.elapsed_time(end) for start, end in pairwise(self._marks)]
        passes = torch.tensor(intervals[1:], dtype=torch.float64).view(-1, len(self._first_modules))
        passes[:, -1] += intervals[0] / len(passes)  # to the rest of each pass, in equal parts
        return passes

    def _run_marked(self) -> None:
        """Read the clock at the start, at the start of each block, and at the end."""
        handles = [module.register_forward_pre_hook(self._mark) for module in self._first_modules]
        try:
            self._marks.clear()
            self._mark()
            self._work()
            self._mark()
        finally:
            for handle in handles:
                handle.remove()

    def _mark(self, *_: object) -> None:
        if self._device.type != "cuda":
            self._marks.append(time.perf_counter())
            return
        # external: in a graph, a node of its own that can be read after each replay.
        event = torch.cuda.Event(enable_timing=True, external=torch.cuda.is_current_stream_capturing())
        event.record()
        self._marks.append(event)
