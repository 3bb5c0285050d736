"""Triton kernels of the fused LoRA stack (`model.fused`): what stands between its matrix multiplications.

Each joins what plain code spreads over several passes: residual sum, RMSNorm, dropout and the product with A on the
way in; dropout's other side, the norm's gradient and the residual on the way back. tests/model/test_fused.py compares
them with the plain layer, in Triton's interpreter where there is no card.

A linear's input lies in a buffer [T, X + R]: the input itself, and behind it the strip h = s · dropout(x) Aᵀ, so that
one multiplication with the weight [Y, X + R], whose strip holds B, gives base and adapter together.
Legend: T tokens, H hidden, X inputs, Y outputs, R the strip's width (0: no adapter), P rows of A (in tiles of Q),
F FFN width, N query heads, D head width.
"""

from __future__ import annotations

from minitune.model.kernels import AVAILABLE

if AVAILABLE:
    import triton
    import triton.language as tl

    from minitune.model.kernels import _kept, _through_lora

    @triton.jit
    def _norm_in(
        x_ptr, y_ptr, gain, weight_ptr, sum_ptr, out_ptr, strip_ptr, rstd_ptr, eps,
        H: tl.constexpr, R: tl.constexpr, SUM: tl.constexpr, STRIP: tl.constexpr, BH: tl.constexpr,
    ):  # fmt: skip
        """sum = x + gain · y; out = [norm(sum) | room for h, or with STRIP the strip [T, R]]; rstd. A row a program,
        BH >= H."""
        t = tl.program_id(0)
        c = tl.arange(0, BH)
        kind = out_ptr.dtype.element_ty
        x = tl.load(x_ptr + t * H + c, mask=c < H, other=0.0)
        if SUM:
            y = tl.load(y_ptr + t * H + c, mask=c < H, other=0.0)
            x = (x.to(tl.float32) + gain * y.to(tl.float32)).to(kind)
            tl.store(sum_ptr + t * H + c, x, mask=c < H)
        wide = x.to(tl.float32)
        rstd = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / H + eps)
        tl.store(rstd_ptr + t, rstd)
        weight = tl.load(weight_ptr + c, mask=c < H, other=0.0).to(kind)
        tl.store(out_ptr + t * (H + R) + c, (wide * rstd).to(kind) * weight, mask=c < H)
        if STRIP:
            r = tl.arange(0, R)
            tl.store(out_ptr + t * (H + R) + H + r, tl.load(strip_ptr + t * R + r))

    @triton.jit(do_not_specialize=["tokens", "span", "spans"])
    def _strip(
        x_ptr, a_ptr, drop_ptr, site_ptr, part_ptr, count_ptr, keep_ptr, s, tokens, span, spans,
        X: tl.constexpr, R: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, DROP: tl.constexpr, KEEP: tl.constexpr,
        BT: tl.constexpr, BH: tl.constexpr,
    ):  # fmt: skip
        """Fills the strip of [x | h], h = s · dropout(x) Aᵀ, zeros behind it; with KEEP also keep [T, R], the same.

        Few rows would fill few of a card's processors: a program takes the columns of one of `spans` spans, writes
        its part [spans, T, Q] float32, and the last one to have done so adds them up, in their order. count: int32, a
        number for each block of rows, zero before and after.
        """
        t = tl.program_id(0) * BT + tl.arange(0, BT)
        ok = t < tokens
        kind = x_ptr.dtype.element_ty
        p = tl.arange(0, Q)
        h = tl.zeros((BT, Q), tl.float32)
        first = tl.program_id(1) * span
        for at in range(first, first + span, BH):
            c = at + tl.arange(0, BH)
            x = tl.load(x_ptr + t[:, None] * (X + R) + c, mask=ok[:, None] & (c < X)[None, :], other=0.0)
            if DROP:
                kept, scale = _kept(drop_ptr, site_ptr, t, ok, c)
                x = tl.where(kept, x * scale.to(kind), 0.0).to(kind)
            a = tl.load(a_ptr + p[None, :] * X + c[:, None], mask=(p < P)[None, :] & (c < X)[:, None], other=0.0)
            h += tl.dot(x, a, input_precision="ieee")
        tl.store(part_ptr + (tl.program_id(1) * tokens + t)[:, None] * Q + p, h, mask=ok[:, None])
        tl.debug_barrier()  # every thread's part is written before the block counts itself
        if tl.atomic_add(count_ptr + tl.program_id(0), 1, sem="acq_rel") == spans - 1:
            total = tl.zeros((BT, Q), tl.float32)
            for at in range(0, spans, 8):  # eight loads under way at once
                for i in tl.static_range(8):
                    place = ((at + i) * tokens + t)[:, None] * Q + p
                    there = (ok & (tl.full((BT,), i, tl.int32) < spans - at))[:, None]
                    total += tl.load(part_ptr + place, mask=there, other=0.0, cache_modifier=".cg")
            tl.store(count_ptr + tl.program_id(0), 0)
            total = (total * s).to(kind)
            strip = x_ptr + t[:, None] * (X + R) + X
            tl.store(strip + p[None, :], total, mask=ok[:, None])
            rest = tl.arange(0, R)
            zero = tl.zeros((BT, R), kind)
            behind = ok[:, None] & (rest >= Q)[None, :]
            tl.store(strip + rest[None, :], zero, mask=behind)
            if KEEP:
                tl.store(keep_ptr + t[:, None] * R + p[None, :], total, mask=ok[:, None])
                tl.store(keep_ptr + t[:, None] * R + rest[None, :], zero, mask=behind)

    @triton.jit(do_not_specialize=["tokens", "parts"])
    def _norm_back(
        d_ptr, dx_ptr, a_ptr, drop_ptr, site_ptr, s, x_ptr, rstd_ptr, weight_ptr, along_ptr, tokens, parts,
        H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, DROP: tl.constexpr, C: tl.constexpr,
        BT: tl.constexpr, BH: tl.constexpr,
    ):  # fmt: skip
        """d += the gradient of RMSNorm's input: d [T, H] is the residual's own gradient, changed in place.

        along [parts <= C, T]: shares of Σ dy · y of a row, y being what the linear behind the norm gave. It is also the
        sum over columns of the norm's result times its gradient, since y is linear in the former: no pass over the row
        is needed first.
        """
        t = tl.program_id(0) * BT + tl.arange(0, BT)
        ok = t < tokens
        i = tl.arange(0, C)
        along = tl.load(along_ptr + i[:, None] * tokens + t, mask=(i < parts)[:, None] & ok[None, :], other=0.0)
        rstd = tl.load(rstd_ptr + t, mask=ok, other=0.0)
        back = tl.sum(along, 0) * rstd / H
        c = tl.program_id(1) * BH + tl.arange(0, BH)
        there = ok[:, None] & (c < H)[None, :]
        g = _through_lora(dx_ptr, a_ptr, drop_ptr, site_ptr, s, t, ok, c, H, R, P, Q, DROP)
        g *= tl.load(weight_ptr + c, mask=c < H, other=0.0).to(tl.float32)[None, :]
        x = tl.load(x_ptr + t[:, None] * H + c, mask=there, other=0.0).to(tl.float32)
        d = tl.load(d_ptr + t[:, None] * H + c, mask=there, other=0.0).to(tl.float32)
        d += rstd[:, None] * (g - x * back[:, None])
        tl.store(d_ptr + t[:, None] * H + c, d.to(d_ptr.dtype.element_ty), mask=there)

    @triton.jit
    def _along(dy_ptr, y_ptr, along_ptr, Y: tl.constexpr, B: tl.constexpr):
        """along [T] = Σ dy · y over each row."""
        t = tl.program_id(0).to(tl.int64)
        total = tl.zeros((B,), tl.float32)
        for at in range(0, Y, B):
            c = at + tl.arange(0, B)
            dy = tl.load(dy_ptr + t * Y + c, mask=c < Y, other=0.0).to(tl.float32)
            total += dy * tl.load(y_ptr + t * Y + c, mask=c < Y, other=0.0).to(tl.float32)
        tl.store(along_ptr + t, tl.sum(total, 0))

    @triton.jit
    def _plain_norm_back(d_ptr, dx_ptr, x_ptr, rstd_ptr, weight_ptr, H: tl.constexpr, BH: tl.constexpr):
        """The same where no adapter is, in one pass: a row a program, BH >= H."""
        t = tl.program_id(0).to(tl.int64)
        c = tl.arange(0, BH)
        g = tl.load(dx_ptr + t * H + c, mask=c < H, other=0.0).to(tl.float32)
        g *= tl.load(weight_ptr + c, mask=c < H, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + t * H + c, mask=c < H, other=0.0).to(tl.float32)
        d = tl.load(d_ptr + t * H + c, mask=c < H, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + t)
        d += rstd * (g - x * (tl.sum(g * x, 0) * rstd * rstd / H))
        tl.store(d_ptr + t * H + c, d.to(d_ptr.dtype.element_ty), mask=c < H)

    @triton.jit(do_not_specialize=["tokens"])
    def _input_back(
        dx_ptr, out_ptr, delta_ptr, y_ptr, a_ptr, drop_ptr, site_ptr, s, gain, tokens,
        X: tl.constexpr, R: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, DROP: tl.constexpr,
        BT: tl.constexpr, BH: tl.constexpr,
    ):  # fmt: skip
        """out [T, X] = gain · the gradient of x; for each head (BH columns), delta [N, T] = Σ out · y, which
        attention's backward begins with; y [T, X + R] is what attention gave."""
        t = tl.program_id(0) * BT + tl.arange(0, BT)
        ok = t < tokens
        c = tl.program_id(1) * BH + tl.arange(0, BH)
        there = ok[:, None] & (c < X)[None, :]
        d = gain * _through_lora(dx_ptr, a_ptr, drop_ptr, site_ptr, s, t, ok, c, X, R, P, Q, DROP)
        d = d.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + t[:, None] * X + c, d, mask=there)
        y = tl.load(y_ptr + t[:, None] * (X + R) + c, mask=there, other=0.0)
        delta = tl.sum(d.to(tl.float32) * y.to(tl.float32), 1)
        tl.store(delta_ptr + tl.program_id(1) * tokens + t, delta, mask=ok)

    @triton.jit(do_not_specialize=["tokens"])
    def _grads(
        dy_ptr, x_ptr, dx_ptr, drop_ptr, site_ptr, part_ptr, row_ptr, da_ptr, db_ptr, s, gain, tokens,
        X: tl.constexpr, Y: tl.constexpr, R: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, r: tl.constexpr,
        DROP: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
    ):  # fmt: skip
        """Adds the adapter's gradients: programs below ceil(Y / BC) take rows of dB = gain · dyᵀ h, the rest columns
        of dA = gain · s · dhᵀ dropout(x). part, row: int32 [Y], the part that an output row belongs to (-1: none) and
        its row of B."""
        block = tl.program_id(0)
        p = tl.arange(0, Q)
        first: tl.constexpr = (Y + BC - 1) // BC
        kind = x_ptr.dtype.element_ty
        if block < first:
            o = block * BC + tl.arange(0, BC)
            acc = tl.zeros((BC, Q), tl.float32)
            for at in range(0, tokens, BT):
                t = at + tl.arange(0, BT)
                ok = t < tokens
                dy = tl.load(dy_ptr + t[None, :] * Y + o[:, None], mask=ok[None, :] & (o < Y)[:, None], other=0.0)
                h = tl.load(x_ptr + t[:, None] * (X + R) + X + p, mask=ok[:, None], other=0.0)
                acc += tl.dot(dy, h, input_precision="ieee")
            part = tl.load(part_ptr + o, mask=o < Y, other=-1)
            row = tl.load(row_ptr + o, mask=o < Y, other=0)
            own = (part >= 0)[:, None] & (p[None, :] // r == part[:, None])
            place = row[:, None] * r + p[None, :] - part[:, None] * r
            tl.store(db_ptr + place, tl.load(db_ptr + place, mask=own, other=0.0) + gain * acc, mask=own)
        else:
            c = (block - first) * BC + tl.arange(0, BC)
            total = tl.zeros((Q, BC), tl.float32)
            for at in range(0, tokens, BT):
                t = at + tl.arange(0, BT)
                ok = t < tokens
                x = tl.load(x_ptr + t[:, None] * (X + R) + c, mask=ok[:, None] & (c < X)[None, :], other=0.0)
                if DROP:
                    kept, scale = _kept(drop_ptr, site_ptr, t, ok, c)
                    x = tl.where(kept, x * scale.to(kind), 0.0).to(kind)
                dh = tl.load(dx_ptr + t[None, :] * (X + R) + X + p[:, None], mask=ok[None, :], other=0.0)
                total += tl.dot(dh, x, input_precision="ieee")
            there = (p < P)[:, None] & (c < X)[None, :]
            spot = p[:, None] * X + c
            tl.store(da_ptr + spot, tl.load(da_ptr + spot, mask=there, other=0.0) + gain * s * total, mask=there)

    @triton.jit(do_not_specialize=["tokens"])
    def _silu_mul(gu_ptr, out_ptr, tokens, F: tl.constexpr, R: tl.constexpr, B: tl.constexpr):
        t = tl.program_id(0)
        c = tl.program_id(1) * B + tl.arange(0, B)
        g = tl.load(gu_ptr + t * 2 * F + c, mask=c < F, other=0.0)
        u = tl.load(gu_ptr + t * 2 * F + F + c, mask=c < F, other=0.0)
        wide = g.to(tl.float32)
        act = (wide / (1.0 + tl.exp(-wide))).to(g.dtype) * u
        tl.store(out_ptr + t * (F + R) + c, act, mask=c < F)

    @triton.jit(do_not_specialize=["tokens"])
    def _silu_mul_back(
        gu_ptr, dx_ptr, along_ptr, a_ptr, drop_ptr, site_ptr, s, gain, tokens,
        F: tl.constexpr, R: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, DROP: tl.constexpr, ALONG: tl.constexpr,
        AGAIN: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr,
    ):  # fmt: skip
        """gate|up becomes gain · its gradient, in place; dx [T, F + R] is the gradient behind silu(gate) · up.
        With ALONG, along [F / BH, T]: shares of Σ of both, see `_norm_back`. With AGAIN (R = 0), dx becomes
        silu(gate) · up."""
        t = tl.program_id(0) * BT + tl.arange(0, BT)
        ok = t < tokens
        c = tl.program_id(1) * BH + tl.arange(0, BH)
        there = ok[:, None] & (c < F)[None, :]
        d = gain * _through_lora(dx_ptr, a_ptr, drop_ptr, site_ptr, s, t, ok, c, F, R, P, Q, DROP)
        at = t[:, None] * (2 * F) + c
        g = tl.load(gu_ptr + at, mask=there, other=0.0).to(tl.float32)
        u = tl.load(gu_ptr + at + F, mask=there, other=0.0).to(tl.float32)
        gate = 1.0 / (1.0 + tl.exp(-g))
        kind = gu_ptr.dtype.element_ty
        if AGAIN:  # as `_silu_mul` rounds it
            tl.store(dx_ptr + t[:, None] * F + c, (g / (1.0 + tl.exp(-g))).to(kind) * u.to(kind), mask=there)
        dg, du = d * u * gate * (1.0 + g * (1.0 - gate)), d * g * gate
        if ALONG:
            tl.store(along_ptr + tl.program_id(1) * tokens + t, tl.sum(dg * g + du * u, 1), mask=ok)
        tl.store(gu_ptr + at, dg.to(kind), mask=there)
        tl.store(gu_ptr + at + F, du.to(kind), mask=there)
