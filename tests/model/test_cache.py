"""Attention through pages against the formula, in float64, over whole texts."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from minitune.model.attention import reference
from minitune.model.cache import PAGE, DecodeLayout, PagedCache, Part, PrefillLayout
from minitune.model.decoder import DecoderConfig

LAYERS, D, SCALE = 2, 16, 0.2


class Text:
    """Random queries, keys and values of a sequence, its pages in no order."""

    def __init__(self, length: int, heads: tuple[int, int], free: list[int], dtype: torch.dtype):
        self.q, self.k, self.v = (torch.randn(length, n, D).to(dtype) for n in (heads[0], heads[1], heads[1]))
        self.pages = [free.pop() for _ in range(-(-length // PAGE))]
        self.out = reference(self.q, self.k, self.v, [length], SCALE)
        self.done = 0


def attend(layout: PrefillLayout | DecodeLayout, texts: list[tuple[Text, int, int]]) -> Tensor:
    """In the second layer, after other keys in the first: layers share nothing."""
    q, k, v = (torch.cat([getattr(t, name)[a:b] for t, a, b in texts]) for name in "qkv")
    layout.for_layer(0).attend(q, k * 2, v * 3, SCALE)
    return layout.for_layer(1).attend(q, k, v, SCALE)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-5), (torch.bfloat16, 4e-2)])
def test_any_schedule_gives_the_formula(heads: tuple[int, int], dtype: torch.dtype, bound: float) -> None:
    """Eight texts of 1 to 400 tokens: chunks of any size in packs of any company, and single tokens in batches,
    which are rows of very different lengths (groups) and an idle one."""
    torch.manual_seed(0)
    chance = random.Random(0)
    config = DecoderConfig(9, 64, 64, LAYERS, *heads, D)
    cache = PagedCache(config, 40, torch.device("cpu"), dtype)
    free = chance.sample(range(1, 41), 40)
    texts = [Text(n, heads, free, dtype) for n in (1, 2, 63, 64, 65, 130, 250, 400)]
    table = torch.zeros(9, 7, dtype=torch.int64)
    for row, text in enumerate(texts):
        table[row, : len(text.pages)] = torch.tensor(text.pages)
    while any(t.done < len(t.q) for t in texts):
        left = [t for t in texts if t.done < len(t.q)]
        if chance.random() < 0.5:
            some = [
                (t, t.done, min(len(t.q), t.done + chance.randrange(1, 90)))
                for t in chance.sample(left, min(3, len(left)))
            ]
            parts = [Part(t.pages, a, b) for t, a, b in some]
            got = attend(PrefillLayout(cache, parts, torch.zeros(())), some)
        else:
            some = [(t, t.done, t.done + 1) for t in left]
            rows = torch.tensor([texts.index(t) for t in left])
            position = torch.tensor([t.done for t in left])
            lone = [(torch.tensor([i]), t.done // PAGE + 1) for i, t in enumerate(left)]
            groups = chance.choice(([(None, int(position.max()) // PAGE + 1)], lone))
            got = attend(DecodeLayout(cache, table[rows], position, position, groups), some)
        want = torch.cat([t.out[a:b] for t, a, b in some])
        assert (got.double() - want.double()).abs().max() <= bound
        for t, _, b in some:
            t.done = b
    assert (cache.keys[1, 0] == 0).all()  # nobody wrote to the page of nobody


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (8, 2)])
def test_company_and_padding_change_no_bit(heads: tuple[int, int], threads: int) -> None:
    """A row alone, in a batch, and in one that is padded to more pages: equal to the last bit in float32."""
    torch.manual_seed(1)
    config = DecoderConfig(9, 64, 64, LAYERS, *heads, D)
    cache = PagedCache(config, 80, torch.device("cpu"), torch.float32)
    free = list(range(1, 81))
    texts = [Text(n, heads, free, torch.float32) for n in (3, 64, 100, 500, 7, 65)]
    table = torch.zeros(6, 12, dtype=torch.int64)
    for row, text in enumerate(texts):
        table[row, : len(text.pages)] = torch.tensor(text.pages)
        attend(PrefillLayout(cache, [Part(text.pages, 0, len(text.q))], torch.zeros(())), [(text, 0, len(text.q))])
    last = torch.tensor([len(t.q) - 1 for t in texts])
    together = attend(
        DecodeLayout(cache, table, last, last, [(None, 12)]), [(t, len(t.q) - 1, len(t.q)) for t in texts]
    )
    for row, text in enumerate(texts):
        one = DecodeLayout(cache, table[row : row + 1], last[row : row + 1], last[:1], [(None, len(text.pages))])
        assert torch.equal(attend(one, [(text, len(text.q) - 1, len(text.q))])[0], together[row])


def test_memory_is_taken_when_it_is_written_to() -> None:
    """Room for 16 GiB costs nothing yet; a page copied is the page."""
    import resource

    config = DecoderConfig(9, 64, 64, 32, 32, 32, 128)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cache = PagedCache(config, 256, torch.device("cpu"), torch.float32)
    assert cache.keys.numel() * 4 > 8 * 2**30
    assert PagedCache.token_bytes(config, torch.float32) * PAGE * 257 == cache.keys.nbytes + cache.values.nbytes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB
    cache.values[3, 7, 5, 2] = 4.0
    cache.copy(7, 9)
    assert torch.equal(cache.values[:, 9], cache.values[:, 7]) and float(cache.values[3, 9].sum()) == 4 * 128
