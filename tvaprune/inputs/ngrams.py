"""Hashes of n-grams of words, to find passages that two texts share."""

import hashlib
import re
from collections.abc import Sequence
from functools import cache

import numpy as np
from jaxtyping import Bool, Int64, UInt64

# Thai, Lao, Myanmar, Khmer, Japanese and Chinese have no spaces between words: each of their letters counts as a word.
_UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
    r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
# Odd, so that two n-grams that differ in one word never collide; the digits are the golden ratio's.
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def hash_ngrams(
    documents: Sequence[Sequence[str]], n: int
) -> tuple[UInt64[np.ndarray, " ngrams"], Int64[np.ndarray, " ngrams"]]:
    """Hashes of n-grams of words in lower case, without punctuation (GPT-3: Brown et al. 2020, appendix C).

    Returns each hash once a document, ascending within it, and its document by index, ascending. An n-gram does not
    span two pieces. With 64 bits, a billion n-grams match one of a million others by chance with probability 5e-5.

    Departure: n is fixed. The paper takes 8 to 13 by data set, so that short examples have n-grams too; here a text
    with fewer words has none. Words are runs of letters and digits, and single letters in scripts without spaces.
    """
    pieces = [(index, _WORD.findall(piece.lower())) for index, document in enumerate(documents) for piece in document]
    piece_of = np.repeat(np.arange(len(pieces)), [len(words) for _, words in pieces])
    owners = np.array([index for index, _ in pieces], np.int64)
    hashed = np.array([_hash(word) for _, words in pieces for word in words], np.uint64)
    count = max(0, len(hashed) - n + 1)
    ngrams = np.zeros(count, np.uint64)
    for offset in range(n):
        ngrams = (ngrams ^ (ngrams >> np.uint64(32))) * _MULTIPLIER + hashed[offset : offset + count]  # modulo 2^64
    whole = piece_of[:count] == piece_of[n - 1 :][:count]
    ngrams, document_of = ngrams[whole], owners[piece_of[:count][whole]]
    order = np.lexsort((ngrams, document_of))
    ngrams, document_of = ngrams[order], document_of[order]
    first = np.ones(len(ngrams), bool)
    first[1:] = (ngrams[1:] != ngrams[:-1]) | (document_of[1:] != document_of[:-1])
    return ngrams[first], document_of[first]


@cache
def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest())


def among(ngrams: UInt64[np.ndarray, " ngrams"], known: UInt64[np.ndarray, " known"]) -> Bool[np.ndarray, " ngrams"]:
    """Which n-grams are among the known ones, whose hashes ascend."""
    return np.searchsorted(known, ngrams, "left") < np.searchsorted(known, ngrams, "right")
