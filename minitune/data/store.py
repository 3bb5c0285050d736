"""Encoded rows in flat arrays: five bytes a token instead of some eighty, each row an `Encoded` when it is asked for.

Legend: T tokens of the file, N rows.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from minitune.data.template import IGNORED, Encoded

GATHER = 4096  # rows looked at together where a pass over all tokens is made


class EncodedRows(Sequence[Encoded]):
    """Rows, each a stretch of the file's tokens; choosing and cutting rows copies no token.

    ids: int32 [T]. learned: bool [T], whether the token is a label. starts, lengths: int64 [N]; a row that was cut is
    shorter than what lies there. supervised: int64 [N], tokens of the row that are learned (`Encoded.supervised`).
    numbers: int64 [N], the rows' numbers in the file.
    """

    def __init__(
        self,
        ids: NDArray[np.int32],
        learned: NDArray[np.bool_],
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        supervised: NDArray[np.int64],
        numbers: NDArray[np.int64],
    ):
        self.ids, self.learned = ids, learned
        self.starts, self.lengths, self.supervised, self.numbers = starts, lengths, supervised, numbers

    @staticmethod
    def of(rows: Iterable[Encoded]) -> EncodedRows:
        """The same rows in arrays, numbered from 1. ValueError for a label that is not its token."""
        if isinstance(rows, EncodedRows):
            return rows
        build = Builder()
        for number, row in enumerate(rows, 1):
            if any(label not in (token, IGNORED) for token, label in zip(row.input_ids, row.labels, strict=True)):
                raise ValueError(f"row {number}: a label is neither its token nor {IGNORED}")
            build.ids.extend(row.input_ids)
            build.learned += bytes(label != IGNORED for label in row.labels)
            build.end(number)
        return build.rows()

    @staticmethod
    def joined(parts: Sequence[EncodedRows]) -> EncodedRows:
        """The rows of all parts, in their order; the tokens are copied. `numbers` stay those of each part's file."""
        flat = [part.flat() for part in parts]
        lengths = np.concatenate([part.lengths for part in parts])
        return EncodedRows(
            np.concatenate([ids for ids, _ in flat]),
            np.concatenate([learned for _, learned in flat]),
            np.cumsum(lengths) - lengths,
            lengths,
            np.concatenate([part.supervised for part in parts]),
            np.concatenate([part.numbers for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> EncodedRows: ...
    def __getitem__(self, index: int | slice) -> Encoded | EncodedRows:
        if isinstance(index, slice):
            return self.select(index)
        start = int(self.starts[index])
        end = start + int(self.lengths[index])
        ids, learned = self.ids[start:end], self.learned[start:end]
        return Encoded(ids.tolist(), np.where(learned, ids, IGNORED).tolist())

    def select(self, which: Any) -> EncodedRows:
        """The rows that a slice, an array or list of places, or a mask [N] names."""
        which = np.asarray(which, dtype=np.int64) if isinstance(which, list | tuple) else which
        chosen = (a[which] for a in (self.starts, self.lengths, self.supervised, self.numbers))
        return EncodedRows(self.ids, self.learned, *chosen)

    def cut(self, max_length: int) -> EncodedRows:
        """Each row cut at its tail; one that loses its EOS ends unlearned-to-stop, as it should."""
        supervised = self.supervised.copy()
        for i in np.flatnonzero(self.lengths > max_length):
            start = self.starts[i]
            supervised[i] = np.count_nonzero(self.learned[start + 1 : start + max_length])
        shorter = np.minimum(self.lengths, max_length)
        return EncodedRows(self.ids, self.learned, self.starts, shorter, supervised, self.numbers)

    def flat(self) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """(ids, learned) of all these rows, one behind the other."""
        ends = self.starts + self.lengths
        if len(self) and np.array_equal(ends[:-1], self.starts[1:]):
            return self.ids[self.starts[0] : ends[-1]], self.learned[self.starts[0] : ends[-1]]
        bounds = list(zip(self.starts.tolist(), ends.tolist(), strict=True))
        none = slice(0, 0)
        return (
            np.concatenate([self.ids[none], *(self.ids[a:b] for a, b in bounds)]),
            np.concatenate([self.learned[none], *(self.learned[a:b] for a, b in bounds)]),
        )

    def _parts(self) -> Iterator[EncodedRows]:
        return (self[at : at + GATHER] for at in range(0, len(self), GATHER))

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def highest(self) -> int:
        """The highest id of any row; -1 without rows."""
        return max((int(part.flat()[0].max(initial=-1)) for part in self._parts()), default=-1)

    @property
    def longest(self) -> int:
        """Tokens of the longest row; 0 without rows."""
        return int(self.lengths.max(initial=0))

    def digest(self) -> str:
        """Names the rows' ids and labels in their order, the same on every machine."""
        digest = hashlib.sha256(self.lengths.astype("<i8").tobytes())
        for part in self._parts():
            ids, learned = part.flat()
            digest.update(ids.astype("<i4", copy=False).tobytes())
            digest.update(learned.tobytes())
        return digest.hexdigest()


class Builder:
    """Rows that are still being added: append a row's tokens to `ids` and `learned`, then `end` it."""

    def __init__(self) -> None:
        # array and bytearray grow in place: numpy would hold the tokens twice at the end.
        self.ids, self.learned = array("i"), bytearray()
        self.lengths, self.supervised, self.numbers = array("q"), array("q"), array("q")
        self._start = 0

    def end(self, number: int) -> None:
        """What was appended since the last row is row `number` of the file."""
        start, self._start = self._start, len(self.ids)
        self.lengths.append(self._start - start)
        self.supervised.append(self.learned.count(1, start + 1))
        self.numbers.append(number)

    def rows(self) -> EncodedRows:
        """The finished rows; nothing can be added any more."""
        lengths = np.frombuffer(self.lengths, np.int64)
        return EncodedRows(
            np.frombuffer(self.ids, np.int32),
            np.frombuffer(self.learned, np.bool_),
            np.cumsum(lengths) - lengths,
            lengths,
            np.frombuffer(self.supervised, np.int64),
            np.frombuffer(self.numbers, np.int64),
        )


@dataclass
class EncodedFile:
    """Every row of a file, uncut. form: alpaca, messages or sharegpt; notes: what a person should be told."""

    rows: EncodedRows
    form: str
    notes: list[str] = field(default_factory=list)
