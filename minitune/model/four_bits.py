"""A base rounded to four bits while it is loaded, and its weights formed again where they are multiplied.

The form is that of `quantized`, scales in bfloat16. Every device finds the same numbers, bit for bit: the search for a
group's scale compares sums of whole numbers, which no order of adding changes, and what comes before them is one
rounded operation after the other, the same on a card as on the CPU.
Legend: O outputs, I inputs, G groups in a row, g weights in a group, C candidates for a scale.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from minitune.model import kernels
from minitune.model.decoder import Decoder
from minitune.model.kernels import launch
from minitune.model.quantized import HIGH, LOW, PER_WORD, PIECE, group_size, is_packed, pack, quantize_linears

GROUP = 64  # 4.25 bits a weight; bench/four_bits.py compares
SEARCH = 1  # a number for the rule below: an adapter belongs to the weights that it gives
STEPS = 8  # scales tried with the largest weight at one end of the levels, and as many at the other
LEAST = 1e-30  # what a group's largest weight counts as, at least
FLOOR = 0.5  # an error counts by its weight's size, that of the largest being 1, and this: larger weights matter more
# Units of whole numbers: 1/8192 of the largest weight, 1/64 of what an error counts by; sums of 128 stay below 2^31.
FINE = 8192.0
SHARE = 64.0
MAGIC = 12582912.0  # 1.5 · 2^23: added and taken off again, it rounds to the nearest whole number, ties to even
ROWS = 16  # groups a program
COMPILING = threading.Lock()  # of the threads that load, the first compiles the kernel, and the others wait


def group_of(decoder: Decoder) -> int:
    """The group for this decoder's linears: `GROUP`, or 32 where a row is no multiple of it; ValueError where neither
    fits."""
    return min(GROUP, group_size({linear.in_features for linear in decoder.linears()}))


def make_room(decoder: Decoder, group: int = 0) -> Decoder:
    """Gives the linears of an empty decoder four bits, for `Rounding` to fill; where they have them nothing changes.
    group: 0 chooses. `decoder.rounded` says it."""
    if not is_packed(decoder):
        decoder.rounded = group or group_of(decoder)
        quantize_linears(decoder, decoder.rounded)
    return decoder


def candidates(device: torch.device) -> Tensor:
    """float32 [C]: what a group's largest weight is multiplied by to give a scale. The first half takes its size and
    brings it to 7 (or -7) up to 11, which cuts it; the second takes its sign too and brings it to -8 and further."""
    steps = [1 / (7 + 4 * i / (STEPS - 1)) for i in range(STEPS)]
    steps += [-1 / (8 + 3 * i / (STEPS - 1)) for i in range(STEPS)]
    return torch.tensor(steps, dtype=torch.float32, device=device)


def nearest(weight_OI: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """(packed [O, I / 8], scales [O, I / group] in bfloat16): each group's scale of least squared error, larger weights
    counting more, among the candidates and the one that least squares makes of the best of them. NaN where a weight is
    not finite."""
    if weight_OI.is_cuda and not kernels.why_not(weight_OI.device):
        return nearest_by_kernel(weight_OI, group)
    rows = max(1, (PIECE if weight_OI.device.type == "cpu" else 32 * PIECE) // weight_OI.shape[1])
    found = [_nearest(w.float().view(w.shape[0], -1, group)) for w in weight_OI.split(rows)]
    return torch.cat([packed for packed, _ in found]), torch.cat([scale for _, scale in found])


def _nearest(w: Tensor) -> tuple[Tensor, Tensor]:
    broken = ~torch.isfinite(w).all(-1)
    w = torch.where(broken[..., None], 0.0, w)
    high, low = w.amax(-1), -w.amin(-1)
    size = torch.maximum(high, low).clamp(min=LEAST)
    peak = torch.where(high >= low, size, -size)
    fine = FINE / size
    share = w.abs() * (1 / size)[..., None] + FLOOR
    best = torch.full(size.shape, 2**31 - 1, dtype=torch.int32, device=w.device)
    scale = torch.zeros_like(size)

    def attempt(scale_: Tensor) -> tuple[Tensor, Tensor]:
        scale_ = _bfloat16(scale_)
        off = (w - _round(w, scale_) * scale_[..., None]) * fine[..., None]
        error = (off * off * share).to(torch.int32).sum(-1, dtype=torch.int32)
        better = error < best
        return torch.where(better, error, best), torch.where(better, scale_, scale)

    for i, factor in enumerate(candidates(w.device)):
        best, scale = attempt((size if i < STEPS else peak) * factor)
    q = _round(w, scale)
    counted = (share * SHARE).to(torch.int32) * q.to(torch.int32)
    product = ((w * fine[..., None]).to(torch.int32) * counted).sum(-1, dtype=torch.int32).float()
    square = (counted * q.to(torch.int32)).sum(-1, dtype=torch.int32).clamp(min=1).float()
    best, scale = attempt(_not_small(product / square / fine))
    packed = pack(_round(w, scale).to(torch.int8).flatten(1))
    return packed, torch.where(broken, torch.nan, scale).to(torch.bfloat16)


def _round(w: Tensor, scale: Tensor) -> Tensor:
    return (w * (1 / scale)[..., None]).round_().clamp_(LOW, HIGH)


def _not_small(scale: Tensor) -> Tensor:
    return torch.where(scale.abs() < LEAST / 16, LEAST / 16, scale)


def _bfloat16(x: Tensor) -> Tensor:
    """Rounded as a conversion does, ties to even."""
    bits = x.view(torch.int32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).view(torch.float32)


def nearest_by_kernel(weight_OI: Tensor, group: int, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """As `nearest`, the weight read once. out: where packed words and scales (of any floating dtype) are written."""
    from minitune.model.four_bits_kernels import _nearest as kernel

    rows, columns = weight_OI.shape
    if out is None:
        out = (
            torch.empty(rows, columns // PER_WORD, dtype=torch.int32, device=weight_OI.device),
            torch.empty(rows, columns // group, dtype=torch.bfloat16, device=weight_OI.device),
        )
    packed, scale = out
    launch(
        kernel, (-(-scale.numel() // ROWS),),
        weight_OI, candidates(weight_OI.device), packed.view(torch.uint8), scale, scale.numel(),
        LEAST, FINE, SHARE, FLOOR, MAGIC, GROUP=group, STEPS=STEPS, BG=ROWS, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


class Rounding:
    """A place for a weight's rows that keeps them in four bits: `checkpoint.filling` lays pieces of a file in it."""

    dtype = None

    def __init__(self, packed: Tensor, scale: Tensor):
        self.packed, self.scale = packed, scale
        self.device = packed.device
        self.shape = torch.Size((packed.shape[0], packed.shape[1] * PER_WORD))

    def __getitem__(self, rows: slice) -> Rounding:
        return Rounding(self.packed[rows], self.scale[rows])

    def copy_(self, weight_OI: Tensor) -> None:
        weight_OI = weight_OI.to(self.device).contiguous()
        group = self.shape[1] // self.scale.shape[1]
        if weight_OI.is_cuda and not kernels.why_not(self.device):
            with COMPILING:
                nearest_by_kernel(weight_OI, group, (self.packed, self.scale))
            return
        packed, scale = nearest(weight_OI, group)
        self.packed.copy_(packed)
        self.scale.copy_(scale)


class Room:
    """Memory for one weight of a kind of linear, with its strip: [O, I + R]. `holder`: whose weight lies there."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype, device: torch.device):
        self.tensor = torch.empty(rows, width, dtype=dtype, device=device)
        self.holder: Any = None


def form(packed: Tensor, scale: Tensor, slot: Any, out_YX: Tensor) -> None:
    """The weight [Y, X | R] of a packed linear, its adapter's B in the strip. slot: `fused_ops.Slot`."""
    from minitune.model.four_bits_kernels import _form

    rows, columns = 8, 256
    launch(
        _form, (-(-slot.X // columns) + (slot.R > 0), -(-slot.Y // rows)),
        packed.view(torch.uint8), scale, slot.b, slot.part, slot.row, out_YX, slot.Y,
        X=slot.X, R=slot.R, r=slot.r, GROUP=slot.X // scale.shape[1], BY=rows, BX=columns, num_warps=4,
    )  # fmt: skip
