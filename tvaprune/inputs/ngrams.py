"""Hashes of a text's n-grams of words, by which passages that two texts share are found."""

import hashlib
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int64, UInt64

_WORD = re.compile(r"[^\W_]+")
# Odd, so that two grams that differ in one word never collide; the digits are the golden ratio's.
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_HALF = np.uint64(32)


class NgramHasher:
    """Hashes of n-grams of words in lower case, without punctuation (GPT-3: Brown et al. 2020, appendix C).

    64 bits a hash: among a million known grams, a billion others meet one by chance with probability 1e-4.

    Departure: n is fixed. The paper takes 8 to 13 by data set, so that short examples have grams too; here a text with
    fewer words has none. Words are runs of letters and digits, which in scripts without spaces are whole clauses, so
    that there fewer overlaps are found than there are.

    Args:
        n: words in a gram.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self._known: dict[str, int] = {}

    def hash(
        self, documents: Sequence[Sequence[str]]
    ) -> tuple[UInt64[np.ndarray, " grams"], Int64[np.ndarray, " grams"]]:
        """The grams of some documents.

        Args:
            documents: each in pieces; a gram does not span two of them.

        Returns:
            Hashes, each once a document, ascending within it; and the index of the document of each, ascending.
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
        for place in range(self.n):
            grams = (grams ^ (grams >> _HALF)) * _MULTIPLIER + hashed[place : place + count]  # modulo 2^64
        whole = piece_of[:count] == piece_of[self.n - 1 :][:count]
        grams, document = grams[whole], np.array(owners, np.int64)[piece_of[:count][whole]]
        order = np.lexsort((grams, document))
        grams, document = grams[order], document[order]
        first = np.ones(len(grams), bool)
        first[1:] = (grams[1:] != grams[:-1]) | (document[1:] != document[:-1])
        return grams[first], document[first]

    def _word(self, word: str) -> int:
        known = self._known.get(word)
        if known is None:
            known = self._known[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest())
        return known


def among(grams: UInt64[np.ndarray, " grams"], ascending: UInt64[np.ndarray, " known"]) -> Bool[np.ndarray, " grams"]:
    """Which grams are among the known ones, whose hashes ascend."""
    if not len(ascending):
        return np.zeros(len(grams), bool)
    places = np.searchsorted(ascending, grams)
    return ascending[np.minimum(places, len(ascending) - 1)] == grams
