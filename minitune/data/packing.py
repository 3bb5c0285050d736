"""Lengths -> packed steps. A pure function: the same order and lengths give the same steps everywhere."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

ORDER = 2  # grows when the same seed gives another order of rows; 1 had no `level`
TILE = 128  # tokens that a card computes together: a step of 769 costs what one of 896 does
WINDOW = 16  # steps that exchange rows


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


def level(order: ArrayLike, lengths: ArrayLike, rows_per_step: int) -> NDArray[np.int64]:
    """The order with rows exchanged between neighbouring steps, so that steps fill whole tiles of tokens: steps of 16
    rows, some 790 tokens, have just below 768 or just below 896 instead of 541 to 1,092.

    Every row stays within `WINDOW` steps of its place and every step keeps its number of rows. The last, short step is
    left alone; so are steps of so many tiles that a broken one hardly counts.
    """
    order, lengths = np.array(order, dtype=np.int64), np.asarray(lengths, dtype=np.int64)
    steps = len(order) // rows_per_step
    if rows_per_step < 2 or steps < 2 or int(lengths[order].mean()) * rows_per_step > 32 * TILE:
        return order
    whole = steps // WINDOW * WINDOW
    edges = [*range(0, whole + 1, WINDOW * max(1, (1 << 22) // (WINDOW * rows_per_step**2)))]
    for first, last in [*zip(edges, [*edges[1:], whole], strict=True), (whole, steps)]:
        window = WINDOW if last <= whole else last - first
        if last - first >= 2:
            part = order[first * rows_per_step : last * rows_per_step].reshape(-1, window, rows_per_step)
            _level(part, lengths[part])
    return order


def _level(rows: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
    """rows, lengths: [windows, steps, rows], changed in place. The step that is furthest over its share of the window's
    tiles exchanges a row with the one that has most room, until none is over."""
    windows, steps, _ = rows.shape
    sums = lengths.sum(2)
    tiles = -(-(sums.sum(1) + 2 * steps) // TILE)  # two tokens a step to move about in
    rank = np.argsort(np.argsort(-sums, axis=1, kind="stable"), axis=1, kind="stable")
    over = sums - (tiles[:, None] // steps + (rank < tiles[:, None] % steps)) * TILE
    going = np.arange(windows)
    for _ in range(16 * steps):
        high, low = over[going].argmax(1), over[going].argmin(1)
        most, least = over[going, high], over[going, low]
        gain = lengths[going, high][:, :, None] - lengths[going, low][:, None, :]
        best = np.abs(2 * gain - (most - least)[:, None, None]).reshape(len(going), -1).argmin(1)
        i, j = best // rows.shape[2], best % rows.shape[2]
        change = gain[np.arange(len(going)), i, j]
        better = (most > 0) & (np.maximum(most - change, least + change) < most)
        going, high, low, i, j, change = (x[better] for x in (going, high, low, i, j, change))
        if not len(going):
            return
        for table in (rows, lengths):
            table[going, high, i], table[going, low, j] = table[going, low, j], table[going, high, i]
        over[going, high] -= change
        over[going, low] += change


def steps_of_tokens(order: ArrayLike, lengths: ArrayLike, tokens_per_step: int) -> Steps:
    """Consecutive runs of at most `tokens_per_step` tokens (a longer row is a step of its own)."""
    order = np.asarray(order, dtype=np.int64)
    before = [0, *np.cumsum(np.asarray(lengths, dtype=np.int64)[order]).tolist()]  # tokens before each row
    bounds = [0]
    while bounds[-1] < len(order):
        at = bounds[-1]
        bounds.append(max(at + 1, bisect_right(before, before[at] + tokens_per_step, at) - 1))
    return Steps(order, bounds)


def deal(rows: Sequence[int], lengths: Sequence[int] | Mapping[int, int], ranks: int) -> list[list[int]]:
    """One step's rows dealt to `ranks` processes with about equal tokens: the longest first, each to the one that has
    least. A process may get none; each keeps the rows' order."""
    place = {row: i for i, row in enumerate(rows)}
    out: list[list[int]] = [[] for _ in range(ranks)]
    held = [0] * ranks
    for row in sorted(rows, key=lambda r: (-lengths[r], place[r])):
        least = held.index(min(held))
        out[least].append(row)
        held[least] += lengths[row]
    return [sorted(share, key=place.__getitem__) for share in out]


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
