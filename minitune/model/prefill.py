"""Prompts by hand: several at once, laid end to end, in nine launches a layer and with nothing waited for.

What `Decoder.hidden` and `head` compute with `cache.PrefillLayout`: the multiplications are the library's, what lies
between them is a kernel each (`prefill_kernels`, `fused_kernels`). The plain layers make some fifty launches a layer,
which take a host longer than the card needs to compute a prompt of some hundred tokens. Even nine do (11 ms of 5 at
512): packs of up to 1,024 tokens are recorded as CUDA graphs, a size each, and padded to one.

Legend: T packed tokens, R rows whose scores are asked for, H hidden, N query heads, K key/value heads, D head width,
F = D / 2, V vocabulary, S slots, P pages of a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minitune.model import cache as pages
from minitune.model import fused_kernels, prefill_kernels
from minitune.model.cache import PagedCache
from minitune.model.decode import Columns
from minitune.model.decoder import Decoder, Linear
from minitune.model.fused_ops import next_power_of_2
from minitune.model.kernels import launch, with_padding
from minitune.model.lora import Choice

ROWS, WARPS = 64, 4  # query rows of an attention program, and its warps
KEYS = 64  # keys of a block, at most a page
SIZES = (32, 64, 128, 256, 384, 512, 768, 1024)  # tokens of a recorded pack
FEW = 8  # pieces of one
ALIGNED = 16  # numbers: parts of one copy begin at multiples, so that a kernel is compiled once


class Piece(NamedTuple):
    """The next ids of a slot's sequence, which stand at start, start + 1, …; asked: whether the scores behind the
    last one are wanted."""

    slot: int
    start: int
    ids: Sequence[int]
    asked: bool


class Pack(NamedTuple):
    """Pieces on the device: ids, positions and slots [T], blocks [4 ·] (`prefill_kernels._attend`), rows [R]."""

    id_T: Tensor
    position_T: Tensor
    slot_T: Tensor
    block: Tensor
    row_R: Tensor


Lists = tuple[list[int], list[int], list[int], list[int], list[int]]  # a pack's, on the host


def _pack(held: Tensor, lists: Lists) -> Pack:
    """The lists' places in one tensor (`Prefill._host`)."""
    parts, at = [], 0
    for part in lists:
        parts.append(held[at : at + len(part)])
        at += -(-len(part) // ALIGNED) * ALIGNED
    return Pack(*parts)


@dataclass
class Recorded:
    """A graph of one size: where its pack lies, its scores [FEW, V] after a replay."""

    held: Tensor
    scores: Tensor
    replay: Callable[[], None]


class Room(NamedTuple):
    """What a layer writes, each [T, width]: the residual stream, its norm, q|k|v, attention's output, what goes back
    into the stream, gate|up, their product, 1/rms."""

    x: Tensor
    n: Tensor
    qkv: Tensor
    y: Tensor
    back: Tensor
    gate_up: Tensor
    act: Tensor
    rstd: Tensor


class Prefill:
    """Reads prompts into the cache's pages; `columns` says which are a slot's. `limit`: tokens of a sequence at most.

    For decoders of which `decode.why_not` says nothing. Adapters are those that are stacked (`lora.stack`); four-bit
    weights are formed and multiplied.
    """

    def __init__(self, decoder: Decoder, cache: PagedCache, columns: Columns, limit: int, choice: Choice | None = None):
        self.choice, self.limit = choice, limit
        self.decoder, self.cache, self.columns = decoder, cache, columns
        config = decoder.config
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.rows = ROWS if decoder.dtype.itemsize == 2 else min(ROWS, 16)  # what registers hold
        self.ready = self.asked = False  # compiled; a prompt missed something that can be prepared
        self.cuda, self.idle = decoder.device.type == "cuda", columns.token_S.shape[0] - 1
        self.recorded: dict[tuple[int, bool], Recorded] = {}
        kinds = (False, True)[: 1 + (choice is not None)]
        self.left = [(size, adapters) for adapters in kinds for size in SIZES if size <= limit]
        self._pool: Any = None
        layers: Any = decoder.layers
        self.layers: list[tuple[Any, ...]] = [
            (y.attn_norm, y.attn.qkv, y.attn.o, y.mlp_norm, y.mlp.gate_up, y.mlp.down) for y in layers
        ]
        self.angles: tuple[Tensor, Tensor] | None = None
        if not decoder.rope.needs_length:
            cos, sin = decoder.rope(torch.arange(limit, device=decoder.device))
            self.angles = cos[:, 0].contiguous(), sin[:, 0].contiguous()

    def prepare(self) -> bool:
        """Compiles all kernels on the idle slot's page, then it is `ready`; at each further call records a size more.
        False: all is there."""
        self.asked = False
        if not self.ready:
            if self.cuda:
                self.run([Piece(self.idle, 0, [0] * min(pages.PAGE, self.limit), True)])
            self.ready = True
            return True
        if not self.left:
            return False
        size, adapters = self.left[0]
        self.recorded[size, adapters] = self._record(size, adapters)
        self.left.remove((size, adapters))  # now: what is broken off is recorded later
        return True

    def run(self, pieces: Sequence[Piece], adapters: bool = False) -> Tensor | None:
        """Scores [R, V] of the pieces that are asked for, None where none is; all pages of the pieces are in the
        table. adapters: whether a row may have one. The scores are overwritten by the next run."""
        lists = self._listed(pieces)
        key = next((size for size in SIZES if size >= len(lists[0])), 0), adapters
        if len(pieces) <= FEW and key in self.recorded:
            recorded, asked = self.recorded[key], sum(piece.asked for piece in pieces)
            recorded.held.copy_(self._host(self._padded(lists, key[0])), non_blocking=True)
            recorded.replay()
            return recorded.scores[:asked] if asked else None
        if len(pieces) <= FEW and key in self.left:
            self.left.remove(key)
            self.left.insert(0, key)
            self.asked = True
        return self._scores(_pack(self._host(lists).to(self.decoder.device, non_blocking=True), lists), adapters)

    def _scores(self, pack: Pack, adapters: bool) -> Tensor | None:
        choice = self.choice if adapters else None
        if choice is None:
            return self._layers(pack, None)
        choice.index_T = self.columns.adapter_S[pack.slot_T]
        try:
            return self._layers(pack, choice)
        finally:
            choice.index_T = None

    def _record(self, size: int, adapters: bool) -> Recorded:
        """The graph of a size; off a card (tests) the work itself."""
        lists = self._padded(self._listed([]), size)
        held = self._host(lists).to(self.decoder.device)
        recorded, pack = Recorded(held, held, lambda: None), _pack(held, lists)

        def work() -> None:
            scores = self._scores(pack, adapters)
            assert scores is not None
            recorded.scores = scores

        recorded.replay = work
        if self.cuda:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                work()
            torch.cuda.current_stream().wait_stream(side)
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                work()
            recorded.replay = graph.replay
        return recorded

    def _listed(self, pieces: Sequence[Piece]) -> Lists:
        blocks: list[tuple[int, int, int, int]] = []
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        rows: list[int] = []
        for slot, start, new, asked in pieces:
            for at in range(0, len(new), self.rows):
                blocks.append((len(ids) + at, min(self.rows, len(new) - at), start + at, slot))
            ids += new
            positions += range(start, start + len(new))
            slots += [slot] * len(new)
            if asked:
                rows.append(len(ids) - 1)
        blocks.sort(key=lambda block: -block[2])  # those with most to read first: they end last
        return ids, positions, slots, [number for block in blocks for number in block], rows

    def _padded(self, lists: Lists, size: int) -> Lists:
        """With tokens that are kept nowhere (position -1), blocks without rows and rows that nobody asks for."""
        blocks = 4 * (-(-size // self.rows) + FEW)
        wanted = ((size, 0), (size, -1), (size, self.idle), (blocks, 0), (FEW, 0))
        ids, positions, slots, block, rows = (
            [*numbers, *[filler] * (count - len(numbers))]
            for numbers, (count, filler) in zip(lists, wanted, strict=True)
        )
        return ids, positions, slots, block, rows

    def _host(self, lists: Lists) -> Tensor:
        """One tensor to be copied, each list at a multiple of ALIGNED."""
        numbers: list[int] = []
        for part in lists:
            numbers += part
            numbers += [0] * (-len(part) % ALIGNED)
        return torch.tensor(numbers, pin_memory=self.cuda)

    def _room(self, tokens: int) -> Room:
        config, query = self.decoder.config, self.heads * self.head_dim
        hidden, width = config.hidden_size, config.intermediate_size
        every = query + 2 * self.kv_heads * self.head_dim

        def made(*widths: int, kind: torch.dtype = self.decoder.dtype) -> list[Tensor]:
            """[tokens, width] of each, in the same memory."""
            flat = torch.empty(tokens * max(widths), dtype=kind, device=self.decoder.device)
            return [flat[: tokens * width].view(tokens, width) for width in widths]

        # attention's and the MLP's are never needed at once
        (x,), (n,), (back,), (rstd,) = made(hidden), made(hidden), made(hidden), made(1, kind=torch.float32)
        (qkv, gate_up), (y, act) = made(every, 2 * width), made(query, width)
        return Room(x, n, qkv, y, back, gate_up, act, rstd)

    def _layers(self, pack: Pack, choice: Choice | None) -> Tensor | None:
        decoder, room = self.decoder, self._room(len(pack.id_T))
        torch.index_select(decoder.embed.weight, 0, pack.id_T, out=room.x)
        room.x.mul_(decoder.config.embedding_multiplier)
        cos_TF, sin_TF = self._angles(pack)
        keys, values = self.cache.keys.unbind(), self.cache.values.unbind()
        back: Tensor | None = None
        for index, (attn_norm, qkv, o, mlp_norm, gate_up, down) in enumerate(self.layers):
            self._norm(room, back, attn_norm)
            both = _product(qkv, room.n, room.qkv)
            self._keep(pack, both, cos_TF, sin_TF, keys[index], values[index])
            if index == len(self.layers) - 1 and not len(pack.row_R):
                return None
            self._attend(pack, both, cos_TF, sin_TF, keys[index], values[index], room.y)
            if index == len(self.layers) - 1:  # what follows goes on with the rows that are asked for
                room = self._asked(room, pack.row_R)
                if choice is not None and choice.index_T is not None:
                    choice.index_T = choice.index_T[pack.row_R]
            self._norm(room, _product(o, room.y, room.back), mlp_norm)
            self._silu_mul(_product(gate_up, room.n, room.gate_up), room.act)
            back = _product(down, room.act, room.back)
        self._norm(room, back, decoder.norm)
        h_RH = room.n / decoder.config.logits_scaling
        head_WH = with_padding(decoder.head_weight, decoder.padding)
        return torch.mm(h_RH, head_WH.t())[:, : decoder.config.vocab_size]

    def _asked(self, room: Room, row_R: Tensor) -> Room:
        """The room for these rows alone."""
        some = Room(*(t[: len(row_R)] for t in room))
        return some._replace(x=room.x[row_R], y=room.y[row_R])

    def _angles(self, pack: Pack) -> tuple[Tensor, Tensor]:
        """cos, sin [T, F] of each token's position."""
        if self.angles is not None:
            cos, sin = self.angles
            return cos[pack.position_T], sin[pack.position_T]
        length_T = torch.maximum(self.columns.prompt_S[pack.slot_T], pack.position_T + 1)
        cos, sin = self.decoder.rope(pack.position_T, length_T)
        return cos[:, 0].contiguous(), sin[:, 0].contiguous()

    def _norm(self, room: Room, back: Tensor | None, norm: Any) -> None:
        """x += the residual multiplier · back; n = norm(x)."""
        rows, hidden = room.x.shape
        launch(
            fused_kernels._norm_in, (rows,),
            room.x, room.x if back is None else back, self.decoder.config.residual_multiplier, norm.weight, room.x,
            room.n, room.x, room.rstd, norm.eps,
            H=hidden, R=0, SUM=back is not None, STRIP=False, BH=next_power_of_2(hidden), num_warps=4,
        )  # fmt: skip

    def _keep(self, pack: Pack, qkv: Tensor, cos_TF: Tensor, sin_TF: Tensor, keys: Tensor, values: Tensor) -> None:
        """New keys and values into their pages."""
        table = self.columns.table_SP
        launch(
            prefill_kernels._keep, (qkv.shape[0],),
            qkv, cos_TF, sin_TF, pack.position_T, pack.slot_T, table, keys, values, table.stride(0),
            N=self.heads, K=self.kv_heads, D=self.head_dim, PAGE=pages.PAGE, BK=next_power_of_2(self.kv_heads),
            num_warps=4,
        )  # fmt: skip

    def _attend(
        self, pack: Pack, qkv: Tensor, cos_TF: Tensor, sin_TF: Tensor, keys: Tensor, values: Tensor, y: Tensor
    ) -> None:
        """Each token attends to its sequence up to itself, through pages."""
        table, row_bytes = self.columns.table_SP, self.head_dim * qkv.dtype.itemsize
        launch(
            prefill_kernels._attend, (self.heads, len(pack.block) // 4),
            qkv, cos_TF, sin_TF, pack.block, table, keys, values, y, table.stride(0),
            self.decoder.config.attention_scale * math.log2(math.e),
            N=self.heads, K=self.kv_heads, D=self.head_dim, PAGE=pages.PAGE, B=self.rows, M=min(KEYS, pages.PAGE),
            num_warps=WARPS, num_stages=max(1, min(3, 512 // row_bytes)),  # what shared memory holds
        )  # fmt: skip

    def _silu_mul(self, gate_up: Tensor, act: Tensor) -> None:
        rows, width = act.shape
        launch(
            fused_kernels._silu_mul, (rows, -(-width // 1024)), gate_up, act, rows, F=width, R=0, B=1024, num_warps=4
        )


def _product(linear: Linear, x: Tensor, out: Tensor) -> Tensor:
    """x wᵀ, with each row's adapter; in `out` where there is none."""
    torch.mm(x, linear.weight.t(), out=out)
    return out if linear.lora is None else linear.lora(x, out, None)
