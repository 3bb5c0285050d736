"""The kernels of `fused_kernels` on tensors, a launch each. Legend as there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minitune.model import fused_kernels as fk
from minitune.model.decoder import Linear
from minitune.model.four_bits import Room, form
from minitune.model.kernels import launch
from minitune.model.quantized import Int4Linear


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


class Tile(NamedTuple):
    """Rows and columns of a program's tile, and its warps. `bench/tune_kernels.py` compares them on a card."""

    rows: int
    columns: int
    warps: int = 4


PROGRAMS = 512  # what a launch over few rows is split into, some four for each of a large card's processors
SPLIT = 4096  # outputs from which dx and dh are two multiplications: a width of 19 · 128 - 64 is a slow one
TILES = {
    "norm_in": Tile(1, 0, 8),  # the columns are a row
    "strip": Tile(16, 128, 2),
    "norm_back": Tile(32, 128),
    "input_back": Tile(32, 0, 2),  # the columns are a head
    "silu_mul": Tile(1, 1024),
    "silu_mul_back": Tile(16, 128, 8),
    "grads": Tile(64, 32),
}


class Beside:
    """A second stream, for work that the chain of gradients does not wait for: it fills what the multiplications leave
    idle. On the CPU it happens at once."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.held: list[tuple[torch.cuda.Event, tuple[Tensor, ...]]] = []

    @contextmanager
    def __call__(self, *held: Tensor) -> Iterator[None]:
        """What is launched inside runs beside what follows, until `join`. held: all that it reads and writes of the
        current stream's memory, which would be handed out again too early."""
        if self.stream is None:
            yield
            return
        done = torch.cuda.Event()
        self.held.append((done, held))
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield
            done.record()

    def join(self, but: int = 0) -> None:
        """The current stream waits for all of it but the last so many."""
        if (count := len(self.held) - but) > 0:
            torch.cuda.current_stream().wait_event(self.held[count - 1][0])
            del self.held[:count]


class Slot:
    """One linear of one layer with what its adapter needs; R = P = Q = r = 0 where there is none. split: dh comes of a
    multiplication of its own, on the second stream. room: where a packed linear's weight is formed, shared by all
    layers; `wide_YX` is that memory then."""

    KINDS = ("attn.qkv", "attn.o", "mlp.gate_up", "mlp.down")

    def __init__(self, linear: Linear, wide_YX: Tensor, rows: tuple[Tensor, Tensor] | None, room: Room | None = None):
        self.wide, self.lora, self.linear, self.room = wide_YX, linear.lora, linear, room
        self.Y, self.X = linear.out_features, linear.in_features
        self.R = wide_YX.shape[1] - self.X
        self.split = self.R > 0 and self.Y >= SPLIT
        self.P = self.Q = self.r = 0
        self.s = 1.0
        self.a = self.site = self.part = self.row = wide_YX  # never read without an adapter
        self.da = self.db = self.b = wide_YX
        if linear.lora is not None and rows is not None:
            self.P, self.r, self.s = linear.lora.A.shape[0], linear.lora.r, linear.lora.scale
            self.Q = max(16, next_power_of_2(self.P))
            self.site, (self.part, self.row) = linear.lora.site, rows

    def weight(self) -> Tensor:
        """[Y, X + R]; of a packed linear formed here, unless it is what was formed last. What the second stream reads
        of it is joined before the next one is asked for."""
        if self.room is not None and self.room.holder is not self:
            assert isinstance(self.linear, Int4Linear)
            form(self.linear.weight_packed, self.linear.weight_scale, self, self.wide)
            self.room.holder = self
        return self.wide

    def forward(self, x_TX: Tensor) -> Tensor:
        return torch.mm(x_TX, self.weight().t())

    def backward(self, dy_TY: Tensor, beside: Beside, needs_dx: bool = True) -> Tensor:
        """[dx | dh] [T, X + R]; dx is left as it is where nobody needs it."""
        wide = self.weight()
        if self.R == 0 or (needs_dx and not self.split):
            return torch.mm(dy_TY, wide)
        out = torch.empty(dy_TY.shape[0], self.X + self.R, dtype=dy_TY.dtype, device=dy_TY.device)
        with beside(dy_TY, out):
            torch.mm(dy_TY, wide[:, self.X :], out=out[:, self.X :])
        if needs_dx:
            torch.mm(dy_TY, wide[:, : self.X], out=out[:, : self.X])
        return out


def row_table(linear: Linear) -> tuple[Tensor, Tensor]:
    """int32 [Y] twice: the part of the adapter that an output row belongs to (-1: none), and its row of B."""
    assert linear.lora is not None
    part = torch.full((linear.out_features,), -1, dtype=torch.int32)
    row = torch.zeros_like(part)
    for i, (_, _, b, y) in enumerate(linear.lora.rows()):
        part[y] = i
        row[y] = torch.arange(b.start, b.stop, dtype=torch.int32)
    return part.to(linear.lora.A.device), row.to(linear.lora.A.device)


def _grid(tokens: int, columns: int, tile: Tile) -> tuple[int, int]:
    return -(-tokens // tile.rows), -(-columns // tile.columns)


def norm_in(
    x: Tensor, y: Tensor | None, gain: float, norm: Any, slot: Slot, strip: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(x + gain · y, [norm of it | its strip, or room for one], 1/rms [T])."""
    tokens, width = x.shape
    total = torch.empty_like(x) if y is not None else x
    out = torch.empty(tokens, width + slot.R, dtype=x.dtype, device=x.device)
    rstd = torch.empty(tokens, dtype=torch.float32, device=x.device)
    launch(
        fk._norm_in, (tokens,),
        x, _or(y, x), gain, norm.weight, total, out, _or(strip, x), rstd, norm.eps,
        H=width, R=slot.R, SUM=y is not None, STRIP=strip is not None, BH=next_power_of_2(width),
        num_warps=TILES["norm_in"].warps,
    )  # fmt: skip
    return total, out, rstd


def strip(x: Tensor, slot: Slot, drop: Tensor | None, counts: Counts, keep: bool = False) -> Tensor | None:
    """Fills the strip of [x | h]. keep: gives it again, in memory of its own."""
    if not slot.R:
        return None
    tile, tokens = TILES["strip"], x.shape[0]
    rows, columns = _grid(tokens, slot.X, tile)
    span = tile.columns * -(-columns // max(1, min(columns, PROGRAMS // rows)))
    spans = -(-slot.X // span)
    parts = torch.empty(spans, tokens, slot.Q, dtype=torch.float32, device=x.device)
    kept = torch.empty(tokens, slot.R, dtype=x.dtype, device=x.device) if keep else None
    launch(
        fk._strip, (rows, spans),
        x, slot.a, _or(drop, x), slot.site, parts, counts(rows), _or(kept, x), slot.s, tokens, span, spans,
        X=slot.X, R=slot.R, P=slot.P, Q=slot.Q, DROP=drop is not None, KEEP=keep,
        BT=tile.rows, BH=tile.columns, num_warps=tile.warps,
    )  # fmt: skip
    return kept


class Counts:
    """Zeros for `fused_kernels._strip`, which leaves them zero: made once, not a launch each time. Those of a recorded
    graph stay where they are."""

    def __init__(self, device: torch.device):
        self.device = device
        self.all: list[Tensor] = []

    def __call__(self, blocks: int) -> Tensor:
        if not self.all or self.all[-1].numel() < blocks:
            self.all.append(torch.zeros(max(1024, next_power_of_2(blocks)), dtype=torch.int32, device=self.device))
        return self.all[-1]


def silu_mul(gate_up: Tensor, slot: Slot) -> Tensor:
    """[silu(gate) · up | room for h]."""
    tile = TILES["silu_mul"]
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(tokens, width + slot.R, dtype=gate_up.dtype, device=gate_up.device)
    launch(
        fk._silu_mul, _grid(tokens, width, tile),
        gate_up, out, tokens, F=width, R=slot.R, B=tile.columns, num_warps=tile.warps,
    )  # fmt: skip
    return out


def silu_mul_back(
    gate_up: Tensor, dx: Tensor, slot: Slot, drop: Tensor | None, gain: float, along: bool, again: bool = False
) -> Tensor | None:
    """gate_up becomes gain · its gradient. along: gives shares of Σ of the products of both, see `norm_back`. again:
    dx becomes what `silu_mul` gave (where no adapter is)."""
    tile = TILES["silu_mul_back"]
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    grid = _grid(tokens, width, tile)
    shares = torch.empty(grid[1], tokens, dtype=torch.float32, device=dx.device) if along else None
    launch(
        fk._silu_mul_back, grid,
        gate_up, dx, _or(shares, dx), slot.a, _or(drop, dx), slot.site, slot.s, gain, tokens,
        F=width, R=slot.R, P=slot.P, Q=slot.Q, DROP=drop is not None, ALONG=along, AGAIN=again,
        BT=tile.rows, BH=tile.columns, num_warps=tile.warps,
    )  # fmt: skip
    return shares


def norm_back(
    d: Tensor, dx: Tensor, slot: Slot, drop: Tensor | None, x: Tensor, rstd: Tensor, norm: Any, along: Tensor | None
) -> None:
    """d += the gradient of the norm's input. along [parts, T]: where an adapter is, shares of Σ dy · y of each row."""
    tile, tokens = TILES["norm_back"], d.shape[0]
    if not slot.R:
        launch(
            fk._plain_norm_back, (tokens,),
            d, dx, x, rstd, norm.weight, H=slot.X, BH=next_power_of_2(slot.X), num_warps=TILES["norm_in"].warps,
        )  # fmt: skip
        return
    assert along is not None
    parts = along.shape[0]
    launch(
        fk._norm_back, _grid(tokens, slot.X, tile),
        d, dx, slot.a, _or(drop, d), slot.site, slot.s, x, rstd, norm.weight, along, tokens, parts,
        H=slot.X, R=slot.R, P=slot.P, Q=slot.Q, DROP=drop is not None, C=next_power_of_2(parts),
        BT=tile.rows, BH=tile.columns, num_warps=tile.warps,
    )  # fmt: skip


def along_rows(dy: Tensor, y: Tensor, along: Tensor) -> None:
    """along [1, T] float32 = Σ dy · y of each row."""
    launch(fk._along, (dy.shape[0],), dy, y, along, Y=dy.shape[1], B=1024, num_warps=4)


def input_back(
    dx: Tensor, y: Tensor, slot: Slot, drop: Tensor | None, gain: float, head_dim: int
) -> tuple[Tensor, Tensor]:
    """(gain · the gradient of the input [T, X], delta [N, T])."""
    tile, tokens = TILES["input_back"], dx.shape[0]
    out = torch.empty(tokens, slot.X, dtype=dx.dtype, device=dx.device)
    delta = torch.empty(slot.X // head_dim, tokens, dtype=torch.float32, device=dx.device)
    launch(
        fk._input_back, _grid(tokens, slot.X, tile._replace(columns=head_dim)),
        dx, out, delta, y, slot.a, _or(drop, dx), slot.site, slot.s, gain, tokens,
        X=slot.X, R=slot.R, P=slot.P, Q=slot.Q, DROP=drop is not None,
        BT=tile.rows, BH=head_dim, num_warps=tile.warps,
    )  # fmt: skip
    return out, delta


def grads(dy: Tensor, x: Tensor, dx: Tensor, slot: Slot, drop: Tensor | None, gain: float) -> None:
    """Adds the gradients of A and B. dy [T, Y], x [T, X + R] with its strip, dx [T, X + R] with that of dh."""
    tile = TILES["grads"]
    launch(
        fk._grads, (-(-slot.Y // tile.columns) + -(-slot.X // tile.columns),),
        dy, x, dx, _or(drop, x), slot.site, slot.part, slot.row, slot.da, slot.db, slot.s, gain, x.shape[0],
        X=slot.X, Y=slot.Y, R=slot.R, P=slot.P, Q=slot.Q, r=slot.r, DROP=drop is not None,
        BT=tile.rows, BC=tile.columns, num_warps=tile.warps,
    )  # fmt: skip


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """The tensor, or where there is none a pointer that is never read."""
    return other if tensor is None else tensor
