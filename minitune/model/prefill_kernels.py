"""Triton kernels of a prompt's layers, between the multiplications (`model.prefill` launches them).

`_keep` puts the new keys, rotated, and values into their pages (`model.cache`); `_attend` rotates the queries and reads
all keys and values from pages, so that prompts from their beginning, those that continue kept pages and chunks are one
case. tests/model/test_prefill.py compares both with the plain layers, in Triton's interpreter where there is no card.

Legend: T packed tokens of all prompts, N query heads, K key/value heads, G = N / K, D head width, F = D / 2, P pages of
a sequence, B query rows a program, M keys a block, which lie in one page.
"""

from __future__ import annotations

from minitune.model.kernels import AVAILABLE

if AVAILABLE:
    import triton
    import triton.language as tl

    from minitune.model.kernels import _dot

    @triton.jit
    def _keep(
        qkv_ptr, cos_ptr, sin_ptr, position_ptr, slot_ptr, table_ptr, keys_ptr, values_ptr, table_stride,
        N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BK: tl.constexpr,
    ):  # fmt: skip
        """A token a program: its key heads, rotated in float32, and value heads into its place; BK >= K. Position -1:
        a token that pads, and has no place."""
        F: tl.constexpr = D // 2
        t = tl.program_id(0)
        head = tl.arange(0, BK)[:, None]
        f = tl.arange(0, F)[None, :]
        position = tl.load(position_ptr + t)
        ok = head < tl.where(position >= 0, K, 0)
        page = tl.load(table_ptr + tl.load(slot_ptr + t) * table_stride + position // PAGE)
        place = (page * PAGE + position % PAGE) * (K * D)
        qkv_ptr += t * ((N + 2 * K) * D) + N * D
        at = head * D + f
        cos = tl.load(cos_ptr + t * F + f)
        sin = tl.load(sin_ptr + t * F + f)
        a = tl.load(qkv_ptr + at, mask=ok, other=0.0).to(tl.float32)
        b = tl.load(qkv_ptr + at + F, mask=ok, other=0.0).to(tl.float32)
        kind = keys_ptr.dtype.element_ty
        tl.store(keys_ptr + place + at, (a * cos - b * sin).to(kind), mask=ok)
        tl.store(keys_ptr + place + at + F, (b * cos + a * sin).to(kind), mask=ok)
        d = tl.arange(0, D)[None, :]
        v = tl.load(qkv_ptr + K * D + head * D + d, mask=ok, other=0.0)
        tl.store(values_ptr + place + head * D + d, v, mask=ok)

    @triton.jit
    def _attend(
        qkv_ptr, cos_ptr, sin_ptr, block_ptr, table_ptr, keys_ptr, values_ptr, y_ptr, table_stride, log2e_scale,
        N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, B: tl.constexpr, M: tl.constexpr,
    ):  # fmt: skip
        """y [T, N · D]. A program is a head and a block of rows: int64 [4], its first row in the pack, its rows, the
        first one's position, its slot."""
        F: tl.constexpr = D // 2
        stride: tl.constexpr = (N + 2 * K) * D
        head = tl.program_id(0)
        block_ptr += tl.program_id(1) * 4
        first = tl.load(block_ptr).to(tl.int32)
        rows = tl.load(block_ptr + 1).to(tl.int32)
        position = tl.load(block_ptr + 2).to(tl.int32)
        table_ptr += tl.load(block_ptr + 3) * table_stride
        keys_ptr += head // (N // K) * D
        values_ptr += head // (N // K) * D
        i = tl.arange(0, B)
        d = tl.arange(0, D)[None, :]
        t = (first + i)[:, None]
        ok = (i < rows)[:, None]
        q_ptr = qkv_ptr + head * D
        cos = tl.load(cos_ptr + t * F + d % F, mask=ok, other=0.0)
        sin = tl.load(sin_ptr + t * F + d % F, mask=ok, other=0.0)
        a = tl.load(q_ptr + t * stride + d, mask=ok, other=0.0)
        b = tl.load(q_ptr + t * stride + (d + F) % D, mask=ok, other=0.0).to(tl.float32)
        q = (a.to(tl.float32) * cos + tl.where(d < F, -b, b) * sin).to(a.dtype)
        top = tl.full((B,), -1e30, tl.float32)
        total = tl.zeros((B,), tl.float32)
        acc = tl.zeros((B, D), tl.float32)
        j0 = tl.arange(0, M)
        end = position + rows
        for start in range(0, end, M):
            page = tl.load(table_ptr + start // PAGE)
            at = (page * PAGE + start % PAGE) * (K * D) + j0[:, None] * (K * D) + d
            # what lies behind the end may be another sequence's, and not finite
            there = (start + j0 < end)[:, None]
            k = tl.load(keys_ptr + at, mask=there, other=0.0)
            v = tl.load(values_ptr + at, mask=there, other=0.0)
            s = _dot(q, tl.trans(k)) * log2e_scale
            s = tl.where((start + j0)[None, :] <= (position + i)[:, None], s, -1e30)
            higher = tl.maximum(top, tl.max(s, 1))
            fade = tl.exp2(top - higher)
            p = tl.exp2(s - higher[:, None])
            total = total * fade + tl.sum(p, 1)
            acc = acc * fade[:, None] + _dot(p.to(v.dtype), v)
            top = higher
        # a sum is at least 1, but 0 in a block without rows
        y = (acc / tl.maximum(total, 1.0)[:, None]).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + t * (N * D) + head * D + d, y, mask=ok)
