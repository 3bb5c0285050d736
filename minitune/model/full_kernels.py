"""What the layers of a full run need beside `fused_kernels`: the gradients that no multiplication gives.

Legend: T tokens, H hidden, V vocabulary, S spans of tokens.
"""

from __future__ import annotations

from torch import Tensor

from minitune.model.fused_ops import next_power_of_2
from minitune.model.kernels import AVAILABLE, launch

SPANS = 8  # into how many parts a norm's sum over tokens is split

if AVAILABLE:
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["tokens", "span", "width"])
    def _norm_weight(
        dy_ptr, x_ptr, rstd_ptr, part_ptr, tokens, span, width, H: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr
    ):  # fmt: skip
        """part[s, h] += Σ dy · x · rstd over the tokens of a span; part's rows are `width` apart."""
        c = tl.program_id(0) * BH + tl.arange(0, BH)
        first = tl.program_id(1) * span
        total = tl.zeros((BH,), tl.float32)
        for at in range(first, first + span, BT):
            t = at + tl.arange(0, BT)
            ok = (t < tokens) & (t < first + span)
            there = ok[:, None] & (c < H)[None, :]
            dy = tl.load(dy_ptr + t[:, None] * H + c, mask=there, other=0.0).to(tl.float32)
            x = tl.load(x_ptr + t[:, None] * H + c, mask=there, other=0.0).to(tl.float32)
            rstd = tl.load(rstd_ptr + t, mask=ok, other=0.0)
            total += tl.sum(dy * (x * rstd[:, None]), 0)
        place = part_ptr + tl.program_id(1) * width + c
        tl.store(place, tl.load(place, mask=c < H, other=0.0) + total, mask=c < H)

    @triton.jit(do_not_specialize=["tokens"])
    def _add_rows(
        d_ptr, ids_ptr, out_ptr, gain, tokens, H: tl.constexpr, C: tl.constexpr, B: tl.constexpr, BH: tl.constexpr
    ):  # fmt: skip
        """out[ids[t]] += gain · d[t]. The first token of an id adds up all of that id, in their order: no two programs
        write one place, and the same sum comes out each time."""
        t = tl.program_id(0)
        mine = tl.load(ids_ptr + t)
        before = 0
        for at in range(0, t, C):
            i = at + tl.arange(0, C)
            before += tl.sum((tl.load(ids_ptr + i, mask=i < t, other=-1) == mine).to(tl.int32), 0)
        if before == 0:
            c = tl.program_id(1) * BH + tl.arange(0, BH)
            total = tl.zeros((BH,), tl.float32)
            for at in range(t, tokens, B):
                i = at + tl.arange(0, B)
                same = tl.load(ids_ptr + i, mask=i < tokens, other=-1) == mine
                if tl.sum(same.to(tl.int32), 0) > 0:
                    place = d_ptr + i[:, None] * H + c
                    d = tl.load(place, mask=same[:, None] & (c < H)[None, :], other=0.0)
                    total += tl.sum(d.to(tl.float32), 0)
            spot = out_ptr + mine * H + c
            now = tl.load(spot, mask=c < H, other=0.0).to(tl.float32)
            tl.store(spot, (now + gain * total).to(out_ptr.dtype.element_ty), mask=c < H)


def norm_weight(dy_TH: Tensor, x_TH: Tensor, rstd_T: Tensor, parts_SH: Tensor) -> None:
    """parts [SPANS, H] (float32, rows any distance apart) += the gradient of an RMSNorm's weight, in SPANS shares."""
    tokens, width = dy_TH.shape
    launch(
        _norm_weight, (-(-width // 64), SPANS),
        dy_TH, x_TH, rstd_T, parts_SH, tokens, -(-tokens // SPANS), parts_SH.stride(0),
        H=width, BT=32, BH=64, num_warps=4,
    )  # fmt: skip


def add_rows(d_TH: Tensor, ids_T: Tensor, out_VH: Tensor, gain: float) -> None:
    """out[ids[t]] += gain · d[t] for every token; the sums are the same each time, however often an id comes."""
    tokens, width = d_TH.shape
    columns = min(512, next_power_of_2(width))
    launch(
        _add_rows, (tokens, -(-width // columns)),
        d_TH, ids_T, out_VH, gain, tokens, H=width, C=1024, B=32, BH=columns, num_warps=4,
    )  # fmt: skip
