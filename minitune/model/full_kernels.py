"""What the layers of a full run need beside `fused_kernels`: the gradients that no multiplication gives.

Legend: T tokens, H hidden, V vocabulary, P programs.
"""

from __future__ import annotations

from torch import Tensor

from minitune.model.fused_ops import next_power_of_2
from minitune.model.kernels import AVAILABLE, launch

PROGRAMS = 528  # among which a norm's rows are dealt: four for each of a large card's processors

if AVAILABLE:
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["tokens", "programs"])
    def _norm_back(
        d_ptr, dy_ptr, x_ptr, rstd_ptr, weight_ptr, part_ptr, tokens, programs, H: tl.constexpr, BH: tl.constexpr
    ):  # fmt: skip
        """d += the gradient of RMSNorm's input, part[p] = Σ dy · x · rstd over the rows p, p + programs, ...: a row at
        a time, BH >= H."""
        c = tl.arange(0, BH)
        weight = tl.load(weight_ptr + c, mask=c < H, other=0.0).to(tl.float32)
        total = tl.zeros((BH,), tl.float32)
        for t in range(tl.program_id(0), tokens, programs):
            row = tl.cast(t, tl.int64) * H
            dy = tl.load(dy_ptr + row + c, mask=c < H, other=0.0).to(tl.float32)
            x = tl.load(x_ptr + row + c, mask=c < H, other=0.0).to(tl.float32)
            d = tl.load(d_ptr + row + c, mask=c < H, other=0.0).to(tl.float32)
            rstd = tl.load(rstd_ptr + t)
            g = dy * weight
            d += rstd * (g - x * (tl.sum(g * x, 0) * rstd * rstd / H))
            tl.store(d_ptr + row + c, d.to(d_ptr.dtype.element_ty), mask=c < H)
            total += dy * (x * rstd)
        tl.store(part_ptr + tl.program_id(0) * H + c, total, mask=c < H)

    @triton.jit(do_not_specialize=["programs"])
    def _add_parts(part_ptr, out_ptr, programs, H: tl.constexpr, B: tl.constexpr, BH: tl.constexpr):
        """out += Σ part[p], in an order that is always the same."""
        c = tl.program_id(0) * BH + tl.arange(0, BH)
        total = tl.zeros((BH,), tl.float32)
        for at in range(0, programs, B):
            p = at + tl.arange(0, B)
            there = (p < programs)[:, None] & (c < H)[None, :]
            total += tl.sum(tl.load(part_ptr + p[:, None] * H + c, mask=there, other=0.0), 0)
        tl.store(out_ptr + c, tl.load(out_ptr + c, mask=c < H, other=0.0) + total, mask=c < H)

    @triton.jit(do_not_specialize=["tokens"])
    def _add_rows(
        d_ptr, ids_ptr, order_ptr, out_ptr, gain, tokens, H: tl.constexpr, B: tl.constexpr, BH: tl.constexpr
    ):  # fmt: skip
        """out[ids[t]] += gain · d[order[t]], ids in their order. The first place of an id adds up all of that id: no
        two programs write one row, and the same sum comes out each time."""
        t = tl.program_id(0)
        mine = tl.load(ids_ptr + t)
        if (t == 0) | (tl.load(ids_ptr + tl.maximum(t - 1, 0)) != mine):
            c = tl.program_id(1) * BH + tl.arange(0, BH)
            total = tl.zeros((BH,), tl.float32)
            at, more = t, t >= 0
            while more:
                i = at + tl.arange(0, B)
                same = tl.load(ids_ptr + i, mask=i < tokens, other=-1) == mine
                row = tl.load(order_ptr + i, mask=same, other=0)
                d = tl.load(d_ptr + row[:, None] * H + c, mask=same[:, None] & (c < H)[None, :], other=0.0)
                total += tl.sum(d.to(tl.float32), 0)
                at += B
                more = tl.sum(same.to(tl.int32), 0) == B
            spot = out_ptr + mine * H + c
            now = tl.load(spot, mask=c < H, other=0.0).to(tl.float32)
            tl.store(spot, (now + gain * total).to(out_ptr.dtype.element_ty), mask=c < H)


def norm_back(
    d_TH: Tensor, dy_TH: Tensor, x_TH: Tensor, rstd_T: Tensor, weight_H: Tensor, part_PH: Tensor, grad_H: Tensor
) -> None:
    """d += the gradient of an RMSNorm's input, grad (float32) += that of its weight. part: float32 [PROGRAMS, H]."""
    tokens, width = dy_TH.shape
    programs = min(tokens, PROGRAMS)
    launch(
        _norm_back, (programs,),
        d_TH, dy_TH, x_TH, rstd_T, weight_H, part_PH, tokens, programs,
        H=width, BH=next_power_of_2(width), num_warps=8,
    )  # fmt: skip
    launch(_add_parts, (-(-width // 16),), part_PH, grad_H, programs, H=width, B=256, BH=16, num_warps=8)


def add_rows(d_TH: Tensor, ids_T: Tensor, out_VH: Tensor, gain: float) -> None:
    """out[ids[t]] += gain · d[t] for every token; the sums are the same each time, however often an id comes."""
    tokens, width = d_TH.shape
    columns = min(512, next_power_of_2(width))
    sorted_T, order_T = ids_T.sort(stable=True)
    launch(
        _add_rows, (tokens, -(-width // columns)),
        d_TH, sorted_T, order_T, out_VH, gain, tokens, H=width, B=32, BH=columns, num_warps=4,
    )  # fmt: skip
