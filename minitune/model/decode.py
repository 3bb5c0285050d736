"""A decode step by hand: the next token's scores of a few sequences at once, all shapes static, nothing waited for.

What `Decoder.hidden` and `head` compute with `cache.DecodeLayout`, in few launches and with sums in float32 up to the
next stored value: five a layer for one row (`decode_kernels`), seven for more (`decode_rows`). Rows are slots:
everything about a row lies in columns by slot (`Columns`), which the step reads and moves on, so that it can be
captured once and replayed (`infer.captured`).

Legend: B rows, S slots, P pages of a sequence, H hidden, X = (N + 2 K) · D, F FFN width, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minitune.model import cache as pages
from minitune.model import decode_attention, decode_rows, fused_kernels, kernels
from minitune.model import decode_kernels as dk
from minitune.model.cache import PagedCache
from minitune.model.decoder import Decoder, Linear
from minitune.model.fused_ops import next_power_of_2
from minitune.model.lora import Choice, Lora
from minitune.model.quantized import Int4Linear

PDL = True  # on cards that have it (Hopper and later)
ONE = 0x3F800000  # the bits of 1.0 in float32
PART = 4096  # scores a program looks at for the likeliest


class Tile(NamedTuple):
    """Outputs of a program, and its warps. `bench/decode_card.py --tune` compares them on a card."""

    rows: int
    warps: int = 4


TILES = {
    "qkv": Tile(4, 4),
    "o": Tile(2, 4),
    "gate_up": Tile(2, 4),
    "down": Tile(2, 8),
    "head": Tile(8, 4),
    "qkv, 4 bits": Tile(4, 2),
    "o, 4 bits": Tile(4, 2),
    "gate_up, 4 bits": Tile(4, 1),
    "down, 4 bits": Tile(4, 1),
    "adapter's A": Tile(1, 4),
}


class Split(NamedTuple):
    """Keys a block, programs that a row's keys are dealt to, warps of one, and its blocks under way (1: the next one
    lies in registers; more, for heads with keys of their own: in shared memory)."""

    keys: int
    splits: int
    warps: int
    stages: int = 1


# By rows (the largest that is not above) for contexts that fit into LONG tokens, and for longer ones.
LONG = 512
ATTEND = {1: Split(128, 1, 4), 8: Split(64, 1, 4), 64: Split(16, 1, 1)}
ATTEND_LONG = {1: Split(64, 8, 4), 16: Split(64, 2, 4), 32: Split(64, 1, 4)}


@dataclass(frozen=True)
class Columns:
    """What the engine keeps for each slot: newest token, its position, the prompt's length, adapter (-1: none) [S];
    page table [S, P]. The last slot is idle: rows that pad a batch lie there, at position 0 of page 0."""

    token_S: Tensor
    position_S: Tensor
    prompt_S: Tensor
    adapter_S: Tensor
    table_SP: Tensor


def why_not(decoder: Decoder) -> str:
    """Why a decoder's steps can't run by hand, in a few words; "" where they can."""
    config, device = decoder.config, decoder.device
    if reason := kernels.why_not(device):
        return reason
    if config.head_dim not in (16, 32, 64, 128) or config.num_attention_heads % config.num_key_value_heads:
        return f"heads of {config.head_dim} are not covered"
    if decoder.training or any(p.requires_grad for p in decoder.parameters()):
        return "the decoder learns"
    if any(isinstance(linear.lora, Lora) for linear in decoder.linears()):
        return "an adapter is neither merged nor stacked"
    return ""


class DecodeStep:
    """One step over `rows` rows; `slot_B` says which. `limit`: tokens of a sequence at most."""

    def __init__(self, decoder: Decoder, cache: PagedCache, columns: Columns, rows: int, limit: int):
        self.decoder, self.cache, self.columns, self.rows = decoder, cache, columns, rows
        self.layers: Any = decoder.layers
        config, device, dtype = decoder.config, decoder.device, decoder.dtype
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
        self.pdl = PDL and hopper
        self.more: dict[str, Any] = {"launch_pdl": True} if self.pdl else {}
        hidden, width, F = config.hidden_size, config.intermediate_size, config.head_dim // 2

        def made(*shape: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.zeros(shape, dtype=kind, device=device)

        idle = columns.token_S.shape[0] - 1
        self.slot_B = torch.full((rows,), idle, device=device)
        self.at_B = made(rows, kind=torch.int64)
        self.pages = made(rows, columns.table_SP.shape[1], kind=torch.int64)
        self.cos, self.sin = made(rows, F, kind=torch.float32), made(rows, F, kind=torch.float32)
        self.x, self.n, self.h = (made(rows, hidden) for _ in range(3))
        self.qkv = made(rows, (self.heads + 2 * self.kv_heads) * self.head_dim)
        self.y, self.back = made(rows, self.heads * self.head_dim), made(rows, hidden)
        self.gate_up, self.act = made(rows, 2 * width), made(rows, width)
        self.own = rows > 1 and decode_rows.own(device, dtype)
        self.parts = made(decode_rows.most_parts(rows), rows, hidden, kind=torch.float32)
        self.logits = made(rows, config.vocab_size + decoder.padding)
        parts = -(-config.vocab_size // PART)
        self.best, self.best_id = made(rows, parts, kind=torch.float32), made(rows, parts, kind=torch.int64)
        self.told = made(rows, 3, kind=torch.float64)
        splits = max(_of(table, rows).splits for table in (ATTEND, ATTEND_LONG))
        self.part = made(rows, self.heads, splits, self.head_dim, kind=torch.float32)
        self.mass = made(rows, self.heads, splits, 2, kind=torch.float32)
        widths = [linear.lora.A.shape[0] for linear in decoder.linears() if linear.lora is not None]
        self.narrow = made(1, max(widths, default=1))
        self.angles = self.cos, self.sin
        if not decoder.rope.needs_length:
            cos, sin = decoder.rope(torch.arange(limit, device=device))
            self.angles = cos[:, 0].contiguous(), sin[:, 0].contiguous()

    @property
    def scores(self) -> Tensor:
        """[B, V] of the last step."""
        return self.logits[:, : self.decoder.config.vocab_size]

    def run(self, long: bool, choice: Choice | None = None) -> None:
        """Runs each row's newest token: its key and value into the page, the next token's scores into `logits`; the
        row's position moves on. long: a row may hold more than LONG tokens. choice: None where no row has one."""
        self._enter()
        if choice is not None:
            choice.index_T = self.columns.adapter_S[self.slot_B]
        try:
            if self.rows == 1:
                self._one(long, choice is not None)
            else:
                decode_rows.run(self, long, choice is not None)
        finally:
            if choice is not None:
                choice.index_T = None

    def take_best(self) -> None:
        """The likeliest token of each row into its slot, and into `told` [B, 3]: token, settled, scores finite."""
        size, parts = self.decoder.config.vocab_size, self.best.shape[1]
        dk._best_of_part[(self.rows, parts)](
            self.logits, self.best, self.best_id, self.logits.stride(0), V=size, BV=PART, num_warps=4
        )
        dk._take_best[(self.rows,)](
            self.best, self.best_id, self.slot_B, self.columns.token_S, self.told, parts,
            V=size, BP=next_power_of_2(parts), num_warps=1,
        )  # fmt: skip

    def _enter(self) -> None:
        decoder, columns = self.decoder, self.columns
        hidden, table = decoder.config.hidden_size, not decoder.rope.needs_length
        dk._enter[(self.rows,)](
            self.slot_B, columns.token_S, columns.position_S, columns.table_SP, decoder.embed.weight, *self.angles,
            self.x, self.at_B, self.pages, self.cos, self.sin, columns.table_SP.stride(0),
            decoder.config.embedding_multiplier, columns.token_S.shape[0] - 1,
            H=hidden, F=self.head_dim // 2, P=self.pages.shape[1], BH=next_power_of_2(hidden),
            BF=next_power_of_2(self.head_dim // 2), BP=next_power_of_2(self.pages.shape[1]),
            TABLE=table, num_warps=4,
        )  # fmt: skip
        if not table:
            length_B = torch.maximum(columns.prompt_S[self.slot_B], self.at_B + 1)
            cos, sin = decoder.rope(self.at_B, length_B)
            _put(cos[:, 0], self.cos)
            _put(sin[:, 0], self.sin)

    def _one(self, long: bool, adapters: bool) -> None:
        decoder, gain = self.decoder, self.decoder.config.residual_multiplier
        for index, layer in enumerate(self.layers):
            attn, mlp = layer.attn, layer.mlp
            self._multiply("qkv", self.x, attn.qkv, self.qkv, norm=layer.attn_norm)
            self._adapt(adapters, self.x, attn.qkv, self.qkv, norm=layer.attn_norm)
            self._attend(index, long)
            self._multiply("o", self.y, attn.o, self.x, gain=gain)
            self._adapt(adapters, self.y, attn.o, self.x, gain)
            if adapters and mlp.gate_up.lora is not None:
                self._multiply("gate_up", self.x, mlp.gate_up, self.gate_up, norm=layer.mlp_norm)
                self._adapt(adapters, self.x, mlp.gate_up, self.gate_up, norm=layer.mlp_norm)
                self._silu_mul()
            else:
                self._multiply("gate_up", self.x, mlp.gate_up, self.act, norm=layer.mlp_norm, silu=True)
            self._multiply("down", self.act, mlp.down, self.x, gain=gain)
            self._adapt(adapters, self.act, mlp.down, self.x, gain)
        scaling, size = 1 / decoder.config.logits_scaling, decoder.config.vocab_size
        self._gemv("head", self.x, decoder.head_weight, self.logits[:, :size], scaling, decoder.norm, False, False)

    def _adapt(self, adapters: bool, x: Tensor, linear: Linear, y: Tensor, gain: float = 1.0, norm: Any = None) -> None:
        """y += gain · B A x of one row's adapter; of norm(x) where there is one."""
        stacked: Any = linear.lora
        if not adapters or stacked is None:
            return
        columns = stacked.owner_C.shape[0]
        self._gemv("adapter's A", x, stacked.A, self.narrow[:, :columns], 1.0, norm, False, False)
        dk._lora_out[(-(-y.shape[1] // 64),)](
            self.narrow, stacked.B, stacked.owner_C, stacked.scale_C, self.slot_B, self.columns.adapter_S, y,
            y.shape[1], gain, C=columns, BC=next_power_of_2(columns), BN=64, PDL=self.pdl, num_warps=4, **self.more,
        )  # fmt: skip

    def _multiply(
        self, name: str, x: Tensor, linear: Linear, y: Tensor, gain: float = 1.0, norm: Any = None, silu: bool = False
    ) -> None:
        """y = gain · x wᵀ, to what is there where there is no norm; of norm(x) where there is one."""
        add = norm is None
        if not isinstance(linear, Int4Linear):
            return self._gemv(name, x, linear.weight, y, gain, norm, add, silu)
        tile = TILES[f"{name}, 4 bits"]
        pair = torch.int32 if x.dtype.itemsize == 2 else torch.int64
        scale = norm.weight if norm is not None else x
        inputs, outputs = x.shape[1], y.shape[1]
        kernels.launch(
            dk._gemv4, (-(-outputs // tile.rows),),
            x.view(pair), scale.view(pair), linear.weight_packed, linear.weight_scale, y, outputs,
            norm.eps if norm is not None else 0.0, gain, ONE,
            X=inputs, GROUP=inputs // linear.weight_scale.shape[1], NORM=norm is not None, ADD=add, SILU=silu,
            BN=tile.rows, BW=32 * tile.warps, PDL=self.pdl, num_warps=tile.warps, **self.more,
        )  # fmt: skip

    def _gemv(
        self, name: str, x: Tensor, weight: Tensor, y: Tensor, gain: float, norm: Any, add: bool, silu: bool
    ) -> None:
        tile, outputs = TILES[name], y.shape[1]
        kernels.launch(
            dk._gemv, (-(-outputs // tile.rows),),
            x, norm.weight if norm is not None else x, weight, y, weight.stride(0), outputs,
            norm.eps if norm is not None else 0.0, gain,
            X=x.shape[1], NORM=norm is not None, ADD=add, SILU=silu, BN=tile.rows, BK=256 * tile.warps,
            PDL=self.pdl, num_warps=tile.warps, **self.more,
        )  # fmt: skip

    def _attend(self, index: int, long: bool) -> None:
        """y of qkv: the layer's attention; the new keys and values go into their pages."""
        N, K, D = self.heads, self.kv_heads, self.head_dim
        split = _of(ATTEND_LONG if long else ATTEND, self.rows)
        scale = self.decoder.config.attention_scale * math.log2(math.e)
        decode_attention._attend[(self.rows * K, split.splits)](
            self.qkv, self.cos, self.sin, self.at_B, self.pages, self.cache.keys[index], self.cache.values[index],
            self.y, self.part, self.mass, scale,
            N=N, K=K, D=D, P=self.pages.shape[1], PAGE=pages.PAGE, M=split.keys, SPLITS=split.splits,
            Q=1 if N == K else max(16, next_power_of_2(N // K)), STAGES=split.stages, PDL=self.pdl,
            num_warps=split.warps, num_stages=1, **self.more,
        )  # fmt: skip
        if split.splits > 1:
            decode_attention._merge[(self.rows * N,)](
                self.part, self.mass, self.y, D=D, SPLITS=split.splits, PDL=self.pdl, num_warps=2, **self.more
            )

    def _silu_mul(self) -> None:
        width = self.act.shape[1]
        fused_kernels._silu_mul[(self.rows, -(-width // 1024))](
            self.gate_up, self.act, self.rows, F=width, R=0, B=1024, num_warps=4
        )


def _of(table: dict[int, Split], rows: int) -> Split:
    return table[max(least for least in table if least <= rows)]


def _put(value: Tensor, out: Tensor) -> None:
    """A copy by a kernel: in a recorded graph, what is to start early has to follow a kernel, not a memory copy."""
    torch.mul(value, 1, out=out)
