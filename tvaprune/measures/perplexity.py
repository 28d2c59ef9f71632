"""Perplexity on held-out text: non-overlapping windows, weighted by token.

Validation windows are those that decisions may look at. Test windows are of documents without validation windows.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tvaprune.architecture.topology import hidden_states
from tvaprune.distributed import ALONE, World
from tvaprune.measures.comparison import POSITIONS_AT_ONCE, spread_evenly
from tvaprune.progress import Progress

SETS: tuple[Literal["validation"], Literal["test"]] = ("validation", "test")


@dataclass(frozen=True)
class Perplexity:
    """Perplexity on the windows of one text."""

    ppl: float  # exp(nll_per_token); lower is better
    nll_per_token: float  # mean negative log-likelihood, in nats
    ppl_stderr: float  # over windows, by the delta method: ppl times that of their mean nll; NaN for a single window
    tokens: int  # predicted: all but the first of each window
    window_nll: list[float]  # mean negative log-likelihood of each window, to compare two models on the same windows

    @classmethod
    def of(cls, window_nll: Float64[Tensor, " windows"], window: int) -> "Perplexity":
        """From each window's mean negative log-likelihood; the windows have `window` tokens each."""
        mean = window_nll.mean().item()  # windows have equal lengths, so this is the mean over tokens
        stderr = _variance_of_mean(window_nll) ** 0.5
        tokens = len(window_nll) * (window - 1)
        return cls(math.exp(mean), mean, math.exp(mean) * stderr, tokens, window_nll.tolist())


# By set, "validation" and "test", and by source label: the windows of a text, and a model's results on it.
Windows = Mapping[str, Mapping[str, Int[Tensor, "_ window"]]]
Results = dict[str, dict[str, Perplexity]]


def heldout_windows(
    texts: Mapping[str, list[str]],
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    validation: Mapping[str, int],
    test: Mapping[str, int],
) -> Windows:
    """The windows of each set by source label, as many as `validation` and `test` say; see `windows_of`.

    Raises ValueError if a label has no text, the tokenizer has no end-of-sequence token, or a text is too short.
    """
    if unknown := ", ".join(sorted((set(validation) | set(test)) - set(texts))):
        raise ValueError(f"no held-out text {unknown}; there is {', '.join(texts)}")
    found: dict[str, dict[str, Tensor]] = {name: {} for name in SETS}
    for label in dict.fromkeys([*validation, *test]):
        rows = windows_of(texts[label], tokenizer, window, validation.get(label, 0), test.get(label, 0), label)
        for name, count, own in zip(SETS, (validation.get(label, 0), test.get(label, 0)), rows, strict=True):
            if count:
                found[name][label] = own
    return found


def windows_of(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, window: int, validation: int, test: int, label: str = "text"
) -> tuple[Int[Tensor, "validation window"], Int[Tensor, "test window"]]:
    """int64 windows without overlap, spread evenly over the texts; the only special token ends each text.

    Validation windows are spread over all texts. Test windows are spread over the texts of which no token is in a
    validation window. Where that leaves too little, as with a single long text, texts are cut into parts of four
    windows, or of one, which count as texts.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("the tokenizer has no end-of-sequence token to join documents with")
    # Text that spells a special token stays text. verbose=False: no warning of texts longer than the model's context.
    ids = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    stream = torch.tensor([token for document in ids for token in [*document, end]])
    chosen = _spread(len(stream), window, validation, f"validation text {label}")
    for part in (len(stream), 4 * window, window):
        lengths = [size for document in ids for size in _part_sizes(len(document) + 1, part)]
        owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        others = stream[~torch.isin(owner, owner[chosen].unique())]
        if len(others) >= test * window:
            break
    return stream[chosen], others[
        _spread(len(others), window, test, f"test text {label}, without validation documents,")
    ]


def _part_sizes(tokens: int, part: int) -> list[int]:
    return [min(part, tokens - start) for start in range(0, tokens, part)]


def _spread(tokens: int, window: int, windows: int, name: str) -> Int[Tensor, "windows window"]:
    """Positions in a stream of the windows to take, spread evenly over its windows."""
    available = tokens // window
    if available < windows:
        raise ValueError(
            f"windows = {windows} of window = {window} tokens: {name} has {tokens} tokens, enough for {available}"
        )
    starts = torch.tensor(spread_evenly(available, windows) if windows else [], dtype=torch.long) * window
    return starts[:, None] + torch.arange(window)


def evaluate(
    model: PreTrainedModel, windows: Windows, batch_size: int, progress: str | None = None, world: World = ALONE
) -> Results:
    """Perplexity of a causal model on every text of every set, from `heldout_windows`, in one pass."""
    nll = nll_by_window(model, all_windows(windows), batch_size, progress, world)
    return by_text(windows, nll, progress or "perplexity")


def all_windows(windows: Windows) -> Int[Tensor, "windows window"]:
    """Those of every text of every set, in the order that `by_text` takes their losses in."""
    return torch.cat([own for texts in windows.values() for own in texts.values()])


def by_text(windows: Windows, window_nll: Float64[Tensor, " windows"], model: str) -> Results:
    """Results from the mean loss of each of `all_windows`. Raises ValueError, which names the model and the text, where
    it is not finite.
    """
    found: Results = {name: {} for name in windows}
    rest = window_nll
    for name, texts in windows.items():
        for label, own in texts.items():
            nll, rest = rest[: len(own)], rest[len(own) :]
            if not nll.isfinite().all():
                raise ValueError(f"{model}: the loss on {name} text {label} is not finite; set TVAPRUNE_DTYPE=float32")
            found[name][label] = Perplexity.of(nll, own.shape[1])
    return found


@torch.inference_mode()
def nll_by_window(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "windows window"],
    batch_size: int,
    progress: str | None = None,
    world: World = ALONE,
) -> Float64[Tensor, " windows"]:
    """Mean negative log-likelihood of each window: each token but the first is predicted from those before it.

    The model runs in its own dtype on its own device; log-softmax is in float32, sums are in float64. All processes of
    `world` share the windows and get the result. Without `progress` there is no progress bar.
    """
    was_training = model.training
    model.eval()
    bar = Progress(total=len(input_ids), desc=progress, unit="window", disable=progress is None or not world.is_main)
    nll = torch.zeros(len(input_ids), dtype=torch.float64, device=model.device)
    batches = torch.arange(len(input_ids)).split(batch_size)
    for turn, counts in world.turns(len(batches)):
        indices = batches[turn]
        window_nll = token_nll(model, input_ids[indices].long().to(model.device)).double().mean(dim=1)
        if counts:
            nll[indices] = window_nll
        bar.update(min(len(indices) * world.size, len(input_ids) - bar.n))
    bar.close()
    model.train(was_training)
    world.sum_(nll)
    return nll


def token_nll(
    model: PreTrainedModel, input_ids: Int[Tensor, "batch window"], positions_at_once: int = POSITIONS_AT_ONCE
) -> Float[Tensor, "batch window-1"]:
    """Negative log-likelihood of each next token, float32 nats; a few positions at once, as their logits are large."""
    hidden = hidden_states(model, input_ids)[:, :-1]
    lm_head = model.get_output_embeddings()
    parts = [
        functional.cross_entropy(lm_head(states).float(), targets, reduction="none")
        for states, targets in zip(
            hidden.flatten(0, 1).split(positions_at_once),
            input_ids[:, 1:].flatten().split(positions_at_once),
            strict=True,
        )
    ]
    return torch.cat(parts).view(input_ids.shape[0], -1)


def ratios_to_dense(texts: Mapping[str, Perplexity], dense: Mapping[str, Perplexity]) -> tuple[dict[str, float], float]:
    """A model's perplexity over the dense model's, for each text of a set, and the geometric mean of these."""
    logs = {label: one.nll_per_token - dense[label].nll_per_token for label, one in texts.items()}
    return {label: math.exp(log) for label, log in logs.items()}, math.exp(sum(logs.values()) / len(logs))


def ratio_stderr(texts: Mapping[str, Perplexity], dense: Mapping[str, Perplexity]) -> float:
    """Standard error of the geometric mean of `ratios_to_dense`, by the delta method; NaN where a text has one window.

    The models are paired by window; the windows of a text are a sample, the texts are not.
    """
    variance = 0.0
    for label, one in texts.items():
        own, other = (torch.tensor(each.window_nll, dtype=torch.float64) for each in (one, dense[label]))
        variance += _variance_of_mean(own - other)
    return ratios_to_dense(texts, dense)[1] * math.sqrt(variance) / len(texts)


def _variance_of_mean(values: Float64[Tensor, " windows"]) -> float:
    """Of the mean of a sample; NaN for a single value."""
    return (values.var() / len(values)).item() if len(values) > 1 else math.nan


def plain(results: Results) -> dict[str, Any]:
    """One model's results as JSON holds them."""
    return {name: {label: asdict(one) for label, one in texts.items()} for name, texts in results.items()}


def from_plain(content: Mapping[str, Any]) -> Results:
    return {name: {label: Perplexity(**one) for label, one in texts.items()} for name, texts in content.items()}


def report(results: Mapping[str, Results], window: int) -> dict[str, Any]:
    """The metrics file, from the results of each model: perplexity by set and text, and `ratios_to_dense`.

    `validation_ratio` and `test_ratio` are the geometric means of the ratios of that set's texts, `ratio_stderr` their
    standard errors.
    """
    dense = results["dense"]
    tokens = {name: {label: one.tokens for label, one in texts.items()} for name, texts in dense.items()}
    metrics: dict[str, Any] = {"window": window, "tokens": tokens}
    for model, sets in results.items():
        metrics[model] = {}
        for name, texts in sets.items():
            metrics[model][name] = {
                label: {"ppl": one.ppl, "nll_per_token": one.nll_per_token, "ppl_stderr": one.ppl_stderr}
                for label, one in texts.items()
            }
            if model != "dense" and texts:
                ratios, metrics[model][f"{name}_ratio"] = ratios_to_dense(texts, dense[name])
                metrics[model][f"{name}_ratio_stderr"] = ratio_stderr(texts, dense[name])
                for label, ratio in ratios.items():
                    metrics[model][name][label]["ratio_to_dense"] = ratio
    return metrics


def describe(model: str, measured: Mapping[str, Any]) -> str:
    """One line about a model, from its part of the metrics file."""
    parts = []
    for name in SETS:
        texts = ", ".join(f"{label} {one['ppl']:.2f}" for label, one in measured[name].items())
        ratio = f" ({measured[f'{name}_ratio']:.3f} of dense)" if f"{name}_ratio" in measured else ""
        parts += [f"{name} {texts}{ratio}"] if texts else []
    return f"{model}: perplexity, " + "; ".join(parts)
