"""A decode step by hand against the plain layers over the same pages: scores, keys and values, tokens.

On a card the kernels run as they are, elsewhere in Triton's interpreter (float32 and float16 alone: it multiplies
bfloat16 wrongly).
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hand import DEVICE, adapters_on, decoder_of
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed (pip install triton runs these in its interpreter)")

from minitune.model import cache, decode, decode_rows, lora  # noqa: E402
from minitune.model import decode_rows_kernels as rk  # noqa: E402
from minitune.model.cache import DecodeLayout, PagedCache  # noqa: E402
from minitune.model.decode import Columns, DecodeStep, Split, Tile, why_not  # noqa: E402
from minitune.model.decoder import Decoder, DecoderConfig  # noqa: E402
from minitune.model.lora import Choice, LoraConfig, attach  # noqa: E402
from minitune.model.quantized import (  # noqa: E402
    dequantize,
    unpacked_by_kernel,
)

SMALL = 8  # tokens a page here, so that short texts fill several
LIMIT = 96
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
    logits_scaling=2.0,
)
GQA = replace(SHAPE, num_attention_heads=6, num_key_value_heads=2, tie_word_embeddings=False)
# Four bits are slow to interpret.
TINY = replace(
    SHAPE, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1
)
DYNAMIC = replace(SHAPE, max_position_embeddings=24, rope_scaling={"rope_type": "dynamic", "factor": 4.0})


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages and blocks so small that every loop turns more than once."""
    monkeypatch.setattr(cache, "PAGE", SMALL)
    monkeypatch.setattr(lora, "packable", lambda device, dtype: False)  # what oneDNN packs, no kernel reads
    monkeypatch.setattr(decode, "PART", 32)
    monkeypatch.setattr(decode, "ATTEND", {1: Split(16, 1, 4)})
    monkeypatch.setattr(decode, "ATTEND_LONG", {1: Split(16, 4, 4), 3: Split(16, 2, 4)})
    if DEVICE.type == "cuda":
        return
    tiles = {name: Tile(8 if "4 bits" in name else 64, 1) for name in decode.TILES}
    monkeypatch.setattr(decode, "TILES", tiles)
    parts = {"o": 3, "down": 2, "o, 4 bits": 2, "down, 4 bits": 2}
    small = {name: {1: decode_rows.Tile(64, 32, parts.get(name, 1), 1, 1)} for name in decode_rows.TILES}
    monkeypatch.setattr(decode_rows, "TILES", small)


class Held:
    """A cache with texts of these lengths in shuffled pages, and the columns of their slots; the last slot is idle."""

    def __init__(self, decoder: Decoder, lengths: list[int]):
        generator = torch.Generator().manual_seed(8)
        config, slots, most = decoder.config, len(lengths) + 2, LIMIT // SMALL
        free = (torch.randperm(slots * most, generator=generator) + 1).tolist()
        self.cache = PagedCache(config, slots * most, DEVICE, decoder.dtype)
        table = torch.zeros(slots, most, dtype=torch.int64)
        self.places = torch.randperm(slots - 1, generator=generator)[: len(lengths)].tolist()  # the row's slot
        position = torch.zeros(slots, dtype=torch.int64)
        for slot, length in zip(self.places, lengths, strict=True):
            table[slot] = torch.tensor([free.pop() for _ in range(most)])
            position[slot] = length
        for held in (self.cache.keys, self.cache.values):
            held.copy_(torch.randn(held.shape, generator=generator))
        token = torch.randint(0, config.vocab_size, (slots,), generator=generator)
        adapter = torch.tensor([(slot % 3) - 1 for slot in range(slots)])
        columns = (token, position, position // 2, adapter, table)
        self.columns = Columns(*(column.to(DEVICE) for column in columns))

    def plain(self, decoder: Decoder, choice: Choice | None) -> Tensor:
        """As `infer.slots` does it: scores of the rows, positions moved on."""
        rows, c = torch.tensor(self.places, device=DEVICE), self.columns
        position = c.position_S[rows]
        length = torch.maximum(c.prompt_S[rows], position + 1)
        groups = [(None, int(position.max()) // SMALL + 1)]
        layout = DecodeLayout(self.cache, c.table_SP[rows], position, length, groups)
        if choice is not None:
            choice.index_T = c.adapter_S[rows]
        scores = decoder.head(decoder.hidden(c.token_S[rows], position, layout))
        if choice is not None:
            choice.index_T = None
        c.position_S[rows] = position + 1
        c.token_S[rows] = scores.float().argmax(-1)
        return scores


def far(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@torch.no_grad()
def compare(
    decoder: Decoder, lengths: list[int], rows: int, long: bool, within: float, adapters: bool = False, steps: int = 3
) -> None:
    """Some steps of both: scores, what the cache holds, tokens, positions."""
    choice = adapters_on(decoder) if adapters else None
    want, got = Held(decoder, lengths), Held(decoder, lengths)
    step = DecodeStep(decoder, got.cache, got.columns, rows, LIMIT)
    step.slot_B[: len(lengths)] = torch.tensor(got.places, device=DEVICE)
    for _ in range(steps):
        expected = want.plain(decoder, choice)
        step.run(long, choice)
        step.take_best()
        assert far(step.scores[: len(lengths)], expected) < within
        for ours, plain in ((got.cache.keys, want.cache.keys), (got.cache.values, want.cache.values)):
            assert far(ours[:, 1:], plain[:, 1:]) < within
        sure = expected.float().topk(2).values.diff()[:, 0].abs() > 20 * within
        token, settled, finite = step.told[: len(lengths)].T
        assert torch.equal(token[sure].long(), expected.float().argmax(-1)[sure])
        assert settled.all() and finite.all()
        assert torch.equal(got.columns.position_S, want.columns.position_S)
        assert torch.equal(got.columns.token_S[got.places], token.long())
        got.columns.token_S.copy_(want.columns.token_S)


@pytest.mark.parametrize("lengths, rows", [([0], 1), ([37], 1), ([5, 61, 0], 4)])
@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("config", [SHAPE, GQA, DYNAMIC], ids=["mha", "gqa", "dynamic"])
def test_a_step_is_the_plain_layers(config: DecoderConfig, lengths: list[int], rows: int, long: bool) -> None:
    compare(decoder_of(config), lengths, rows, long, 1e-5)


@pytest.mark.parametrize("lengths, rows", [([37], 1), ([5, 61, 0], 4)])
def test_blocks_in_shared_memory(monkeypatch: pytest.MonkeyPatch, lengths: list[int], rows: int) -> None:
    monkeypatch.setattr(decode, "ATTEND", {1: Split(16, 1, 4, 3)})
    monkeypatch.setattr(decode, "ATTEND_LONG", {1: Split(16, 2, 4, 2)})
    for long in (False, True):
        compare(decoder_of(SHAPE), lengths, rows, long, 1e-5, steps=1)


@pytest.mark.parametrize("own, head", [(False, 32), (True, 2)])
def test_by_the_librarys_products(monkeypatch: pytest.MonkeyPatch, own: bool, head: int) -> None:
    """All of them, as on a small card, or the head's alone, as with many rows."""
    monkeypatch.setattr(decode_rows, "own", lambda device, dtype: own)
    monkeypatch.setattr(decode_rows, "HEAD_ROWS", head)
    compare(decoder_of(GQA), [5, 61, 0], 4, False, 1e-5)


@pytest.mark.parametrize("lengths, rows", [([37], 1), ([5, 61, 0], 4)])
def test_in_half_precision(lengths: list[int], rows: int) -> None:
    compare(decoder_of(SHAPE, torch.float16), lengths, rows, False, 4e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths, rows", [([37], 1), ([5, 61, 0], 4)])
@pytest.mark.parametrize("group", [0, 32])
def test_in_bfloat16(lengths: list[int], rows: int, group: int) -> None:
    compare(decoder_of(SHAPE, torch.bfloat16, group), lengths, rows, False, 3e-2)


@pytest.mark.parametrize("lengths, rows", [([37], 1), ([5, 61, 0], 4)])
@pytest.mark.parametrize("dtype, within", [(torch.float32, 1e-5), (torch.float16, 4e-3)])
def test_four_bit_weights(lengths: list[int], rows: int, dtype: torch.dtype, within: float) -> None:
    compare(decoder_of(TINY, dtype, group=32), lengths, rows, False, within, steps=1)


@pytest.mark.parametrize(
    "group, lengths, rows",
    [(0, [37], 1), (0, [2, 3, 37, 5], 1), (0, [5, 61, 0], 4), (32, [37], 1), (32, [5, 61, 0], 4)],
)
def test_adapters_by_row(group: int, lengths: list[int], rows: int) -> None:
    """None, one and another adapter, side by side and (slots 0, 1, 2 of four texts) alone."""
    if len(lengths) <= rows:
        compare(decoder_of(TINY, group=group), lengths, rows, False, 1e-5, adapters=True, steps=1)
        return
    decoder = decoder_of(TINY, group=group)
    choice = adapters_on(decoder)
    want, got = Held(decoder, lengths), Held(decoder, lengths)
    with torch.no_grad():
        expected = want.plain(decoder, choice)
        step = DecodeStep(decoder, got.cache, got.columns, 1, LIMIT)
        seen = set()
        for row, slot in enumerate(got.places):
            step.slot_B.fill_(slot)
            step.run(False, choice)
            assert far(step.scores, expected[row : row + 1]) < 1e-5
            seen.add(int(got.columns.adapter_S[slot]))
    assert seen == {-1, 0, 1}


@pytest.mark.parametrize("rows, inputs, outputs, splits, silu", [
    (5, 96, 70, 1, False), (16, 64, 130, 1, True), (32, 80, 64, 1, True), (64, 160, 50, 3, False), (3, 72, 40, 2, False),
])  # fmt: skip
@pytest.mark.parametrize("dtype, within", [(torch.float32, 1e-5), (torch.float16, 2e-3)])
def test_products_of_several_rows(
    rows: int, inputs: int, outputs: int, splits: int, silu: bool, dtype: torch.dtype, within: float
) -> None:
    """Rows, inputs and outputs that fill no tile, parts of which the last is short; against float64."""
    generator = torch.Generator().manual_seed(5)
    x, w = (torch.randn(n, inputs, generator=generator) for n in (rows, outputs * (1 + silu)))
    x, w = x.to(DEVICE, dtype), w.to(DEVICE, dtype) * 0.2
    y = torch.full((splits, rows, outputs) if splits > 1 else (rows, outputs + 3), 7.0, device=DEVICE)
    y = y if splits > 1 else y.to(dtype)[:, :outputs]
    rk._gemm[(-(-outputs // 32), splits)](
        x, w, y, w.stride(0), rows, outputs, y.stride(-2), 0.5, FULL=rows >= 16, X=inputs, SILU=silu, SPLITS=splits,
        BM=max(16, rows), BN=32, BK=32, EARLY=64, PDL=False, num_warps=4, num_stages=2,
    )  # fmt: skip
    want = x.double() @ w.double().T
    want = torch.nn.functional.silu(want[:, :outputs]) * want[:, outputs:] if silu else want
    assert far(y.double().sum(0) if splits > 1 else y, 0.5 * want) < within
    assert splits > 1 or (y.as_strided((rows, 3), y.stride(), outputs) == 7).all()


@pytest.mark.parametrize("parts", [0, 1, 3])
def test_a_norm_adds_the_parts(parts: int) -> None:
    generator = torch.Generator().manual_seed(6)
    x, weight = torch.randn(3, 72, generator=generator).to(DEVICE), torch.rand(72, generator=generator).to(DEVICE)
    back, n = torch.randn(max(parts, 1), 3, 72, generator=generator).to(DEVICE), torch.zeros_like(x)
    total = x.double() + 0.3 * back[:parts].double().sum(0)
    rk._add_norm[(3,)](x, back, weight, n, 3, 0.3, 1e-5, H=72, BH=128, PARTS=parts, PDL=False)
    assert far(x, total) < 1e-6
    assert far(n, total / (total.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_are_formed_as_the_plain_twin_forms_them(dtype: torch.dtype) -> None:
    """Bit for bit, groups of 32 and 128, of a number that no program's share divides."""
    generator = torch.Generator().manual_seed(2)
    for rows, columns, group in ((7, 160, 32), (3, 384, 128)):
        packed = torch.randint(-(2**31), 2**31, (rows, columns // 8), generator=generator).to(torch.int32)
        scale = torch.randn(rows, columns // group, generator=generator).to(dtype)
        expected = dequantize(packed, scale)
        assert torch.equal(unpacked_by_kernel(packed.to(DEVICE), scale.to(DEVICE), dtype).cpu(), expected)


def test_adapters_that_no_row_uses_change_nothing() -> None:
    decoder = decoder_of(SHAPE)
    held = Held(decoder, [9])
    bare, loaded = copy.deepcopy(held.columns), copy.deepcopy(held.columns)
    scores = []
    for columns in (bare, loaded):
        step = DecodeStep(decoder, held.cache, columns, 1, LIMIT)
        step.slot_B.fill_(held.places[0])
        step.run(False)
        scores.append(step.scores.clone())
        adapters_on(decoder)
    assert torch.equal(*scores)


def test_the_first_of_equals_and_broken_scores() -> None:
    decoder = decoder_of(SHAPE)
    held = Held(decoder, [1] * 4)
    step = DecodeStep(decoder, held.cache, held.columns, 4, LIMIT)
    step.slot_B.copy_(torch.arange(4))
    step.logits.zero_()
    step.logits[0, [40, 99]] = 5.0
    step.logits[1, 70] = float("nan")
    step.logits[2, 33] = float("inf")
    step.logits[3, 100] = 0.5
    step.take_best()
    assert step.told[:, 2].tolist() == [1, 0, 0, 1]
    assert [int(step.told[row, 0]) for row in (0, 2, 3)] == [40, 33, 100]
    assert 0 <= int(step.told[1, 0]) < SHAPE.vocab_size
    assert held.columns.token_S[:4].tolist() == step.told[:, 0].tolist()


def test_what_is_not_covered_is_said() -> None:
    decoder = decoder_of(SHAPE)
    assert why_not(decoder) == ""
    attach(decoder, LoraConfig())
    assert why_not(decoder) == "the decoder learns"
    decoder.requires_grad_(False)
    assert why_not(decoder) == "an adapter is neither merged nor stacked"
    assert why_not(decoder_of(replace(SHAPE, head_dim=48))) == "heads of 48 are not covered"
