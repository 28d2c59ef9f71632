"""Hashes of n-grams of words, to find passages that two texts share."""

import hashlib
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int64, UInt64

_WORD = re.compile(r"[^\W_]+")
# Odd, so that two n-grams that differ in one word never collide; the digits are the golden ratio's.
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_HALF = np.uint64(32)


class NgramHasher:
    """Hashes of n-grams of words in lower case, without punctuation (GPT-3: Brown et al. 2020, appendix C).

    A hash has 64 bits: a billion n-grams match one of a million others by chance with probability 5e-5.

    Departure: n is fixed. The paper takes 8 to 13 by data set, so that short examples have n-grams too; here a text
    with fewer words has none. Words are runs of letters and digits. In scripts without spaces these are whole
    clauses, so fewer overlaps are found than there are.

    Args:
        n: words in an n-gram.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self._known: dict[str, int] = {}

    def hash(
        self, documents: Sequence[Sequence[str]]
    ) -> tuple[UInt64[np.ndarray, " grams"], Int64[np.ndarray, " grams"]]:
        """The n-grams of some documents.

        Args:
            documents: each in pieces; an n-gram does not span two of them.

        Returns:
            Hashes, each once a document and ascending within it; and each one's document by index, ascending.
        """
        words: list[int] = []
        lengths: list[int] = []
        owners: list[int] = []
        for index, pieces in enumerate(documents):
            for piece in pieces:
                found = _WORD.findall(piece.lower())
                words.extend(map(self._word, found))
                lengths.append(len(found))
                owners.append(index)
        piece_of = np.repeat(np.arange(len(lengths)), lengths)
        count = max(0, len(words) - self.n + 1)
        hashed = np.array(words, np.uint64)
        grams = np.zeros(count, np.uint64)
        for offset in range(self.n):
            grams = (grams ^ (grams >> _HALF)) * _MULTIPLIER + hashed[offset : offset + count]  # modulo 2^64
        whole = piece_of[:count] == piece_of[self.n - 1 :][:count]
        grams, document = grams[whole], np.array(owners, np.int64)[piece_of[:count][whole]]
        order = np.lexsort((grams, document))
        grams, document = grams[order], document[order]
        first = np.ones(len(grams), bool)
        first[1:] = (grams[1:] != grams[:-1]) | (document[1:] != document[:-1])
        return grams[first], document[first]

    def _word(self, word: str) -> int:
        if word not in self._known:
            self._known[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest())
        return self._known[word]


def among(grams: UInt64[np.ndarray, " grams"], ascending: UInt64[np.ndarray, " known"]) -> Bool[np.ndarray, " grams"]:
    """Which n-grams are among the known ones, whose hashes ascend."""
    if not len(ascending):
        return np.zeros(len(grams), bool)
    found = np.minimum(np.searchsorted(ascending, grams), len(ascending) - 1)
    return ascending[found] == grams
