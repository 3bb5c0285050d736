# mypy: disable-error-code="assignment"
"""Triton kernels of a decode step: one new token of each of a few sequences (`model.decode` launches them).

At one row every multiplication reads a weight once and is bound by memory, so that what counts is bytes under way: a
program holds all of its rows' weights before it looks at the input. What lies between two multiplications (norm,
SiLU, residual) is computed in them: each launch costs a microsecond or two of a step's two thousand.
tests/model/test_decode.py compares all with the plain layer, in Triton's interpreter where there is no card.

PDL, programmatic dependent launch (Hopper): a kernel starts while the one before it still runs, loads what that does
not write (weights, pages of earlier steps), and then waits for it. It lets the next one start only after it has waited,
so that all but its predecessor are over when it starts: what was written two launches ago may be read at once.

Legend: B rows (sequences), S slots, X inputs, O outputs, H hidden, N query heads, K key/value heads, G = N / K, D head
width, F = D / 2, P pages of a sequence, V vocabulary.
"""

from __future__ import annotations

from minitune.model.kernels import AVAILABLE

if AVAILABLE:
    import triton
    import triton.language as tl

    @triton.jit
    def _after_predecessor(PDL: tl.constexpr):
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()

    @triton.jit
    def _enter(
        slot_ptr, token_ptr, position_ptr, table_ptr, embed_ptr, cos_table_ptr, sin_table_ptr,
        x_ptr, at_ptr, pages_ptr, cos_ptr, sin_ptr, table_stride, gain, idle,
        H: tl.constexpr, F: tl.constexpr, P: tl.constexpr, BH: tl.constexpr, BF: tl.constexpr, BP: tl.constexpr,
        TABLE: tl.constexpr,
    ):  # fmt: skip
        """A row a program: its token's embedding times gain, its position (which moves on in its slot; the idle slot
        stays at 0), its pages, and with TABLE the position's angles."""
        row = tl.program_id(0)
        slot = tl.load(slot_ptr + row)
        token = tl.load(token_ptr + slot)
        position = tl.load(position_ptr + slot)
        c = tl.arange(0, BH)
        x = tl.load(embed_ptr + token * H + c, mask=c < H, other=0.0).to(tl.float32) * gain
        tl.store(x_ptr + row * H + c, x.to(x_ptr.dtype.element_ty), mask=c < H)
        tl.store(at_ptr + row, position)
        p = tl.arange(0, BP)
        page = tl.load(table_ptr + slot * table_stride + p, mask=p < P, other=0)
        tl.store(pages_ptr + row * P + p, page, mask=p < P)
        if TABLE:
            f = tl.arange(0, BF)
            tl.store(cos_ptr + row * F + f, tl.load(cos_table_ptr + position * F + f, mask=f < F), mask=f < F)
            tl.store(sin_ptr + row * F + f, tl.load(sin_table_ptr + position * F + f, mask=f < F), mask=f < F)
        tl.debug_barrier()
        tl.store(position_ptr + slot, tl.where(slot == idle, 0, position + 1))

    @triton.jit
    def _finish(y, up, squares, y_ptr, n, outputs, eps, gain, X: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr,
                SILU: tl.constexpr):  # fmt: skip
        """Sums of products -> what is stored: the norm's 1/rms, then silu(y) · up, or gain · y (ADD: to what is
        there)."""
        if NORM:
            rstd = 1.0 / tl.sqrt(squares / X + eps)
            y = y * rstd
            up = up * rstd
        y = y / (1.0 + tl.exp(-y)) * up if SILU else y * gain
        if ADD:
            y += tl.load(y_ptr + n, mask=n < outputs, other=0.0).to(tl.float32)
        tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=n < outputs)

    @triton.jit
    def _gemv(
        x_ptr, norm_ptr, w_ptr, y_ptr, stride, outputs, eps, gain,
        X: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr, SILU: tl.constexpr,
        BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """y [O] from x [X] and w [O, X] (SILU: [2 O, X], gate and up), BN outputs a program. BK: 8 numbers a thread,
        so that a thread has the same columns of every row, and nothing moves between threads before the end."""
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        k = tl.arange(0, BK)
        row = tl.minimum(n, outputs - 1).to(tl.int64)
        w_ptrs = w_ptr + row[:, None] * stride + k[None, :]
        CHUNKS: tl.constexpr = (X + BK - 1) // BK
        held = ()
        held_up = ()
        for c in tl.static_range(CHUNKS):
            ok = (c * BK + k < X)[None, :]
            if (c + 1) * BK <= X:
                held += (tl.load(w_ptrs + c * BK),)
            else:
                held += (tl.load(w_ptrs + c * BK, mask=ok, other=0.0),)
            if SILU:
                held_up += (tl.load(w_ptrs + outputs * stride + c * BK, mask=ok, other=0.0),)
        _after_predecessor(PDL)
        acc = tl.zeros((BN, BK), tl.float32)
        up = tl.zeros((BN, BK), tl.float32)
        squares = tl.zeros((BK,), tl.float32)
        for c in tl.static_range(CHUNKS):
            ok = c * BK + k < X
            x = tl.load(x_ptr + c * BK + k, mask=ok, other=0.0).to(tl.float32)
            if NORM:
                squares += x * x
                x *= tl.load(norm_ptr + c * BK + k, mask=ok, other=0.0).to(tl.float32)
            acc += held[c].to(tl.float32) * x[None, :]
            if SILU:
                up += held_up[c].to(tl.float32) * x[None, :]
        total = tl.sum(squares, 0) if NORM else 0.0
        y_up = tl.sum(up, 1) if SILU else tl.zeros((BN,), tl.float32)
        _finish(tl.sum(acc, 1), y_up, total, y_ptr, n, outputs, eps, gain, X, NORM, ADD, SILU)

    @triton.jit
    def _products(word, x, minus, one):
        """Σ (q - 8) x / 16 of a word's eight numbers: with q in a float's mantissa, at its top or behind it, the float
        is 1 + q / 16 or 1 + q / 256, at the price of half a shift and one bit operation a number. x: of the eight, the
        even ones times 16; minus: -1.5 · Σ odd x - 16.5 · Σ even x takes away what is too much. one: the bits of 1.0, a
        variable: of two constants an instruction takes one."""
        total = minus
        for pair in tl.static_range(4):
            at = word << (15 - 8 * pair) if pair < 2 else word >> (8 * pair - 15)
            total += (at & 0x78000 | one).to(tl.float32, bitcast=True) * x[2 * pair]
            total += (at & 0x780000 | one).to(tl.float32, bitcast=True) * x[2 * pair + 1]
        return total

    @triton.jit
    def _two(pair, kind: tl.constexpr):
        """Both numbers of a pair of this kind, in float32."""
        if kind.primitive_bitwidth == 16:
            low = (pair & 0xFFFF).to(tl.int16).to(kind, bitcast=True)
            high = (pair >> 16).to(tl.int16).to(kind, bitcast=True)
        else:
            low = (pair & 0xFFFFFFFF).to(tl.int32).to(kind, bitcast=True)
            high = (pair >> 32).to(tl.int32).to(kind, bitcast=True)
        return low.to(tl.float32), high.to(tl.float32)

    @triton.jit
    def _gemv4(
        x_ptr, norm_ptr, w_ptr, s_ptr, y_ptr, outputs, eps, gain, one,
        X: tl.constexpr, GROUP: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr, SILU: tl.constexpr,
        BN: tl.constexpr, BW: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """As `_gemv`, of four-bit weights: w int32 [O, X / 8], s [O, X / GROUP]; X is a multiple of GROUP. BW: a word a
        thread, so that what a thread makes of its eight x serves all rows. x and the norm come as whole numbers that
        hold a pair each."""
        WORDS: tl.constexpr = X // 8
        ROWS: tl.constexpr = 2 * BN if SILU else BN
        CHUNKS: tl.constexpr = (WORDS + BW - 1) // BW
        t = tl.arange(0, BW)
        held = ()
        scales = ()
        for r in tl.static_range(ROWS):
            # the second half of the rows are up's
            row = tl.minimum(tl.program_id(0) * BN + r % BN, outputs - 1).to(tl.int64) + r // BN * outputs
            for c in tl.static_range(CHUNKS):
                there = c * BW + t < WORDS
                held += (tl.load(w_ptr + row * WORDS + c * BW + t, mask=there, other=0),)
                s_ptrs = s_ptr + row * (X // GROUP) + (c * BW + t) // (GROUP // 8)
                scales += (tl.load(s_ptrs, mask=there, other=0.0),)
        _after_predecessor(PDL)
        sums = ()
        for _ in tl.static_range(ROWS):
            sums += (tl.zeros((BW,), tl.float32),)
        squares = tl.zeros((BW,), tl.float32)
        kind: tl.constexpr = y_ptr.dtype.element_ty
        for c in tl.static_range(CHUNKS):
            x = ()
            minus = tl.zeros((BW,), tl.float32)
            for pair in tl.static_range(4):
                at = (c * BW + t) * 4 + pair
                even, odd = _two(tl.load(x_ptr + at, mask=at < X // 2, other=0), kind)
                if NORM:
                    squares += even * even + odd * odd
                    even_norm, odd_norm = _two(tl.load(norm_ptr + at, mask=at < X // 2, other=0), kind)
                    even, odd = even * even_norm, odd * odd_norm
                minus += even * -16.5 + odd * -1.5
                x += (even * 16.0, odd)
            more = ()
            for r in tl.static_range(ROWS):
                product = _products(held[r * CHUNKS + c], x, minus, one)
                more += (sums[r] + product * scales[r * CHUNKS + c].to(tl.float32),)
            sums = more
        total = tl.sum(squares, 0) if NORM else 0.0
        for r in tl.static_range(BN):
            y = tl.sum(sums[r], 0) * 16.0
            y_up = tl.sum(sums[r + BN], 0) * 16.0 if SILU else 0.0
            n = tl.program_id(0) * BN + r
            _finish(y, y_up, total, y_ptr, n, outputs, eps, gain, X, NORM, ADD, SILU)

    @triton.jit
    def _lora_out(
        h_ptr, b_ptr, owner_ptr, scale_ptr, slot_ptr, adapter_ptr, y_ptr, outputs, gain,
        C: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """y [O] += gain · B h of one row's adapter: B [O, C]; h [C] what all adapters' A gave, owner [C] whose."""
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        c = tl.arange(0, BC)
        there = (n < outputs)[:, None] & (c < C)[None, :]
        b = tl.load(b_ptr + n[:, None].to(tl.int64) * C + c[None, :], mask=there, other=0.0)
        own = tl.load(owner_ptr + c, mask=c < C, other=-2) == tl.load(adapter_ptr + tl.load(slot_ptr))
        scale = tl.load(scale_ptr + c, mask=c < C, other=0.0)
        _after_predecessor(PDL)
        h = tl.load(h_ptr + c, mask=c < C, other=0.0).to(tl.float32) * scale
        h = tl.where(own, h, 0.0)  # not a product with 0: another adapter's value may be infinite in float16
        y = tl.sum(b.to(tl.float32) * h[None, :], 1) * gain
        y += tl.load(y_ptr + n, mask=n < outputs, other=0.0).to(tl.float32)
        tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=n < outputs)

    @triton.jit
    def _dequantize(
        w_ptr, s_ptr, out_ptr, numbers, GROUP: tl.constexpr, BG: tl.constexpr
    ):  # fmt: skip
        """out [numbers] = (q - 8) · scale, BG groups a program; a byte's two numbers lie side by side."""
        group = tl.program_id(0).to(tl.int64) * BG + tl.arange(0, BG)
        ok = (group * GROUP < numbers)[:, None]
        at = group[:, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]
        byte = tl.load(w_ptr + at, mask=ok, other=0).to(tl.int32)
        scale = tl.load(s_ptr + group, mask=group * GROUP < numbers, other=0.0).to(tl.float32)[:, None]
        low = ((byte & 15) - 8).to(tl.float32) * scale
        high = ((byte >> 4) - 8).to(tl.float32) * scale
        kind = out_ptr.dtype.element_ty
        out = tl.reshape(tl.join(low.to(kind), high.to(kind)), (BG, GROUP))
        tl.store(out_ptr + group[:, None] * GROUP + tl.arange(0, GROUP)[None, :], out, mask=ok)

    @triton.jit
    def _best_of_part(logits_ptr, best_ptr, id_ptr, stride, V: tl.constexpr, BV: tl.constexpr):
        """The highest score of a row's part and the first place that has it; NaN where one is."""
        row, part = tl.program_id(0), tl.program_id(1)
        v = part * BV + tl.arange(0, BV)
        x = tl.load(logits_ptr + row.to(tl.int64) * stride + v, mask=v < V, other=-float("inf")).to(tl.float32)
        best = tl.max(x, 0)
        first = tl.min(tl.where(x == best, v, V - 1), 0)
        broken = tl.max((x != x).to(tl.int32), 0) > 0
        at = row * tl.num_programs(1) + part
        tl.store(best_ptr + at, tl.where(broken, float("nan"), best))
        tl.store(id_ptr + at, first)

    @triton.jit
    def _take_best(
        best_ptr, id_ptr, slot_ptr, token_ptr, told_ptr, parts, V: tl.constexpr, BP: tl.constexpr
    ):  # fmt: skip
        """The row's likeliest token, the first of equals, into its slot; told [B, 3]: token, settled, score finite."""
        row = tl.program_id(0)
        p = tl.arange(0, BP)
        x = tl.load(best_ptr + row * parts + p, mask=p < parts, other=-float("inf"))
        best = tl.max(x, 0)
        place = tl.load(id_ptr + row * parts + p, mask=p < parts, other=V - 1)
        token = tl.min(tl.where(x == best, place, V - 1), 0).to(tl.int64)
        broken = (tl.max((x != x).to(tl.int32), 0) > 0) | (tl.abs(best) == float("inf"))
        tl.store(token_ptr + tl.load(slot_ptr + row), token)
        tl.store(told_ptr + row * 3, token)
        tl.store(told_ptr + row * 3 + 1, 1)
        tl.store(told_ptr + row * 3 + 2, tl.where(broken, 0, 1))
