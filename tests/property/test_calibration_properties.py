"""The sampled windows, whatever the documents are."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tvaprune.inputs.calibration import TokenDocument, WindowSet, sample_windows, share_out
from tvaprune.inputs.sources import InputError

EOS = 0
# Every token of every document is another number, so that a window tells which documents it was cut from.
lengths = st.lists(st.integers(1, 60), min_size=20, max_size=60)
packings = st.sampled_from(["auto", "packed"])


def make_sources(sizes: list[int], sources: int = 2) -> dict[str, list[TokenDocument]]:
    made: dict[str, list[TokenDocument]] = {f"source{number}": [] for number in range(sources)}
    next_token = 1
    for number, size in enumerate(sizes * sources):
        name = f"source{number % sources}"
        made[name].append(TokenDocument(f"doc{number}", np.arange(next_token, next_token + size, dtype=np.int32)))
        next_token += size
    return made


def sample(sources: dict[str, list[TokenDocument]], packing: str, seed: int = 0) -> dict[str, torch.Tensor]:
    sets = [WindowSet("train", 8, 7), WindowSet("validation", 3, 7), WindowSet("finetune", 5, 11)]
    return sample_windows(sources, sets, packing=packing, eos_token_id=EOS, seed=seed)  # type: ignore[arg-type]


def sample_or_skip(sources: dict[str, list[TokenDocument]], packing: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Small draws can be too short; they are refused, which other tests cover."""
    try:
        return sample(sources, packing, seed)
    except InputError:
        assume(False)
        raise


def documents_in(windows: torch.Tensor, sources: dict[str, list[TokenDocument]]) -> set[str]:
    owner = {int(token): doc.id for docs in sources.values() for doc in docs for token in doc.tokens}
    return {owner[token] for token in windows.flatten().tolist() if token != EOS}


@given(lengths, packings, st.integers(0, 5))
def test_windows_have_the_exact_shape_and_sets_share_no_document(sizes: list[int], packing: str, seed: int) -> None:
    sources = make_sources(sizes)
    windows = sample_or_skip(sources, packing, seed)
    assert {name: tuple(rows.shape) for name, rows in windows.items()} == {
        "train": (8, 7),
        "validation": (3, 7),
        "finetune": (5, 11),
    }
    assert all(rows.dtype == torch.int32 for rows in windows.values())
    found = [documents_in(rows, sources) for rows in windows.values()]
    assert sum(len(one) for one in found) == len(set().union(*found))


@given(lengths, packings)
def test_no_token_is_invented_repeated_or_out_of_order(sizes: list[int], packing: str) -> None:
    sources = make_sources(sizes)
    last = {int(doc.tokens[-1]) for docs in sources.values() for doc in docs}
    first = {int(doc.tokens[0]) for docs in sources.values() for doc in docs}
    windows = sample_or_skip(sources, packing)
    tokens = [token for rows in windows.values() for token in rows.flatten().tolist() if token != EOS]
    assert len(tokens) == len(set(tokens))
    for rows in windows.values():
        for row in rows.tolist():
            for left, right in pairwise(row):
                # within a document the next token follows; a document is left only over the end-of-text token
                assert right == left + 1 or (left in last and right == EOS) or (left == EOS and right in first)


@given(lengths, packings, st.integers(0, 1000))
def test_the_seed_alone_decides(sizes: list[int], packing: str, seed: int) -> None:
    sources = make_sources(sizes)
    windows = sample_or_skip(sources, packing, seed)
    reordered = {name: docs[::-1] for name, docs in sources.items()}
    again = sample(reordered, packing, seed)
    assert all(torch.equal(windows[name], again[name]) for name in windows)


def test_another_seed_gives_other_windows() -> None:
    sources = make_sources([50] * 40)
    one, other = sample(sources, "auto", seed=1), sample(sources, "auto", seed=2)
    assert all(not torch.equal(one[name], other[name]) for name in one)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=30))
def test_documents_packing_never_joins_documents(sizes: list[int]) -> None:
    sources = make_sources([size + 60 for size in sizes] + [80] * 20, sources=1)
    windows = sample(sources, "documents")
    for rows in windows.values():
        assert EOS not in rows
        assert torch.equal(rows[:, 1:], rows[:, :-1] + 1)


@given(
    st.integers(0, 5000),
    st.dictionaries(st.text("abc", min_size=1), st.floats(0, 1e6, allow_nan=False), min_size=1, max_size=6),
)
def test_shares_sum_to_the_total_and_follow_the_weights(total: int, weights: dict[str, float]) -> None:
    if sum(weights.values()) == 0:
        with pytest.raises(ZeroDivisionError):
            share_out(total, weights)
        return
    shares = share_out(total, weights)
    assert sum(shares.values()) == total
    whole = sum(weights.values())
    for name, weight in weights.items():
        assert abs(shares[name] - total * weight / whole) < 1 + 1e-6 * total
        assert weight > 0 or shares[name] == 0
