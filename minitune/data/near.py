"""Near duplicates: MinHash sketches of character shingles (rensa), bands to find candidates, texts to be sure.

Shingles are runs of characters, so Chinese needs no words. Case, white space and punctuation do not count.
Broder, On the resemblance and containment of documents, 1997; bands as in Leskovec et al., Mining of Massive
Datasets, 3.4: two texts of resemblance s meet in one of 21 bands of 6 with probability 1 - (1 - s^6)^21.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any

THRESHOLD = 0.8
BANDS, BAND = 21, 6
PERMUTATIONS = 128
BATCH = 2048
SEED = 1
# An estimate from 128 permutations is off by 0.04 (one deviation at 0.8); what is near the line is read again.
MARGIN = 0.1
UNSAID = re.compile(r"[\W_]+")


def available() -> bool:
    """Whether the library of sketches is installed."""
    try:
        import rensa  # noqa: F401
    except ImportError:
        return False
    return True


def plain(text: str) -> str:
    """What is compared of a text."""
    return UNSAID.sub("", unicodedata.normalize("NFKC", text).casefold())


def shingles(texts: Sequence[str]) -> tuple[Any, Any]:
    """(hashes uint64, offsets int64): those of text i are hashes[offsets[i]:offsets[i + 1]].

    A shingle is 3 characters from one that is not ASCII on, 5 from another, since a character of Chinese says more.
    A text shorter than that is one shingle.
    """
    import numpy as np

    prepared = [plain(text) for text in texts]
    padded = [text.ljust(5, "\0") for text in prepared]
    codes = np.frombuffer("".join([*padded, "\0\0\0\0"]).encode("utf-32-le", "surrogatepass"), np.uint32).astype(
        np.uint64
    )
    factor = np.uint64(0x9E3779B97F4A7C15)
    rolled = three = codes[: len(codes) - 4].copy()
    for i in range(1, 5):
        rolled = rolled * factor + codes[i : len(codes) - 4 + i]
        if i == 2:
            three = rolled
    width = np.where(codes[: len(codes) - 4] > 127, 3, 5)
    hashes = np.where(width == 3, three, rolled)
    hashes = (hashes ^ (hashes >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes ^= hashes >> np.uint64(32)
    lengths = np.array([len(text) for text in padded])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    place = np.arange(len(hashes)) - np.repeat(starts[:-1], lengths)
    whole = place + width <= np.repeat([len(text) for text in prepared], lengths)
    whole[starts[:-1]] = True
    return hashes[whole], np.concatenate([[0], np.cumsum(whole)])[starts]


def resemblance(a: Any, b: Any) -> float:
    """The Jaccard index of two sets of shingles (sorted, distinct)."""
    import numpy as np

    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)


class Sketches:
    """A sketch of 512 bytes for each text that is added; the texts are not kept."""

    def __init__(self) -> None:
        self.waiting: list[str] = []
        self.done: list[Any] = []
        self.count = 0

    def add(self, text: str) -> None:
        self.waiting.append(text)
        self.count += 1
        if len(self.waiting) == BATCH:
            self._flush()

    def _flush(self) -> None:
        import numpy as np
        import rensa

        if self.waiting:
            hashes, offsets = shingles(self.waiting)
            matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
                hashes, offsets.astype(np.uint64), PERMUTATIONS, SEED
            )
            self.done.append(np.array(matrix.to_rows(), dtype=np.uint32))
            self.waiting = []

    def _taken(self, keep: Any) -> Any:
        """The sketches of these numbers in one array; the others are let go, a batch at a time."""
        import numpy as np

        every = np.empty((len(keep), PERMUTATIONS), np.uint32)
        start = at = 0
        for i, part in enumerate(self.done):
            inside = keep[np.searchsorted(keep, start) : np.searchsorted(keep, start + len(part))] - start
            every[at : at + len(inside)] = part[inside]
            self.done[i] = None
            start, at = start + len(part), at + len(inside)
        self.done = []
        return every

    def candidates(self, keep: Any, threshold: float = THRESHOLD) -> list[tuple[int, int]]:
        """(earlier, later) pairs among the texts of these numbers (int64, rising) that may be near; sorted by later."""
        import numpy as np

        self._flush()
        if len(keep) < 2:
            return []
        every = self._taken(keep)
        found = []
        for band in range(BANDS):
            key = np.zeros(len(every), np.uint64)
            for column in range(band * BAND, (band + 1) * BAND):
                key = (key ^ every[:, column]) * np.uint64(0x9E3779B97F4A7C15)
                key ^= key >> np.uint64(32)
            order = np.argsort(key, kind="stable")
            same = key[order][1:] == key[order][:-1]
            if not same.any():
                continue
            # Each member of a run is paired with the one before it and with the run's first.
            first = np.maximum.accumulate(np.where(np.concatenate([[False], same]), 0, np.arange(len(order))))[1:][same]
            later = order[1:][same]
            found += [np.stack([order[:-1][same], later]), np.stack([order[first], later])]
        if not found:
            return []
        pairs = np.unique(np.concatenate(found, axis=1), axis=1)
        alike = np.concatenate([
            (every[part[0]] == every[part[1]]).mean(axis=1)
            for part in np.array_split(pairs, max(1, pairs.shape[1] // 65536), axis=1)
        ])  # fmt: skip
        pairs = keep[pairs[:, alike >= threshold - MARGIN]]
        return [(int(a), int(b)) for a, b in pairs[:, np.lexsort((pairs[0], pairs[1]))].T]


def confirmed(
    pairs: Sequence[tuple[int, int]],
    read: Callable[[set[int]], Iterable[tuple[int, str]]],
    threshold: float = THRESHOLD,
) -> list[tuple[int, int, float]]:
    """(earlier, later, resemblance) of the pairs whose texts are truly near, at most one for each later text.

    read: numbers -> (number, text) in rising order, read again from the file.
    """
    import numpy as np

    until: dict[int, int] = {}
    partners: dict[int, list[int]] = {}
    for earlier, later in pairs:
        until[earlier] = max(until.get(earlier, 0), later)
        until.setdefault(later, later)
        partners.setdefault(later, []).append(earlier)
    held: dict[int, Any] = {}
    out = []
    for number, text in read(set(until)):
        held[number] = np.unique(shingles([text])[0])
        scored = [
            (resemblance(held[other], held[number]), other) for other in partners.get(number, ()) if other in held
        ]
        if scored and max(scored)[0] >= threshold:
            score, other = max(scored, key=lambda pair: (pair[0], -pair[1]))
            out.append((other, number, score))
        for other in (*partners.get(number, ()), number):  # kept no longer than a later text needs it
            if until[other] <= number:
                held.pop(other, None)
    return out
