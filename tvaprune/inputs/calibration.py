"""Seeded windows of tokens from documents, in sets that share no document."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int32
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tvaprune.inputs.documents import Document
from tvaprune.inputs.sources import InputError
from tvaprune.options.inputs import Packing
from tvaprune.progress import Progress

# Fewer documents than this, such as one book, are cut into parts that stand for documents. So are more documents, where
# some are so long that a set gets too little. A part has room for a few windows: what is left at its end is dropped.
_FEW_DOCUMENTS = 16
_PARTS = 64
_WINDOWS_A_PART = 4
# Documents tokenised in one call; bounds memory.
_BATCH = 32


@dataclass(frozen=True)
class WindowSet:
    """How many windows of how many tokens a set has, and from which sources."""

    name: str
    samples: int
    seq_len: int
    mix: Mapping[str, float] = field(default_factory=dict)  # source -> weight in shares of windows; 1 if not named

    def shares(self, sources: Iterable[str]) -> dict[str, int]:
        """Source -> how many of the windows come from it. Raises InputError if the mix does not fit the sources."""
        weights = {name: float(self.mix.get(name, 1.0)) for name in sources}
        if unknown := ", ".join(sorted(set(self.mix) - set(weights))):
            raise InputError(f"{self.name}: mix names {unknown}; the calibration sources are {', '.join(weights)}")
        if sum(weights.values()) <= 0:
            raise InputError(f"{self.name}: mix gives every source the weight 0")
        return share_out(self.samples, weights)


@dataclass(frozen=True)
class TokenDocument:
    """A document as token ids, without special tokens."""

    id: str
    tokens: Int32[np.ndarray, " tokens"]


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    if not (directory / "tokenizer_config.json").is_file():  # transformers would ask a hub for this name
        raise InputError(f"{directory}: no tokenizer_config.json; a model directory with its tokenizer is expected")
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # a damaged file raises almost anything
        raise InputError(f"{directory}: damaged tokenizer ({' '.join(str(error).split())}); fetch it again") from error


def tokenise(documents: list[Document], tokenizer: PreTrainedTokenizerBase, name: str) -> list[TokenDocument]:
    """Token ids of every document, no special tokens added; documents without tokens are left out."""
    result: list[TokenDocument] = []
    for start in Progress(range(0, len(documents), _BATCH), desc=f"tokenise {name}", unit=" batches"):
        batch = documents[start : start + _BATCH]
        ids = tokenizer(
            [document.text for document in batch],
            add_special_tokens=False,
            split_special_tokens=True,  # text that spells a special token stays text
            verbose=False,  # no warning of documents longer than the model's context: windows are shorter
        )["input_ids"]
        pairs = zip(batch, ids, strict=True)
        result += [TokenDocument(document.id, np.asarray(tokens, np.int32)) for document, tokens in pairs if tokens]
    return result


def sample_windows(
    sources: Mapping[str, list[TokenDocument]], sets: list[WindowSet], *, packing: Packing, eos_token_id: int, seed: int
) -> dict[str, Int32[Tensor, "samples seq_len"]]:
    """Draw every set's windows from documents that no other set uses; the sets' names differ.

    A source's documents, in the order of a seeded hash of their ids, are dealt to the sets in proportion to what each
    needs. A document at least as long as a window is cut into consecutive windows from a random offset ("documents");
    shorter ones follow each other in that order, each closed by the end-of-text token, the only special one ("packed").
    "auto" does each with the documents it suits. A set's windows are drawn from its candidates without replacement, and
    the sources' are mixed in random order.

    Raises InputError if the text is too short (says how many windows there are), or a mix does not fit the sources.
    """
    shares = {one.name: one.shares(sources) for one in sets}
    windows: dict[str, list[np.ndarray]] = {one.name: [] for one in sets}
    for source, documents in sources.items():
        demands = [replace(one, samples=shares[one.name][source]) for one in sets]
        for cut in dict.fromkeys([len(documents) < _FEW_DOCUMENTS, True]):
            rng = np.random.default_rng(int.from_bytes(_hash(seed, source)))
            parts = _deal(_ordered(documents, seed, source, demands, cut), demands, packing)
            drawn = {
                demand.name: _draw(part, demand, packing, eos_token_id, rng)
                for demand, part in zip(demands, parts, strict=True)
            }
            short = [demand for demand in demands if len(drawn[demand.name]) < demand.samples]
            if not short:
                break
        if short:
            demand = short[0]
            tokens = sum(len(document.tokens) for document in documents)
            needed = sum(one.samples * one.seq_len for one in demands)
            raise InputError(
                f"{demand.name}: {demand.samples} windows of {demand.seq_len} tokens are needed from {source!r}, "
                f"which has text for {len(drawn[demand.name])}: {len(documents)} documents and {tokens:,} tokens for "
                f"all sets (packing {packing}), which need {needed:,}. Add text, ask for fewer windows (samples and "
                "finetune_samples; `windows` of `prune`), or give it less weight in the mix"
            )
        for name, own in drawn.items():
            windows[name] += own
    rng = np.random.default_rng(int.from_bytes(_hash(seed, "order")))
    result = {}
    for one in sets:
        rows = np.array(windows[one.name], np.int32).reshape(one.samples, one.seq_len)
        result[one.name] = torch.from_numpy(rows[rng.permutation(one.samples)])
    return result


def sample_calibration(
    documents: Mapping[str, list[Document]],
    tokenizer: PreTrainedTokenizerBase,
    sets: list[WindowSet],
    *,
    packing: Packing,
    seed: int,
) -> tuple[dict[str, Int32[Tensor, "samples seq_len"]], dict[str, Any]]:
    """Tokenise each source's documents, then `sample_windows`. Returns the windows and what meta.json says of them."""
    counts = {one.name: one.shares(documents) for one in sets}  # raises before the long work
    sources = {name: tokenise(texts, tokenizer, name) for name, texts in documents.items()}
    windows = sample_windows(sources, sets, packing=packing, eos_token_id=tokenizer.eos_token_id, seed=seed)
    meta = {
        "seed": seed,
        "packing": packing,
        "tokenizer": tokenizer_identity(tokenizer),
        "sources": {
            name: {"documents": len(tokens), "tokens": sum(len(document.tokens) for document in tokens)}
            for name, tokens in sources.items()
        },
        "windows": counts,
    }
    return windows, meta


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A hash of the vocabulary with its ids, its size, and the end-of-text token."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
    return {
        "vocabulary_sha256": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "tokens": len(tokenizer),
        "eos_token": str(tokenizer.eos_token),
        "eos_token_id": tokenizer.eos_token_id,
    }


def share_out(total: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Divide `total` in proportion to the weights, by the largest remainder method."""
    whole = sum(Fraction(weight) for weight in weights.values())
    exact = {name: total * Fraction(weight) / whole for name, weight in weights.items()}
    shares = {name: int(share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (shares[name] - exact[name], name))
    for name in by_remainder[: total - sum(shares.values())]:
        shares[name] += 1
    return shares


def _hash(seed: int, *parts: str) -> bytes:
    return hashlib.sha256("\0".join([str(seed), *parts]).encode()).digest()


def _ordered(
    documents: list[TokenDocument], seed: int, source: str, sets: list[WindowSet], cut: bool
) -> list[TokenDocument]:
    """By a seeded hash of their ids, so that the split does not depend on the order in the file; whole, or in parts."""
    if cut:
        longest = max(one.seq_len for one in sets)
        counts = [max(1, min(_PARTS, len(document.tokens) // (_WINDOWS_A_PART * longest))) for document in documents]
        documents = [
            TokenDocument(f"{document.id}#{number}", part)
            for document, count in zip(documents, counts, strict=True)
            for number, part in enumerate(np.array_split(document.tokens, count))
        ]
    return sorted(documents, key=lambda document: _hash(seed, source, document.id))


def _is_packed(document: TokenDocument, seq_len: int, packing: Packing) -> bool:
    return packing == "packed" or (packing == "auto" and len(document.tokens) < seq_len)


def _deal(documents: list[TokenDocument], demands: list[WindowSet], packing: Packing) -> list[list[TokenDocument]]:
    """Give each document to the set that has the smallest share of the windows it needs."""
    parts: list[list[TokenDocument]] = [[] for _ in demands]
    sizes = [0.0 for _ in demands]  # in windows: whole ones of a document that is cut, fractions of a packed one
    needing = [index for index, demand in enumerate(demands) if demand.samples]
    for document in documents if needing else []:
        index = min(needing, key=lambda one: sizes[one] / demands[one].samples)
        parts[index].append(document)
        seq_len, tokens = demands[index].seq_len, len(document.tokens)
        sizes[index] += (tokens + 1) / seq_len if _is_packed(document, seq_len, packing) else tokens // seq_len
    return parts


def _draw(
    documents: list[TokenDocument], demand: WindowSet, packing: Packing, eos_token_id: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """As many of the candidates as the set needs, or all, in random order."""
    candidates = _candidates(documents, demand.seq_len, packing, eos_token_id, rng)
    return [candidates[index] for index in rng.permutation(len(candidates))[: demand.samples]]


def _candidates(
    documents: list[TokenDocument], seq_len: int, packing: Packing, eos_token_id: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Windows that do not overlap, int32 [seq_len] each."""
    windows: list[np.ndarray] = []
    short = [np.zeros(0, np.int32)]
    for document in documents:
        if _is_packed(document, seq_len, packing):
            short += [document.tokens, np.asarray([eos_token_id], np.int32)]
        else:
            offset = int(rng.integers(len(document.tokens) % seq_len + 1))
            windows += _cut(document.tokens[offset:], seq_len)
    return windows + _cut(np.concatenate(short), seq_len)


def _cut(tokens: Int32[np.ndarray, " tokens"], seq_len: int) -> list[np.ndarray]:
    """Consecutive windows from the first token; the rest that fills none is dropped."""
    count = len(tokens) // seq_len
    return list(tokens[: count * seq_len].reshape(count, seq_len))
