"""The loader's tensors against an independent shift of the labels; the same step from any starting point."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from twins import rows

from minitune.data.loader import Loader, StepBatch, make_pack
from minitune.data.template import Encoded

LENGTHS = [9, 4, 17, 1, 30, 12, 5, 8, 21, 2, 6]


def loader(**changes: object) -> Loader:
    settings: dict[str, object] = {"rows_per_step": 4, "tokens_per_pack": 40, "seed": 5, **changes}
    return Loader(rows(0, LENGTHS), **settings)  # type: ignore[arg-type]


def same(a: StepBatch, b: StepBatch) -> bool:
    names = ("input_ids", "position_ids", "token_uids", "cu_seqlens", "predict", "targets")
    return a.rows == b.rows and all(
        p.lengths == q.lengths and all(torch.equal(getattr(p, n), getattr(q, n)) for n in names)
        for p, q in zip(a.packs, b.packs, strict=True)
    )


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=7),
    seed=st.integers(0, 50),
    ignore=st.integers(0, 9),
)
def test_pack_is_an_independent_shift(lengths: list[int], seed: int, ignore: int) -> None:
    """predict and targets are row by row the shifted labels of an unpacked, padded computation."""
    data = rows(seed, lengths, ignore=ignore)
    numbers = [7 * i + 3 for i in range(len(data))]
    pack = make_pack(data, numbers)
    flat = torch.cat([torch.tensor(r.input_ids) for r in data])
    shifted = torch.cat([torch.tensor([*r.labels[1:], -100]) for r in data])
    assert torch.equal(pack.input_ids, flat)
    assert torch.equal(pack.predict, (shifted != -100).nonzero()[:, 0])
    assert torch.equal(pack.targets, shifted[shifted != -100])
    assert torch.equal(flat[pack.predict + 1], pack.targets)  # the target is the very next token of the pack
    assert pack.supervised == sum(r.supervised for r in data) == int((shifted != -100).sum())
    assert torch.equal(pack.position_ids, torch.cat([torch.arange(n) for n in lengths]))
    assert pack.cu_seqlens.dtype == torch.int32 and pack.cu_seqlens.tolist() == [
        0,
        *itertools.accumulate(lengths),
    ]
    assert pack.lengths == tuple(lengths) and pack.tokens == len(flat)
    assert all(getattr(pack, n).dtype == torch.int64 for n in ("input_ids", "position_ids", "predict", "targets"))


def test_uids_name_tokens_wherever_they_are() -> None:
    """One number for each token of the data set, in any pack, order and epoch."""
    data = rows(0, LENGTHS)
    seen: dict[int, set[tuple[int, ...]]] = {}
    for epoch in range(2):
        for batch in loader().batches(epoch):
            for pack in batch.packs:
                cu = pack.cu_seqlens.tolist()
                for start, stop in itertools.pairwise(cu):
                    ids = tuple(pack.input_ids[start:stop].tolist())
                    number = next(i for i, r in enumerate(data) if tuple(r.input_ids) == ids)
                    seen.setdefault(number, set()).add(tuple(pack.token_uids[start:stop].tolist()))
    assert sorted(seen) == list(range(len(LENGTHS)))
    assert all(len(uids) == 1 for uids in seen.values())
    every = [u for uids in seen.values() for row in uids for u in row]
    assert len(set(every)) == len(every) == sum(LENGTHS)
    far = make_pack([data[0]], [200_000])  # beyond 32 bits, still apart
    assert far.token_uids.min() > 2**32 and not set(far.token_uids.tolist()) & set(every)


@pytest.mark.parametrize("tokens", [0, 45])
def test_any_step_can_be_the_first(tokens: int) -> None:
    """A fresh loader gives step s of epoch e as a run that came there by all steps before does."""
    whole = loader(tokens_per_step=tokens)
    run = {(e, s): b for e in range(3) for s, b in enumerate(whole.batches(e))}
    for epoch, step in sorted(run, reverse=True):
        assert same(loader(tokens_per_step=tokens).batch(epoch, step), run[epoch, step])
        assert same(whole.batch(epoch, step), run[epoch, step])


@pytest.mark.parametrize("tokens", [0, 45])
def test_an_epoch_is_every_row_once(tokens: int) -> None:
    """No row is lost or doubled, the last step is short, and each epoch has its own order."""
    made = loader(tokens_per_step=tokens)
    for epoch in range(3):
        steps = made.steps(epoch)
        assert sorted(r for step in steps for r in step) == list(range(len(LENGTHS)))
        batches = list(made.batches(epoch))
        assert [b.rows for b in batches] == [len(s) for s in steps]
        assert sum(b.tokens for b in batches) == sum(LENGTHS)
        assert sum(b.supervised for b in batches) == sum(r.supervised for r in rows(0, LENGTHS))
        assert all(p.tokens <= 40 for b in batches for p in b.packs)
        if not tokens:
            assert [b.rows for b in batches] == [4, 4, 3]
    assert len({tuple(made.order(e)) for e in range(5)}) == 5
    assert loader(seed=6).order(0).tolist() != made.order(0).tolist()
    assert loader(shuffle=False).order(3).tolist() == list(range(len(LENGTHS)))


def test_nothing_learned_and_one_token() -> None:
    """A row without a target and a row of one token are packed, and count nothing."""
    pack = make_pack([Encoded([5], [5]), Encoded([6, 7, 8], [-100] * 3), Encoded([9, 4], [-100, 4])], [0, 1, 2])
    assert pack.predict.tolist() == [4] and pack.targets.tolist() == [4] and pack.supervised == 1
    empty = make_pack([Encoded([6, 7], [-100] * 2)], [0])
    assert empty.predict.dtype == torch.int64 and empty.predict.shape == (0,)
