# mypy: disable-error-code="assignment"
"""Triton kernels of `four_bits`: the search for scales, and weights formed from four bits.

Legend: Y outputs, X inputs, R a strip's width (0: no adapter), r rank.
"""

from __future__ import annotations

from minitune.model.kernels import AVAILABLE

if AVAILABLE:
    import triton
    import triton.language as tl

    @triton.jit
    def _round(x, inverse, MAGIC):
        """x / scale, the nearest whole number of -8 to 7, ties to even."""
        return tl.minimum(tl.maximum((x * inverse[:, None] + MAGIC) - MAGIC, -8.0), 7.0)

    @triton.jit
    def _try(scale, low, high, share_a, share_b, fine, best, found, MAGIC):
        """The better of `found` and this scale, rounded to bfloat16; errors in whole numbers, so that their sum is the
        same in any order. q · scale is exact in float32: whether it is fused with the difference changes nothing."""
        bits = scale.to(tl.int32, bitcast=True)
        scale = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        inverse = tl.div_rn(1.0, scale)
        a = (low - _round(low, inverse, MAGIC) * scale[:, None]) * fine[:, None]
        b = (high - _round(high, inverse, MAGIC) * scale[:, None]) * fine[:, None]
        error = tl.sum((a * a * share_a).to(tl.int32) + (b * b * share_b).to(tl.int32), 1)
        better = error < best
        return tl.where(better, error, best), tl.where(better, scale, found)

    @triton.jit(do_not_specialize=["groups"])
    def _nearest(
        w_ptr, factor_ptr, packed_ptr, scale_ptr, groups, LEAST, FINE, SHARE, FLOOR, MAGIC,
        GROUP: tl.constexpr, STEPS: tl.constexpr, BG: tl.constexpr,
    ):  # fmt: skip
        """packed (uint8, two numbers each, the first in the low bits) and scales of BG groups. Compiled without fused
        products and sums, so that each operation rounds as the twin's does."""
        group = tl.program_id(0).to(tl.int64) * BG + tl.arange(0, BG)
        ok = group < groups
        HALF: tl.constexpr = GROUP // 2
        there = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        w = tl.load(w_ptr + there, mask=ok[:, None], other=0.0).to(tl.float32)
        low, high = tl.split(tl.reshape(w, (BG, HALF, 2)))
        inf = float("inf")  # a group with a value that is none has the scale NaN: a run's first loss shows it
        broken = tl.max(tl.where((tl.abs(low) < inf) & (tl.abs(high) < inf), 0, 1), 1) > 0
        low, high = tl.where(broken[:, None], 0.0, low), tl.where(broken[:, None], 0.0, high)
        top = tl.maximum(tl.max(low, 1), tl.max(high, 1))
        bottom = -tl.minimum(tl.min(low, 1), tl.min(high, 1))
        size = tl.maximum(tl.maximum(top, bottom), LEAST)
        peak = tl.where(top >= bottom, size, -size)
        fine, part = tl.div_rn(FINE, size), tl.div_rn(1.0, size)[:, None]
        share_a, share_b = tl.abs(low) * part + FLOOR, tl.abs(high) * part + FLOOR
        best = tl.full((BG,), 2147483647, tl.int32)
        scale = tl.zeros((BG,), tl.float32)
        for i in range(2 * STEPS):
            reach = tl.where(i < STEPS, size, peak) * tl.load(factor_ptr + i)
            best, scale = _try(reach, low, high, share_a, share_b, fine, best, scale, MAGIC)
        inverse = tl.div_rn(1.0, scale)
        a, b = _round(low, inverse, MAGIC).to(tl.int32), _round(high, inverse, MAGIC).to(tl.int32)
        counted_a, counted_b = (share_a * SHARE).to(tl.int32) * a, (share_b * SHARE).to(tl.int32) * b
        whole_a, whole_b = (low * fine[:, None]).to(tl.int32), (high * fine[:, None]).to(tl.int32)
        product = tl.sum(whole_a * counted_a + whole_b * counted_b, 1).to(tl.float32)
        square = tl.maximum(tl.sum(counted_a * a + counted_b * b, 1), 1).to(tl.float32)
        better = tl.div_rn(tl.div_rn(product, square), fine)
        better = tl.where(tl.abs(better) < LEAST * 0.0625, LEAST * 0.0625, better)
        best, scale = _try(better, low, high, share_a, share_b, fine, best, scale, MAGIC)
        inverse = tl.div_rn(1.0, scale)
        a, b = _round(low, inverse, MAGIC).to(tl.int32) + 8, _round(high, inverse, MAGIC).to(tl.int32) + 8
        scale = tl.where(broken, float("nan"), scale)
        place = group[:, None] * HALF + tl.arange(0, HALF)[None, :]
        tl.store(packed_ptr + place, (a | (b << 4)).to(tl.uint8), mask=ok[:, None])
        tl.store(scale_ptr + group, scale.to(scale_ptr.dtype.element_ty), mask=ok)

    @triton.jit
    def _form(
        w_ptr, s_ptr, b_ptr, part_ptr, row_ptr, out_ptr, Y,
        X: tl.constexpr, R: tl.constexpr, r: tl.constexpr, GROUP: tl.constexpr, BY: tl.constexpr, BX: tl.constexpr,
    ):  # fmt: skip
        """out [Y, X + R] = [(q - 8) · scale | B]; the programs behind the last columns write the strip. part, row:
        int32 [Y], the part that an output row belongs to (-1: none) and its row of B; b [ΣO, r]."""
        y = tl.program_id(1) * BY + tl.arange(0, BY)
        ok = (y < Y)[:, None]
        kind = out_ptr.dtype.element_ty
        out_ptr += y.to(tl.int64)[:, None] * (X + R)
        last: tl.constexpr = (X + BX - 1) // BX
        if tl.program_id(0) < last:
            at = tl.program_id(0) * BX
            half = at // 2 + tl.arange(0, BX // 2)
            byte = tl.load(w_ptr + y[:, None] * (X // 2) + half[None, :], mask=ok & (half < X // 2)[None, :], other=0)
            GROUPS: tl.constexpr = BX // GROUP
            group = at // GROUP + tl.arange(0, GROUPS)
            inside = ok & (group < X // GROUP)[None, :]
            scale = tl.load(s_ptr + y[:, None] * (X // GROUP) + group[None, :], mask=inside, other=0.0).to(tl.float32)
            byte = tl.reshape(byte.to(tl.int32), (BY, GROUPS, GROUP // 2))
            low = (((byte & 15) - 8).to(tl.float32) * scale[:, :, None]).to(kind)
            high = (((byte >> 4) - 8).to(tl.float32) * scale[:, :, None]).to(kind)
            out = tl.reshape(tl.join(low, high), (BY, BX))
            c = at + tl.arange(0, BX)
            tl.store(out_ptr + c[None, :], out, mask=ok & (c < X)[None, :])
        elif R > 0:
            i = tl.arange(0, R)
            part = tl.load(part_ptr + y, mask=y < Y, other=-1)
            row = tl.load(row_ptr + y, mask=y < Y, other=0)
            own = (part >= 0)[:, None] & (i[None, :] // r == part[:, None])
            b = tl.load(b_ptr + row[:, None] * r + i[None, :] - part[:, None] * r, mask=ok & own, other=0.0)
            tl.store(out_ptr + X + i[None, :], b.to(kind), mask=ok)
