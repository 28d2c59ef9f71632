"""Grams by hash against sets of words, on any texts and any cut into documents."""

import re

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tvaprune.inputs.leaks import EvaluationDocument, compare, known_ngrams

# Few words, so that texts do share grams; with case, punctuation and other scripts between them.
TEXTS = st.lists(st.sampled_from(["a", "B", "b", "c1", "Ä", "ä", "is.", "—", "don't", "x_y", "\n"]), max_size=30).map(
    " ".join
)


def words(text: str) -> list[str]:
    return re.sub(r"[\W_]", " ", text.lower()).split()


def grams(pieces: list[str], n: int) -> set[tuple[str, ...]]:
    listed = [words(piece) for piece in pieces]
    return {tuple(one[start : start + n]) for one in listed for start in range(len(one) - n + 1)}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(TEXTS, max_size=3), max_size=6), st.lists(TEXTS, max_size=4), st.integers(2, 6))
def test_what_is_shared_is_what_sets_of_words_share(documents: list[list[str]], learned: list[str], n: int) -> None:
    known = known_ngrams(learned, n)
    assert (np.diff(known.astype(object)) > 0).all()
    reference = grams(learned, n)
    assert len(known) == len(reference)

    evaluated = [EvaluationDocument(str(index), pieces) for index, pieces in enumerate(documents)]
    result = compare(evaluated, {"learned": known}, n)
    per_document = [grams(pieces, n) for pieces in documents]
    shared = [one & reference for one in per_document]
    assert result.documents == len(documents)
    assert result.ngrams == sum(map(len, per_document))
    assert result.judged == sum(map(bool, per_document))
    overlap = result.overlaps["learned"]
    assert overlap.ngrams == sum(map(len, shared))
    assert overlap.documents == sum(map(bool, shared))
    assert overlap.examples == [str(index) for index, one in enumerate(shared) if one][:3]
