"""Packing as properties: nothing lost, nothing doubled, no pack too full, the same every time."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitune.data import packing
from minitune.data.packing import packs, steps_of_rows, steps_of_tokens

lengths_of = st.lists(st.integers(1, 60), min_size=0, max_size=60)
QUICK = settings(max_examples=150, deadline=None)


@QUICK
@given(lengths=lengths_of, rows=st.integers(1, 20), seed=st.integers(0, 9))
def test_steps_of_rows(lengths: list[int], rows: int, seed: int) -> None:
    """Joined, the steps are the order; only the last is short."""
    order = random.Random(seed).sample(range(len(lengths)), len(lengths))
    steps = steps_of_rows(order, rows)
    assert [r for step in steps for r in step] == order
    assert all(len(step) == rows for step in steps[:-1])
    assert all(1 <= len(step) <= rows for step in steps)


@QUICK
@given(lengths=lengths_of, tokens=st.integers(1, 100), seed=st.integers(0, 9))
def test_steps_of_tokens(lengths: list[int], tokens: int, seed: int) -> None:
    """Joined, the steps are the order; none is too full (but for one long row), none could take its neighbour."""
    order = random.Random(seed).sample(range(len(lengths)), len(lengths))
    steps = steps_of_tokens(order, lengths, tokens)
    assert [r for step in steps for r in step] == order
    size = [sum(lengths[r] for r in step) for step in steps]
    assert all(step and (n <= tokens or len(step) == 1) for step, n in zip(steps, size, strict=True))
    assert all(n + lengths[after[0]] > tokens for n, after in zip(size, steps[1:], strict=False))


@QUICK
@given(lengths=lengths_of, capacity=st.integers(1, 120), seed=st.integers(0, 9))
def test_packs(lengths: list[int], capacity: int, seed: int) -> None:
    """Each row once; capacity kept (but for one long row); rows keep their order; few packs; a pure function."""
    rows = random.Random(seed).sample(range(len(lengths)), len(lengths))
    made = packs(rows, lengths, capacity)
    assert sorted(r for pack in made for r in pack) == sorted(rows)
    for pack in made:
        assert sum(lengths[r] for r in pack) <= capacity or len(pack) == 1
        assert [r for r in rows if r in pack] == pack
    assert made == packs(list(rows), tuple(lengths), capacity)
    if rows:
        assert all(made)
        total = sum(lengths)
        assert len(made) <= max(1, 2 * total / capacity + 1)  # first fit leaves at most one pack half empty
        assert total > capacity or made == [rows]


def test_first_fit_decreasing() -> None:
    """A case by hand: 7 takes 3, 6 takes 4, so that two packs of 10 are full."""
    assert packs([0, 1, 2, 3], [3, 4, 6, 7], 10) == [[0, 3], [1, 2]]


def like_the_real_rows(count: int) -> np.ndarray:
    """Lengths of that many rows, spread as the real data's: mean 49, 10 to 220."""
    return np.clip(np.random.default_rng(3).lognormal(3.77, 0.5, count), 8, 220).astype(np.int64)


@pytest.mark.parametrize(("rows", "rows_per_step"), [(3729, 16), (40, 16), (33, 16), (700, 4), (1200, 3)])
def test_levelled_steps_fill_whole_tiles(rows: int, rows_per_step: int) -> None:
    """Every row once and near its place, every step of its size; the tokens up to whole tiles are few."""
    lengths = like_the_real_rows(rows)
    order = np.random.default_rng(4).permutation(rows)
    got = packing.level(order, lengths, rows_per_step)
    assert sorted(got) == list(range(rows))
    places = np.empty(rows, dtype=np.int64)
    places[got] = np.arange(rows)
    moved = np.abs(places[order] - np.arange(rows)) // rows_per_step
    assert moved.max() <= packing.WINDOW
    whole = rows // rows_per_step * rows_per_step
    assert np.array_equal(got[whole:], order[whole:])
    assert np.array_equal(packing.level(order, lengths, rows_per_step), got)

    def padding(order: np.ndarray) -> float:
        sums = lengths[order[:whole]].reshape(-1, rows_per_step).sum(1)
        return float((-(-sums // packing.TILE) * packing.TILE).sum() / sums.sum() - 1)

    assert padding(got) <= padding(order)
    if rows == 3729:
        assert padding(order) > 0.07 and padding(got) < 0.015


def test_levelling_leaves_alone_what_it_can_not_help() -> None:
    """One row a step, one step, steps of many tiles, rows of one length."""
    lengths, order = like_the_real_rows(640), np.random.default_rng(5).permutation(640)
    for rows_per_step in (1, 640, 160):
        assert np.array_equal(packing.level(order, lengths, rows_per_step), order)
    assert sorted(packing.level(order, np.full(640, 50), 16)) == list(range(640))
