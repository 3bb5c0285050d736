"""Prompts by hand against the plain layers over the same pages: scores, keys and values.

On a card the kernels run as they are, elsewhere in Triton's interpreter (float32 and float16 alone: it multiplies
bfloat16 wrongly).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hand import DEVICE, adapters_on, decoder_of
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed (pip install triton runs these in its interpreter)")

from minitune.model import cache, lora, prefill  # noqa: E402
from minitune.model.cache import PagedCache, Part, PrefillLayout  # noqa: E402
from minitune.model.decode import Columns  # noqa: E402
from minitune.model.decoder import Decoder, DecoderConfig  # noqa: E402
from minitune.model.lora import Choice  # noqa: E402
from minitune.model.prefill import Piece, Prefill  # noqa: E402

SMALL = 16  # tokens a page here, so that short texts fill several
LIMIT = 96
SLOTS = 5  # the last one is idle
SHAPE = DecoderConfig(
    vocab_size=101,
    hidden_size=96,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=3,
    head_dim=32,
    max_position_embeddings=LIMIT,
    embedding_multiplier=3.0,
    residual_multiplier=0.7,
    attention_multiplier=0.3,
    logits_scaling=2.0,
)
GQA = replace(SHAPE, num_attention_heads=6, num_key_value_heads=2, tie_word_embeddings=False)
DYNAMIC = replace(SHAPE, max_position_embeddings=24, rope_scaling={"rope_type": "dynamic", "factor": 4.0})
SHAPES = {"mha": SHAPE, "gqa": GQA, "dynamic": DYNAMIC}

# (slot, start, stop) of pieces, pack by pack: prompts of one and more pages together, one in chunks beside another,
# and one that begins where the cache has a beginning already.
ALONE = [[(2, 0, 41)]]
TOGETHER = [[(2, 0, 33), (0, 0, 1), (3, 0, 16)]]
CHUNKS = [[(1, 0, 20), (0, 0, 17)], [(1, 20, 37)], [(3, 16, 50), (1, 37, 70)]]
LENGTHS = (17, 70, 41, 50)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages and blocks so small that every loop turns more than once."""
    monkeypatch.setattr(cache, "PAGE", SMALL)
    monkeypatch.setattr(lora, "packable", lambda device, dtype: False)  # what oneDNN packs, no library multiplies
    monkeypatch.setattr(prefill, "ROWS", 16)
    monkeypatch.setattr(prefill, "SIZES", (48, 80))


class Held:
    """A cache full of other sequences' values in shuffled pages, the slots' columns, and a text a slot."""

    def __init__(self, decoder: Decoder, stale: float = float("nan")):
        generator = torch.Generator().manual_seed(8)
        most = LIMIT // SMALL
        self.cache = PagedCache(decoder.config, SLOTS * most, DEVICE, decoder.dtype)
        for held in (self.cache.keys, self.cache.values):
            held.copy_(torch.randn(held.shape, generator=generator))
        table = (torch.randperm(SLOTS * most, generator=generator) + 1).view(SLOTS, most)
        self.pages = table.tolist()
        for slot, length in enumerate(LENGTHS):  # behind a text's end lies what a broken sequence left
            for at in range(length, LIMIT):
                self.cache.values[:, self.pages[slot][at // SMALL], at % SMALL] = stale
                self.cache.keys[:, self.pages[slot][at // SMALL], at % SMALL] = stale
        table[-1] = 0
        token, position = torch.zeros(SLOTS, dtype=torch.int64), torch.zeros(SLOTS, dtype=torch.int64)
        prompt = torch.tensor([*LENGTHS, 0])
        adapter = torch.tensor([(slot % 3) - 1 for slot in range(SLOTS)])
        self.columns = Columns(*(c.to(DEVICE) for c in (token, position, prompt, adapter, table)))
        self.texts = torch.randint(0, decoder.config.vocab_size, (SLOTS, LIMIT), generator=generator).tolist()

    def pieces(self, pack: list[tuple[int, int, int]]) -> list[Piece]:
        return [Piece(s, a, self.texts[s][a:b], s == 0 or b == LENGTHS[s]) for s, a, b in pack]

    def plain(self, decoder: Decoder, pack: list[tuple[int, int, int]], choice: Choice | None) -> Tensor | None:
        """As `infer.slots` does it."""
        pieces = self.pieces(pack)
        ids = torch.tensor([i for piece in pieces for i in piece.ids], device=DEVICE)
        position = torch.cat([torch.arange(a, b) for _, a, b in pack]).to(DEVICE)
        slot = torch.tensor([s for s, a, b in pack for _ in range(a, b)], device=DEVICE)
        length = torch.maximum(self.columns.prompt_S[slot], position + 1)
        layout = PrefillLayout(self.cache, [Part(self.pages[s], a, b) for s, a, b in pack], length)
        if choice is not None:
            choice.index_T = self.columns.adapter_S[slot]
        h = decoder.hidden(ids, position, layout)
        if choice is not None:
            choice.index_T = None
        rows, at = [], -1
        for piece in pieces:
            at += len(piece.ids)
            rows += [at] * piece.asked
        return decoder.head(h[rows]) if rows else None


def far(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@torch.no_grad()
def compare(
    decoder: Decoder,
    packs: list[list[tuple[int, int, int]]],
    within: float,
    adapters: bool = False,
    recorded: bool = False,
) -> None:
    """Scores of every pack, and what the cache holds after it: the new tokens' keys and values, and all else as
    before."""
    choice = adapters_on(decoder) if adapters else None
    want, got = Held(decoder), Held(decoder)
    by_hand = Prefill(decoder, got.cache, got.columns, LIMIT, choice)
    while recorded and by_hand.prepare():
        pass
    replays: list[int] = []
    for size, one in by_hand.recorded.items():
        one.replay = lambda replay=one.replay, size=size[0]: replays.append(size) or replay()
    want.cache.keys[:, 0], want.cache.values[:, 0] = got.cache.keys[:, 0], got.cache.values[:, 0]
    told = 0
    for pack in packs:
        expected = want.plain(decoder, pack, choice)
        scores = by_hand.run(got.pieces(pack), adapters)
        if expected is None:
            assert scores is None
        else:
            assert scores is not None and scores.shape == expected.shape
            assert far(scores, expected) < within
            told += len(expected)
        for ours, plain in ((got.cache.keys, want.cache.keys), (got.cache.values, want.cache.values)):
            assert torch.equal(ours.isnan(), plain.isnan())
            assert far(ours.nan_to_num(), plain.nan_to_num()) < within
    assert len(replays) == len(packs) * recorded
    assert told == sum(piece.asked for pack in packs for piece in got.pieces(pack)) > 0


@pytest.mark.parametrize("packs", [ALONE, TOGETHER, CHUNKS], ids=["alone", "together", "chunks"])
@pytest.mark.parametrize("shape", SHAPES)
def test_prompts_are_the_plain_layers(shape: str, packs: list[list[tuple[int, int, int]]]) -> None:
    compare(decoder_of(SHAPES[shape]), packs, 1e-5)


@pytest.mark.parametrize("packs", [TOGETHER, CHUNKS], ids=["together", "chunks"])
def test_recorded_packs_are_padded(packs: list[list[tuple[int, int, int]]]) -> None:
    """To two sizes; what pads is kept nowhere, not even in the page of nobody."""
    compare(decoder_of(SHAPE), packs, 1e-5, recorded=True)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group", [0, 32])
def test_recorded_in_bfloat16(shape: str, group: int) -> None:
    """By graphs: each pack's numbers are its own."""
    compare(decoder_of(SHAPES[shape], torch.bfloat16, group), CHUNKS, 3e-2, recorded=True)


def test_in_half_precision() -> None:
    compare(decoder_of(GQA, torch.float16), CHUNKS, 4e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("shape", SHAPES)
def test_in_bfloat16(shape: str, group: int) -> None:
    compare(decoder_of(SHAPES[shape], torch.bfloat16, group), CHUNKS, 3e-2)


def test_four_bit_weights() -> None:
    compare(decoder_of(SHAPE, group=32), CHUNKS, 1e-5)


@pytest.mark.parametrize("packs", [TOGETHER, CHUNKS], ids=["together", "chunks"])
@pytest.mark.parametrize("recorded", [False, True])
def test_adapters_by_piece(packs: list[list[tuple[int, int, int]]], recorded: bool) -> None:
    """None, one and another adapter, side by side; left unchosen afterwards."""
    decoder = decoder_of(SHAPE)
    compare(decoder, packs, 1e-5, adapters=True, recorded=recorded)
    stacked = next(linear.lora for linear in decoder.linears() if linear.lora is not None)
    assert stacked.choice.index_T is None  # type: ignore[union-attr]


@torch.no_grad()
def test_company_does_not_matter() -> None:
    """A prompt's scores beside others and alone."""
    decoder = decoder_of(SHAPE)
    alone, together = Held(decoder), Held(decoder)
    (piece,) = alone.pieces([(2, 0, 41)])
    one = Prefill(decoder, alone.cache, alone.columns, LIMIT).run([piece])
    pieces = [*together.pieces([(3, 0, 50), (0, 0, 1)]), piece]
    many = Prefill(decoder, together.cache, together.columns, LIMIT).run(pieces)
    assert one is not None and many is not None and far(many[2], one[0]) < 1e-5
    assert far(many[1], one[0]) > 0.1  # the scores of different texts are far apart
