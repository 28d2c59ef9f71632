"""Perplexity on held-out text: non-overlapping windows, weighted by token."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tvaprune.architecture.topology import hidden_states
from tvaprune.artifacts import ArtifactError
from tvaprune.distributed import ALONE, World
from tvaprune.measures.comparison import POSITIONS_AT_ONCE, read_rows, spread_evenly


@dataclass(frozen=True)
class Perplexity:
    """Perplexity on a set of windows."""

    ppl: float  # exp(nll_per_token); lower is better
    nll_per_token: float  # mean negative log-likelihood, in nats
    ppl_stderr: float  # over windows, by the delta method: ppl times that of their mean nll; NaN for a single window
    tokens: int  # predicted: all but the first of each window


def read_texts(directory: Path) -> list[str]:
    """All texts of a directory, by file name and line. Raises ArtifactError: no .jsonl file, or a row without text."""
    files = sorted(directory.glob("*.jsonl"))
    if not files:
        raise ArtifactError(f"{directory}: no .jsonl file; run the fetch_inputs stage")
    texts = []
    for file in files:
        for number, row in enumerate(read_rows(file), start=1):
            if not isinstance(row.get("text"), str):
                raise ArtifactError(f"{file}, line {number}: no text in it; run the fetch_inputs stage")
            texts.append(row["text"])
    return texts


def heldout_windows(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, window: int, windows: int
) -> Int[Tensor, "windows window"]:
    """int64 windows without overlap, spread evenly over the texts; the only special token ends each text.

    Raises ValueError if the tokenizer has no end-of-sequence token or the texts are too short.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("the tokenizer has no end-of-sequence token to join documents with")
    # verbose=False: no warning of documents longer than the model's context, which are cut below.
    documents = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    stream = torch.tensor([token for document in documents for token in (*document, end)])
    available = len(stream) // window
    if available < windows:
        raise ValueError(
            f"windows = {windows} of window = {window} tokens: the held-out text has {len(stream)} tokens, "
            f"enough for {available}"
        )
    return stream[: available * window].view(available, window)[spread_evenly(available, windows)]


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "windows window"],
    batch_size: int,
    progress: str | None = None,
    world: World = ALONE,
) -> Perplexity:
    """Perplexity of a causal model: each token of a window but the first is predicted from those before it.

    The model runs in its own dtype on its own device; log-softmax is in float32, sums are in float64. All processes of
    `world` share the windows and get the result. Without `progress` there is no progress bar.
    """
    was_training = model.training
    model.eval()
    bar = tqdm(total=len(input_ids), desc=progress, unit="window", disable=progress is None or not world.is_main)
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
    mean = nll.mean().item()  # windows have equal lengths, so this is the mean over tokens
    stderr = (nll.std() / math.sqrt(len(nll))).item() if len(nll) > 1 else math.nan
    ppl = math.exp(mean)
    return Perplexity(ppl, mean, ppl * stderr, tokens=input_ids.shape[0] * (input_ids.shape[1] - 1))


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


def report(results: dict[str, Perplexity], window: int) -> dict[str, object]:
    """The metrics file: each model's perplexity, and its ratio to the dense model's."""
    metrics: dict[str, object] = {"window": window, "tokens": results["dense"].tokens}
    for name, result in results.items():
        own = {"ppl": result.ppl, "nll_per_token": result.nll_per_token, "ppl_stderr": result.ppl_stderr}
        ratio = {} if name == "dense" else {"ratio_to_dense": result.ppl / results["dense"].ppl}
        metrics[name] = own | ratio
    return metrics
