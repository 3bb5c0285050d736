"""Triton kernels of a decode step's attention: one query a row over keys and values in pages (`model.cache`).

A program is a (row, key head, split): it rotates its heads' query and the new key, reads the row's pages up to the
row's own length, block by block and SPLITS blocks on, and keeps the new key and value in their page. With SPLITS > 1
`_merge` joins what the splits found. Legend and PDL as in `decode_kernels`; M keys a block, Q query heads of a tile.
"""

from __future__ import annotations

from minitune.model.kernels import AVAILABLE

if AVAILABLE:
    import triton
    import triton.language as tl

    from minitune.model.decode_kernels import _after_predecessor

    @triton.jit
    def _turned(ptr, cos_ptr, sin_ptr, F: tl.constexpr):
        """A head [D] of one row, rotated in float32, in its dtype."""
        d = tl.arange(0, 2 * F)
        a = tl.load(ptr + d)
        b = tl.load(ptr + (d + F) % (2 * F)).to(tl.float32)
        cos = tl.load(cos_ptr + d % F)
        sin = tl.load(sin_ptr + d % F)
        return (a.to(tl.float32) * cos + tl.where(d < F, -b, b) * sin).to(a.dtype)

    @triton.jit
    def _block(
        keys_ptr, values_ptr, pages_ptr, j, d, position, K: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
        PAGE: tl.constexpr,
    ):  # fmt: skip
        """Keys and values [M, D] of the places j [M] before `position`; zeros elsewhere. The page does not wait for the
        position: each load less in a row is half a microsecond."""
        there = j < position
        page = tl.load(pages_ptr + tl.minimum(j // PAGE, P - 1))
        at = ((page * PAGE + j % PAGE) * (K * D))[:, None] + d[None, :]
        k = tl.load(keys_ptr + at, mask=there[:, None], other=0.0)
        v = tl.load(values_ptr + at, mask=there[:, None], other=0.0)
        return k, v

    @triton.jit
    def _one_query(
        q, k, v, k_new, v_new, first, position, split, keys_ptr, values_ptr, pages_ptr, j0, d, scale,
        K: tl.constexpr, D: tl.constexpr, P: tl.constexpr, PAGE: tl.constexpr, M: tl.constexpr, SPLITS: tl.constexpr,
        STAGES: tl.constexpr,
    ):  # fmt: skip
        """(top, total, out [D]) of a head with keys of its own. Each of a block's M places is a softmax of its own
        until the end: nothing moves between threads in the loop but the sum over D."""
        q = q.to(tl.float32)
        top = tl.full((M,), -1e30, tl.float32)
        total = tl.zeros((M,), tl.float32)
        acc = tl.zeros((M, D), tl.float32)
        for start in tl.range(first, position, M * SPLITS, num_stages=STAGES):
            ok = start + j0 < position
            if STAGES > 1:
                k, v = _block(keys_ptr, values_ptr, pages_ptr, start + j0, d, position, K, D, P, PAGE)
            s = tl.where(ok, tl.sum(k.to(tl.float32) * q[None, :], 1) * scale, -1e30)
            v_now = v
            if STAGES == 1:  # the next block is under way while this one is summed
                k, v = _block(keys_ptr, values_ptr, pages_ptr, start + M * SPLITS + j0, d, position, K, D, P, PAGE)
            higher = tl.maximum(top, s)
            fade = tl.exp2(top - higher)
            p = tl.where(ok, tl.exp2(s - higher), 0.0)
            total = total * fade + p
            acc = acc * fade[:, None] + p[:, None] * v_now.to(tl.float32)
            top = higher
        s_new = tl.where(split == 0, tl.sum(q * k_new.to(tl.float32), 0) * scale, -1e30)
        best = tl.maximum(tl.max(top, 0), s_new)
        weight = tl.exp2(top - best)
        p_new = tl.where(split == 0, tl.exp2(s_new - best), 0.0)
        out = tl.sum(acc * weight[:, None], 0) + p_new * v_new.to(tl.float32)
        return best, tl.sum(total * weight, 0) + p_new, out

    @triton.jit
    def _many_queries(
        q, k, v, k_new, v_new, first, position, split, keys_ptr, values_ptr, pages_ptr, j0, d, scale,
        K: tl.constexpr, D: tl.constexpr, P: tl.constexpr, PAGE: tl.constexpr, M: tl.constexpr, SPLITS: tl.constexpr,
        Q: tl.constexpr,
    ):  # fmt: skip
        """(top [Q], total [Q], out [Q, D]) of the query heads that share a key head."""
        top = tl.full((Q,), -1e30, tl.float32)
        total = tl.zeros((Q,), tl.float32)
        acc = tl.zeros((Q, D), tl.float32)
        for start in range(first, position, M * SPLITS):
            ok = (start + j0 < position)[None, :]
            s = tl.where(ok, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, -1e30)
            v_now = v
            k, v = _block(keys_ptr, values_ptr, pages_ptr, start + M * SPLITS + j0, d, position, K, D, P, PAGE)
            higher = tl.maximum(top, tl.max(s, 1))
            fade = tl.exp2(top - higher)
            p = tl.where(ok, tl.exp2(s - higher[:, None]), 0.0)
            total = total * fade + tl.sum(p, 1)
            acc = acc * fade[:, None] + tl.dot(p.to(v_now.dtype), v_now, input_precision="ieee")
            top = higher
        s_new = tl.sum(q.to(tl.float32) * k_new.to(tl.float32)[None, :], 1) * scale
        s_new = tl.where(split == 0, s_new, -1e30)
        best = tl.maximum(top, s_new)
        fade = tl.exp2(top - best)
        p_new = tl.where(split == 0, tl.exp2(s_new - best), 0.0)
        return best, total * fade + p_new, acc * fade[:, None] + p_new[:, None] * v_new.to(tl.float32)[None, :]

    @triton.jit
    def _turned_heads(ptr, cos_ptr, sin_ptr, g, F: tl.constexpr, G: tl.constexpr):
        """As `_turned`, of the G heads that lie one behind the other: [Q, D], zeros behind them."""
        d = tl.arange(0, 2 * F)[None, :]
        ok = (g < G)[:, None]
        at = (g * 2 * F)[:, None]
        a = tl.load(ptr + at + d, mask=ok, other=0.0)
        b = tl.load(ptr + at + (d + F) % (2 * F), mask=ok, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + d % F)
        sin = tl.load(sin_ptr + d % F)
        return (a.to(tl.float32) * cos + tl.where(d < F, -b, b) * sin).to(a.dtype)

    @triton.jit
    def _attend(
        qkv_ptr, cos_ptr, sin_ptr, at_ptr, pages_ptr, keys_ptr, values_ptr, y_ptr, part_ptr, mass_ptr, log2e_scale,
        N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, P: tl.constexpr, PAGE: tl.constexpr, M: tl.constexpr,
        SPLITS: tl.constexpr, Q: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """y [B, N · D]; with SPLITS > 1 instead part [B, N, SPLITS, D] and mass [B, N, SPLITS, 2] float32: sums that
        are not divided yet, and the (top, total) that they go with."""
        F: tl.constexpr = D // 2
        G: tl.constexpr = N // K
        row = tl.program_id(0) // K
        kv = tl.program_id(0) % K
        split = tl.program_id(1)
        j0 = tl.arange(0, M)
        d = tl.arange(0, D)
        pages_ptr += row * P
        position = tl.load(at_ptr + row).to(tl.int32)
        keys_ptr += kv * D
        values_ptr += kv * D
        first = split * M
        k, v = _block(keys_ptr, values_ptr, pages_ptr, first + j0, d, position, K, D, P, PAGE)
        new = (tl.load(pages_ptr + position // PAGE) * PAGE + position % PAGE) * (K * D) + d
        _after_predecessor(PDL)
        qkv_ptr += row * ((N + 2 * K) * D)
        cos_ptr += row * F
        sin_ptr += row * F
        k_new = _turned(qkv_ptr + (N + kv) * D, cos_ptr, sin_ptr, F)
        v_new = tl.load(qkv_ptr + (N + K + kv) * D + d)
        g = tl.arange(0, Q)
        head = row * N + kv * G + g
        ok = g < G
        if G == 1:
            q = _turned(qkv_ptr + kv * D, cos_ptr, sin_ptr, F)
            best, total, out = _one_query(
                q, k, v, k_new, v_new, first, position, split, keys_ptr, values_ptr, pages_ptr, j0, d, log2e_scale,
                K, D, P, PAGE, M, SPLITS, STAGES,
            )  # fmt: skip
            best = tl.full((Q,), 0.0, tl.float32) + best
            total = tl.full((Q,), 0.0, tl.float32) + total
            out = out[None, :]
        else:
            q = _turned_heads(qkv_ptr + kv * G * D, cos_ptr, sin_ptr, g, F, G)
            best, total, out = _many_queries(
                q, k, v, k_new, v_new, first, position, split, keys_ptr, values_ptr, pages_ptr, j0, d, log2e_scale,
                K, D, P, PAGE, M, SPLITS, Q,
            )  # fmt: skip
        if SPLITS == 1:
            y = (out / total[:, None]).to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + head[:, None] * D + d[None, :], y, mask=ok[:, None])
        else:
            spot = head * SPLITS + split
            tl.store(part_ptr + spot[:, None] * D + d[None, :], out, mask=ok[:, None])
            tl.store(mass_ptr + spot * 2, best, mask=ok)
            tl.store(mass_ptr + spot * 2 + 1, total, mask=ok)
        if split == 0:
            tl.store(keys_ptr + new, k_new)
            tl.store(values_ptr + new, v_new)

    @triton.jit
    def _merge(part_ptr, mass_ptr, y_ptr, D: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr):
        """A head of a row a program: the splits' sums, each at its top's weight, over their totals."""
        _after_predecessor(PDL)
        head = tl.program_id(0)
        s = tl.arange(0, SPLITS)
        d = tl.arange(0, D)
        top = tl.load(mass_ptr + (head * SPLITS + s) * 2)
        weight = tl.exp2(top - tl.max(top, 0))
        total = tl.sum(tl.load(mass_ptr + (head * SPLITS + s) * 2 + 1) * weight, 0)
        part = tl.load(part_ptr + (head * SPLITS + s)[:, None] * D + d[None, :])
        y = tl.sum(part * weight[:, None], 0) / total
        tl.store(y_ptr + head * D + d, y.to(y_ptr.dtype.element_ty))
