"""Rows in arrays against plain lists of `Encoded`, whatever is chosen and cut; packs and digests of both."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitune.data import packing
from minitune.data.loader import Loader, make_pack
from minitune.data.store import EncodedRows
from minitune.data.template import IGNORED, Encoded, cut

QUICK = settings(max_examples=120, deadline=None, database=None)


@st.composite
def encoded(draw: st.DrawFn, min_size: int = 0) -> list[Encoded]:
    """Rows of any length, none included, each token learned or not."""
    rows = []
    for ids in draw(st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=9), min_size=min_size, max_size=9)):
        learned = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        rows.append(Encoded(ids, [i if keep else IGNORED for i, keep in zip(ids, learned, strict=True)]))
    return rows


def as_plain(rows: EncodedRows, plain: list[Encoded]) -> None:
    """Everything that arrays say of rows is what the lists say."""
    assert list(rows) == plain and len(rows) == len(plain)
    assert rows.lengths.tolist() == [len(r.input_ids) for r in plain]
    assert rows.supervised.tolist() == [r.supervised for r in plain]
    assert rows.tokens == sum(len(r.input_ids) for r in plain)
    assert rows.longest == max([len(r.input_ids) for r in plain], default=0)
    assert rows.highest == max([i for r in plain for i in r.input_ids], default=-1)
    ids, learned = rows.flat()
    assert ids.tolist() == [i for r in plain for i in r.input_ids]
    assert learned.tolist() == [label != IGNORED for r in plain for label in r.labels]
    assert rows.digest() == EncodedRows.of(plain).digest() == digest(plain)


def digest(plain: list[Encoded]) -> str:
    """The fingerprint of a run's rows, written out again; a part is at most 4,096 rows."""
    ids = [i for r in plain for i in r.input_ids]
    learned = bytes(label != IGNORED for r in plain for label in r.labels)
    head = b"".join(len(r.input_ids).to_bytes(8, "little") for r in plain)
    return hashlib.sha256(head + b"".join(i.to_bytes(4, "little") for i in ids) + learned).hexdigest()


@QUICK
@given(plain=encoded(), data=st.data())
def test_rows_are_what_they_were(plain: list[Encoded], data: st.DataObject) -> None:
    """Whole, as slices, chosen in any order or by a mask, cut, and all of it in turn."""
    rows = EncodedRows.of(plain)
    as_plain(rows, plain)
    assert EncodedRows.of(rows) is rows and rows.numbers.tolist() == list(range(1, len(plain) + 1))
    start, stop = data.draw(st.integers(-4, 9)), data.draw(st.integers(-4, 9))
    as_plain(rows[start:stop], plain[start:stop])
    mask = data.draw(st.lists(st.booleans(), min_size=len(plain), max_size=len(plain)))
    masked, kept = rows.select(np.array(mask, bool)), [r for r, keep in zip(plain, mask, strict=True) if keep]
    as_plain(masked, kept)
    assert masked.numbers.tolist() == [i for i, keep in enumerate(mask, 1) if keep]
    if kept:
        order = data.draw(st.lists(st.integers(0, len(kept) - 1), max_size=6))
        chosen = [kept[i] for i in order]
        as_plain(masked.select(order), chosen)
        most = data.draw(st.integers(1, 10))
        as_plain(masked.select(order).cut(most), [cut(r, most) for r in chosen])
        as_plain(EncodedRows.joined([rows, masked.select(order).cut(most)]), [*plain, *(cut(r, most) for r in chosen)])
        as_plain(masked, kept)  # as before
        assert masked[-1] == kept[-1]


def test_many_rows() -> None:
    """More rows than are gathered at once: nothing at the seams."""
    plain = [Encoded([i, i + 1], [IGNORED, i + 1]) for i in range(10_000)]
    rows = EncodedRows.of(plain)
    assert rows.highest == 10_000
    backwards = list(range(len(plain)))[::-1]
    assert rows.select(backwards).flat()[0].tolist() == [i for r in reversed(plain) for i in r.input_ids]
    assert rows.select(backwards).digest() == EncodedRows.of(plain[::-1]).digest() != rows.digest()
    assert rows.select(np.arange(5000, 5003)).highest == 5003


def test_what_a_digest_sees() -> None:
    """Other bounds, other ids, other labels: another run."""
    rows = [
        [Encoded([1, 2, 3], [-100, 2, 3])],
        [Encoded([1, 2, 3], [-100, -100, 3])],
        [Encoded([1, 2], [-100, 2]), Encoded([3], [3])],
        [Encoded([1, 2, 4], [-100, 2, 4])],
        [Encoded([1, 2, 3], [-100, 2, 3]), Encoded([], [])],
    ]
    assert len({EncodedRows.of(r).digest() for r in rows}) == len(rows)


def test_a_label_that_is_not_its_token_is_refused() -> None:
    """Arrays could not say it."""
    with pytest.raises(ValueError, match="row 2: a label"):
        EncodedRows.of([Encoded([1, 2], [-100, 2]), Encoded([1, 2], [-100, 3])])
    with pytest.raises(ValueError):
        EncodedRows.of([Encoded([1, 2], [-100])])


@QUICK
@given(plain=encoded(min_size=1), seed=st.integers(0, 3), tokens=st.sampled_from([0, 7]), most=st.integers(1, 12))
def test_packs_of_arrays_are_packs_of_lists(plain: list[Encoded], seed: int, tokens: int, most: int) -> None:
    """A loader over arrays (chosen and cut) gives the tensors of one over lists, and a pack is an independent shift."""
    plain = [cut(r, most) for r in plain[::-1] if r.input_ids]
    arrays = EncodedRows.of([Encoded([9] * 3, [9] * 3), *plain, Encoded([8] * 20, [8] * 20)])
    settings: dict[str, int] = {"rows_per_step": 2, "tokens_per_step": tokens, "tokens_per_pack": 10, "seed": seed}
    chosen = arrays.select(list(range(1, len(plain) + 1))).cut(most)
    one, other = Loader(plain, **settings), Loader(chosen, **settings)
    for a, b in zip(one.batches(1), other.batches(1), strict=True):
        for p, q in zip(a.packs, b.packs, strict=True):
            assert torch.equal(p.input_ids, q.input_ids) and torch.equal(p.token_uids, q.token_uids)
            assert torch.equal(p.predict, q.predict) and torch.equal(p.targets, q.targets)
            assert p.lengths == q.lengths
    pack = make_pack(chosen, list(range(len(chosen))))
    shifted = [(len(r.input_ids), at, label) for r in plain for at, label in enumerate(r.labels)]
    wanted = [i for i, (_, at, label) in enumerate(shifted) if at and label != IGNORED]
    assert (pack.predict + 1).tolist() == wanted and pack.targets.tolist() == [shifted[i][2] for i in wanted]


def test_the_order_of_a_seed_is_what_it_was() -> None:
    """The rows of each step by torch's own permutation, levelled; greedy steps in a plain loop."""
    plain = [Encoded([1] * n, [1] * n) for n in (3, 9, 1, 4, 12, 7, 2, 8, 5, 6, 11, 10, 1, 1)]
    for epoch in range(3):
        order = torch.randperm(14, generator=torch.Generator().manual_seed(42 * 1_000_003 + epoch)).tolist()
        steps = list(Loader(plain, rows_per_step=4, seed=42).steps(epoch))
        level = packing.level(order, [len(row.input_ids) for row in plain], 4).tolist()
        assert steps == [level[i : i + 4] for i in range(0, 14, 4)]
        greedy: list[list[int]] = [[]]
        for row in order:
            if greedy[-1] and sum(len(plain[r].input_ids) for r in [*greedy[-1], row]) > 15:
                greedy.append([])
            greedy[-1].append(row)
        assert list(Loader(plain, rows_per_step=4, tokens_per_step=15, seed=42).steps(epoch)) == greedy
