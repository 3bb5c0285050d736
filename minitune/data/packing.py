"""Lengths -> packed steps. A pure function: the same order and lengths give the same steps everywhere."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import overload

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Steps(Sequence[list[int]]):
    """The rows of each step: consecutive runs of an order of rows. order: int64 [rows]; bounds: int64 [steps + 1]."""

    def __init__(self, order: ArrayLike, bounds: ArrayLike):
        self.order: NDArray[np.int64] = np.asarray(order, dtype=np.int64)
        self.bounds: NDArray[np.int64] = np.asarray(bounds, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @overload
    def __getitem__(self, index: int) -> list[int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[int]]: ...
    def __getitem__(self, index: int | slice) -> list[int] | list[list[int]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        return self.order[self.bounds[at] : self.bounds[at + 1]].tolist()


def steps_of_rows(order: ArrayLike, rows_per_step: int) -> Steps:
    """Consecutive runs of `rows_per_step` rows; the last one is short, no row is lost."""
    order = np.asarray(order, dtype=np.int64)
    return Steps(order, [*range(0, len(order), rows_per_step), len(order)])


def steps_of_tokens(order: ArrayLike, lengths: ArrayLike, tokens_per_step: int) -> Steps:
    """Consecutive runs of at most `tokens_per_step` tokens (a longer row is a step of its own)."""
    order = np.asarray(order, dtype=np.int64)
    before = [0, *np.cumsum(np.asarray(lengths, dtype=np.int64)[order]).tolist()]  # tokens before each row
    bounds = [0]
    while bounds[-1] < len(order):
        at = bounds[-1]
        bounds.append(max(at + 1, bisect_right(before, before[at] + tokens_per_step, at) - 1))
    return Steps(order, bounds)


def packs(rows: Sequence[int], lengths: Sequence[int] | Mapping[int, int], tokens_per_pack: int) -> list[list[int]]:
    """One step's rows in as few packs of at most `tokens_per_pack` tokens as first-fit decreasing finds.

    A row longer than that is a pack of its own. Within a pack rows keep their order of `rows`.
    """
    if sum(lengths[r] for r in rows) <= tokens_per_pack:
        return [list(rows)]
    place = {row: i for i, row in enumerate(rows)}
    room: list[int] = []
    out: list[list[int]] = []
    for row in sorted(rows, key=lambda r: (-lengths[r], place[r])):
        for i, free in enumerate(room):
            if lengths[row] <= free:
                out[i].append(row)
                room[i] -= lengths[row]
                break
        else:
            out.append([row])
            room.append(tokens_per_pack - lengths[row])
    return [sorted(pack, key=place.__getitem__) for pack in out]
