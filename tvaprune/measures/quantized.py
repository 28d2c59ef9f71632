"""Quantised models: perplexity and distance from the unquantised model, size and speed.

GGUF files run in llama.cpp: it computes every layer and the final norm, and the last matrix is multiplied here,
dequantised, in float32. Model directories run in transformers, in the dtype that they are stored in.
"""

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from tvaprune.architecture.topology import hidden_states, lm_head
from tvaprune.checkpoint.loading import load
from tvaprune.measures.comparison import POSITIONS_AT_ONCE
from tvaprune.measures.latency import (
    Benchmark,
    checkpoint_bytes,
    decode_probe,
    interleave,
    prefill_probe,
    without_garbage_collection,
)
from tvaprune.measures.perplexity import Results, Windows, all_windows, by_text, ratios_to_dense
from tvaprune.options.quantize import QuantizeOptions
from tvaprune.progress import Progress
from tvaprune.proof.gguf_runtime import final_states, timed

STORED = "stored"  # the name of the unquantised model among the types
MAX_WARMUP = 3  # rounds


class Measured(NamedTuple):
    """One model in one type."""

    size: int  # bytes
    perplexity: Results
    mean_kl: float  # nats a token from the unquantised model, over the first window


def measure_files(directory: Path, files: Mapping[str, Path], windows: Windows, name: str = "") -> dict[str, Measured]:
    """Measure a model directory and what it was quantised to, files or directories: by type, STORED first.

    `name` is the model's, for progress. Raises what `tvaprune.proof.gguf_runtime.greedy_steps` raises.
    """
    together = all_windows(windows)
    model = load(directory, torch.float32)
    head = lm_head(model).weight.float()
    label = f"{name} {STORED}"
    nll, first = _run(_torch_states(model, together), head, together, label)
    found = {STORED: Measured(checkpoint_bytes(directory), by_text(windows, nll, label), 0.0)}
    del model
    for kind, path in files.items():
        if path.is_dir():
            quantised = load(path)
            own, computed = lm_head(quantised).weight.float(), _torch_states(quantised, together)
        else:
            own, computed = output_matrix(path), final_states(path, together)
        size = checkpoint_bytes(path) if path.is_dir() else path.stat().st_size
        label = f"{name} {kind}"
        nll, states = _run(computed, own, together, label)
        found[kind] = Measured(size, by_text(windows, nll, label), mean_kl(first, head, states, own))
    return found


@torch.inference_mode()
def _torch_states(model: PreTrainedModel, windows: Tensor) -> Iterable[Tensor]:
    for window in windows:
        yield hidden_states(model, window[None].long())[0].float()


def _run(
    states: Iterable[Tensor], head: Tensor, windows: Tensor, progress: str
) -> tuple[Float[Tensor, " windows"], Float[Tensor, "tokens hidden"]]:
    """Each window's mean negative log-likelihood, float64, and the first window's states."""
    nll: list[float] = []
    first = torch.empty(0)
    for own, window in zip(Progress(states, desc=progress, total=len(windows), unit="window"), windows, strict=True):
        first = first if nll else own
        nll.append(_nll(own, head, window.long()))
    return torch.tensor(nll, dtype=torch.float64), first


@torch.inference_mode()
def _nll(states: Tensor, head: Tensor, window: Tensor) -> float:
    parts = zip(states[:-1].split(POSITIONS_AT_ONCE), window[1:].split(POSITIONS_AT_ONCE), strict=True)
    total = sum(float(functional.cross_entropy(own @ head.T, to, reduction="sum")) for own, to in parts)
    return total / (len(window) - 1)


@torch.inference_mode()
def mean_kl(
    states: Float[Tensor, "tokens hidden"],
    head: Float[Tensor, "vocab hidden"],
    other_states: Float[Tensor, "tokens hidden"],
    other_head: Float[Tensor, "vocab hidden"],
) -> float:
    """KL(first ‖ other) of the next-token distributions, in nats a token."""
    total = 0.0
    for ours, theirs in zip(states.split(POSITIONS_AT_ONCE), other_states.split(POSITIONS_AT_ONCE), strict=True):
        reference, other = ((own @ matrix.T).log_softmax(-1) for own, matrix in ((ours, head), (theirs, other_head)))
        total += float((reference.exp() * (reference - other)).sum())
    return total / len(states)


def output_matrix(file: Path) -> Float[Tensor, "vocab hidden"]:
    """The file's last matrix, dequantised to float32; the embedding where the two are tied."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    tensor = tensors.get("output.weight") or tensors["token_embd.weight"]
    return torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)


def time_files(
    files: Mapping[str, Path], vocabulary: int, options: QuantizeOptions
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of prefill and of a decoded token, by name, a value a round; all in turn.

    GGUF files in llama.cpp, model directories in transformers as they are stored, eagerly.
    """
    own = Benchmark(options.prefill_tokens, options.decode_tokens, options.decode_tokens, options.repeats, MAX_WARMUP)
    longest = max(options.prefill_tokens, options.decode_tokens)
    prompt = torch.randint(vocabulary, (longest,), generator=torch.Generator().manual_seed(0)).tolist()
    probes: dict[str, dict[str, Callable[[], float]]] = {"prefill": {}, "decode": {}}
    for name, file in files.items():
        if file.is_dir():
            model = load(file)
            probes["prefill"][name] = prefill_probe(model, 1, own, "eager")
            probes["decode"][name] = decode_probe(model, 1, own, "eager")
            continue
        read = timed(file, prompt[: options.prefill_tokens], 1)
        generate = timed(file, prompt[: options.decode_tokens], options.decode_tokens)
        probes["prefill"][name] = lambda read=read: read().prefill_ms  # type: ignore[misc]
        probes["decode"][name] = lambda generate=generate: generate().decode_ms  # type: ignore[misc]
    with without_garbage_collection(), torch.inference_mode():
        return {phase: interleave(each, options.repeats, MAX_WARMUP, phase) for phase, each in probes.items()}


def quantized_metrics(
    found: Mapping[str, Mapping[str, Measured]], times: Mapping[str, Mapping[str, list[float]]], prefill_tokens: int
) -> dict[str, Any]:
    """By model and type: bytes, mean_kl in nats, perplexity by set and text, their ratios to the unquantised dense
    model's, and the speed; `times` of `time_files`, by "MODEL-TYPE".
    """
    dense = found["dense"][STORED].perplexity
    metrics: dict[str, Any] = {model: {} for model in found}
    for model, kind, one in ((model, kind, one) for model, kinds in found.items() for kind, one in kinds.items()):
        figures: dict[str, Any] = {"bytes": one.size, "mean_kl": one.mean_kl}
        for name, texts in one.perplexity.items():
            figures[name] = {label: {"ppl": each.ppl} for label, each in texts.items()}
            if texts:
                figures[f"{name}_ratio"] = ratios_to_dense(texts, dense[name])[1]
        for phase, measured in times.items():
            if values := measured.get(f"{model}-{kind}"):
                median, tokens = statistics.median(values), prefill_tokens if phase == "prefill" else 1
                figures[phase] = {"latency_ms": median, "tokens_per_s": 1000 * tokens / median}
        metrics[model][kind] = figures
    return metrics


def describe(metrics: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[str]:
    """One line about each model and type, from `quantized_metrics`."""
    for model, kinds in metrics.items():
        for kind, one in kinds.items():
            speed = f", decode {one['decode']['tokens_per_s']:.0f} tokens/s" if "decode" in one else ""
            yield (
                f"{model} {kind}: {one['bytes'] / 1e6:.1f} MB, perplexity {one['validation_ratio']:.3f} of dense on "
                f"validation text{speed}"
            )
