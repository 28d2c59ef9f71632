"""What each block of a decoder layer takes, by width, inside a model that runs.

One model holds a layer of every intermediate width and, in turn, of every number of key-value heads. Every pass
then times all candidates side by side, with weights that come from memory, a cache that grows and the framework's own
overhead, as in the model that will serve; and what is timed adds up to the whole pass.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from tvaprune.architecture.topology import Topology, block_norms, final_norm
from tvaprune.device import synchronise
from tvaprune.masks.latency_table import PHASES, LatencyTable, Phase
from tvaprune.measures.latency import interleave, random_prompt, without_garbage_collection
from tvaprune.measures.machine import machine_name
from tvaprune.runtime.packed import Runtime, prepare
from tvaprune.runtime.passes import Decoding, RecordedDecoding, Recording, Work, prefill, recorded_prefill


class Candidates(NamedTuple):
    """The widths to time, ascending; the dense ones last, 0 first but for hidden."""

    hidden: list[int]
    intermediate: list[int]
    kv_heads: list[int]

    def by_model(self) -> list[tuple[int, list[int], list[int]]]:
        """The widths of the models to time: hidden, and by layer intermediate and key-value heads."""
        return [(hidden, *layers_to_time(self)) for hidden in self.hidden]


class Lengths(NamedTuple):
    """What a pass processes: sequences at once and tokens in each; decoding follows a prompt."""

    batch: int
    prefill_tokens: int
    decode_prompt_tokens: int
    decode_tokens: int


def candidates(topology: Topology, hidden_step: int, intermediate_step: int, narrowest_hidden: float) -> Candidates:
    """Multiples of the steps, and the dense widths; every number of heads.

    Args:
        narrowest_hidden: share of the dense hidden width under which none is timed.
    """
    hidden, intermediate, kv_heads = topology.hidden, topology.intermediate, topology.kv_heads
    return Candidates(
        [*(n for n in range(hidden_step, hidden, hidden_step) if n >= narrowest_hidden * hidden), hidden],
        [*range(0, intermediate, intermediate_step), intermediate],
        list(range(kv_heads + 1)),
    )


def layers_to_time(widths: Candidates) -> tuple[list[int], list[int]]:
    """Intermediate widths and numbers of heads by layer, so that each candidate has one layer or more.

    In an order without a trend, so that no block always follows one of its own size; the first layer has heads, by
    which caches count.
    """
    count = max(len(widths.intermediate), 3 * len(widths.kv_heads))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    intermediate = [widths.intermediate[index % len(widths.intermediate)] for index in order]
    kv_heads = [widths.kv_heads[-1 - index % len(widths.kv_heads)] for index in range(count)]
    return intermediate, kv_heads


def made_on(
    device: torch.device, dtype: torch.dtype, runtime: Runtime, topology: Topology, lengths: Lengths
) -> dict[str, Any]:
    """What a table holds for: processor, dtype, runtime, threads, versions, lengths, and the number of layers."""
    return {
        "device": device.type,
        "processor": machine_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "runtime": runtime,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "layers": topology.layers,
        **lengths._asdict(),
    }


def profile(
    models: Sequence[PreTrainedModel],
    widths: Candidates,
    lengths: Lengths,
    repeats: int,
    max_warmup: int,
    where: dict[str, Any],
) -> LatencyTable:
    """Time models with the layers of `widths.by_model` and make the table.

    Args:
        models: changed in place for the runtime that `where` names.
        where: from `made_on`.
    """
    models = [prepare(model, where["runtime"]) for model in models]
    times = time_blocks(dict(zip(widths.hidden, models, strict=True)), lengths, repeats, max_warmup, where["runtime"])
    return table_of(times, widths, where)


@torch.inference_mode()
def time_blocks(
    models: dict[int, PreTrainedModel], lengths: Lengths, repeats: int, max_warmup: int, runtime: Runtime
) -> dict[Phase, dict[int, Float[Tensor, "repeats blocks"]]]:
    """Time all blocks of all models in turn, with a progress bar.

    Args:
        models: by hidden width; prepared for the runtime.

    Returns:
        By phase and hidden width, milliseconds of a prefill or of one decode step in every round that counts: the
        attention and the MLP of each layer, alternating, and last all the rest.
    """
    seen: dict[Phase, dict[int, list[Tensor]]] = {phase: {hidden: [] for hidden in models} for phase in PHASES}

    def probe(hidden: int, model: PreTrainedModel) -> Callable[[], float]:
        read, generate = (_recorded_passes if runtime == "graphs" else _eager_passes)(model, lengths)

        def measure() -> float:
            prefilled, stepped = read(), generate()
            seen["prefill"][hidden].append(prefilled[0])
            seen["decode"][hidden].append(stepped.median(0).values)
            return float(prefilled.sum() + stepped.sum())

        return measure

    with without_garbage_collection():
        probes = {str(hidden): probe(hidden, model) for hidden, model in models.items()}
        interleave(probes, repeats, max_warmup, "profile")
    return {phase: {h: torch.stack(rounds[-repeats:]) for h, rounds in by.items()} for phase, by in seen.items()}


def table_of(
    times: dict[Phase, dict[int, Float[Tensor, "repeats blocks"]]], widths: Candidates, made_on: dict[str, Any]
) -> LatencyTable:
    """Medians by width.

    What slowed a whole round is taken out first: each block's share of its round counts, and the shares are those
    of the median round. So the table adds up to what the models took.
    """
    intermediate, kv_heads = (torch.tensor(layers) for layers in layers_to_time(widths))
    result: dict[str, dict[Phase, Tensor]] = {name: {} for name in ("rest", "attention", "mlp")}
    iqr: dict[str, dict[Phase, Tensor]] = {name: {} for name in result}
    for phase, by_hidden in times.items():
        rows: dict[str, list[Tensor]] = {name: [] for name in result}
        for rounds in by_hidden.values():
            total = rounds.sum(1, keepdim=True)
            even = rounds / total * total.median()
            medians = even.median(0).values
            even = even * total.median() / medians.sum()
            rows["rest"].append(_quartiles(even[:, -1:]))
            blocks = even[:, :-1].view(len(even), -1, 2)
            for name, index, of_layer, axis in (
                ("attention", 0, kv_heads, widths.kv_heads),
                ("mlp", 1, intermediate, widths.intermediate),
            ):
                rows[name].append(torch.stack([_quartiles(blocks[:, of_layer == width, index]) for width in axis], -1))
        for name, found in rows.items():
            quartiles = torch.stack(found, 1)  # [3, hidden, ...]
            result[name][phase], iqr[name][phase] = quartiles[1], quartiles[2] - quartiles[0]
    return LatencyTable(
        widths.hidden,
        widths.intermediate,
        widths.kv_heads,
        result["rest"],
        result["attention"],
        result["mlp"],
        iqr,
        made_on,
    )


def _quartiles(values: Tensor) -> Float[Tensor, "3"]:
    return torch.quantile(values.flatten(), torch.tensor([0.25, 0.5, 0.75], dtype=values.dtype))


def _eager_passes(model: PreTrainedModel, lengths: Lengths) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """A prefill, and decode steps after a prompt that is not timed: each gives milliseconds, [passes, blocks]."""
    work = partial(prefill, model, random_prompt(model, lengths.batch, lengths.prefill_tokens))
    context = random_prompt(model, lengths.batch, lengths.decode_prompt_tokens)
    stepping = Decoding(model, context, lengths.decode_tokens)

    def generate() -> Tensor:
        stepping.start()
        return _intervals(model, stepping.run)

    return partial(_intervals, model, work), generate


def _recorded_passes(model: PreTrainedModel, lengths: Lengths) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """`_eager_passes` as CUDA graphs that read the clock inside."""
    record = partial(_RecordedClock, model)
    read = recorded_prefill(model, random_prompt(model, lengths.batch, lengths.prefill_tokens), record)
    context = random_prompt(model, lengths.batch, lengths.decode_prompt_tokens)
    stepping = RecordedDecoding(model, context, lengths.decode_tokens, record)

    def generate() -> Tensor:
        stepping.start()
        return torch.cat([stepping.step() for _ in range(lengths.decode_tokens)])

    return read, generate


def _by_block(intervals: list[float], blocks: int) -> Float[Tensor, "passes blocks"]:
    """Every pass's blocks. The time before the first block of all belongs to the passes' rest, in equal parts."""
    first, *others = intervals
    passes = torch.tensor(others, dtype=torch.float64).view(-1, blocks)
    passes[:, -1] += first / len(passes)
    return passes


def _intervals(model: PreTrainedModel, work: Work) -> Float[Tensor, "passes blocks"]:
    """Milliseconds of each block while some work runs, which is one pass or more."""
    synchronise(model.device)
    with _marked(model) as marks:
        marks.append(_now(model.device))
        work()
        marks.append(_now(model.device))
    synchronise(model.device)
    return _by_block(_between(marks), 2 * len(block_norms(model)) + 1)


class _RecordedClock:
    """One pass as a CUDA graph whose nodes note the time; a call gives milliseconds, [1, blocks]."""

    def __init__(self, model: PreTrainedModel, work: Work) -> None:
        self._blocks = 2 * len(block_norms(model)) + 1
        with _marked(model) as marks:

            def marked_work() -> None:
                marks.clear()  # of the run before the recording
                marks.append(_now(model.device))
                work()
                marks.append(_now(model.device))

            self._run, self._marks = Recording(marked_work), marks
        self._device = model.device

    def __call__(self) -> Float[Tensor, "1 blocks"]:
        self._run()
        synchronise(self._device)
        return _by_block(_between(self._marks), self._blocks)


def _between(marks: list[Any]) -> list[float]:
    """Milliseconds from the start to the first block, and from each block's start, or the end of all, to the next."""
    if isinstance(marks[0], float):
        return [1000 * (end - start) for start, end in pairwise(marks)]
    return [start.elapsed_time(end) for start, end in pairwise(marks)]


@contextmanager
def _marked(model: PreTrainedModel) -> Iterator[list[Any]]:
    """The clock is read at each block's start and after the last block."""
    marks: list[Any] = []
    places: list[nn.Module] = [norm for layer in block_norms(model) for norm in layer]

    def mark(*_: object) -> None:
        marks.append(_now(model.device))

    handles = [place.register_forward_pre_hook(mark) for place in [*places, final_norm(model)]]
    try:
        yield marks
    finally:
        for handle in handles:
            handle.remove()


def _now(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    # external: recorded into a graph as a node of its own, to be read after every run of it.
    event = torch.cuda.Event(enable_timing=True, external=torch.cuda.is_current_stream_capturing())
    event.record()
    return event
