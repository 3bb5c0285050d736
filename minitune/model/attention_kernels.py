"""Rotary and causal attention over packed short documents in one launch, q|k|v as they leave their linear, and their
gradient in two: documents of one block, and longer ones.

Flash attention's tiles of 128 waste most of their work on documents of some 50 tokens, and three more launches a layer
rotate and copy. Twin: `rope.rotate` and `attention.reference`.

Legend: T packed tokens, N query heads, K key/value heads, D head width, F = D / 2, S documents, R the width of the
strip behind the output in the fused layers (`model.fused`), 0 elsewhere.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minitune.model.kernels import AVAILABLE, launch

if TYPE_CHECKING:
    from minitune.model.fused_ops import Beside

BLOCK = 64  # tokens a tile; most documents are one, so that loads have nothing to run ahead of
LONGEST = 512  # tokens a document for which these kernels are chosen
# Backward of longer documents: at least so many programs, dealt into one of these numbers a head; primes above the
# blocks of a document, so that a program's blocks are not always the same one of equal documents.
PROGRAMS, STRIDES = 1500, (23, 47, 97, 199)
OPTIONS: dict[str, dict[str, int]] = {
    "forward": {"num_warps": 4, "num_stages": 1},
    "backward": {"num_warps": 4, "num_stages": 1},
}
# Of a thread in backward, one block and several: four and three programs a processor of an H100 instead of three and
# two. Elsewhere not measured; other types, wider heads and several query heads a key head would spill.
REGISTERS = 128, 168


if AVAILABLE:
    import triton
    import triton.language as tl

    from minitune.model.kernels import _dot

    @triton.jit
    def _locate(cu_ptr, documents, block, S: tl.constexpr, B: tl.constexpr, LEAST: tl.constexpr):
        """(first token, end, the block's place) of the document that the grid's `block` falls into, of the documents of
        at least LEAST tokens; end 0: none."""
        at = tl.arange(0, S)
        start = tl.load(cu_ptr + at, mask=at < documents, other=0)
        end = tl.load(cu_ptr + at + 1, mask=at < documents, other=0)
        blocks = tl.where(end - start >= LEAST, (end - start + B - 1) // B, 0)
        behind = tl.cumsum(blocks, 0)
        mine = (behind > block) & (behind - blocks <= block)
        first = tl.sum(tl.where(mine, start, 0), 0)
        last = tl.sum(tl.where(mine, end, 0), 0)
        place = block - tl.sum(tl.where(mine, behind - blocks, 0), 0)
        return first, last, place

    @triton.jit
    def _rotated(ptr, cos_ptr, sin_ptr, rows, ok, stride, F: tl.constexpr):
        """Both halves [B, F] of these rows of one head, rotated in float32, in the input's dtype."""
        f = tl.arange(0, F)
        a = tl.load(ptr + rows[:, None] * stride + f, mask=ok[:, None], other=0.0)
        b = tl.load(ptr + rows[:, None] * stride + F + f, mask=ok[:, None], other=0.0)
        cos = tl.load(cos_ptr + rows[:, None] * F + f, mask=ok[:, None], other=0.0)
        sin = tl.load(sin_ptr + rows[:, None] * F + f, mask=ok[:, None], other=0.0)
        x, y = a.to(tl.float32), b.to(tl.float32)
        return (x * cos - y * sin).to(a.dtype), (y * cos + x * sin).to(a.dtype)

    @triton.jit
    def _store_unrotated(ptr, cos_ptr, sin_ptr, rows, ok, stride, d1, d2, F: tl.constexpr):
        """Rotates a gradient back and stores both halves."""
        f = tl.arange(0, F)
        cos = tl.load(cos_ptr + rows[:, None] * F + f, mask=ok[:, None], other=0.0)
        sin = tl.load(sin_ptr + rows[:, None] * F + f, mask=ok[:, None], other=0.0)
        kind = ptr.dtype.element_ty
        tl.store(ptr + rows[:, None] * stride + f, (d1 * cos + d2 * sin).to(kind), mask=ok[:, None])
        tl.store(ptr + rows[:, None] * stride + F + f, (d2 * cos - d1 * sin).to(kind), mask=ok[:, None])

    @triton.jit(do_not_specialize=["tokens", "documents"])
    def _forward(
        qkv_ptr, cos_ptr, sin_ptr, cu_ptr, out_ptr, lse_ptr, strip_ptr, tokens, documents, scale,
        N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, S: tl.constexpr, B: tl.constexpr, R: tl.constexpr,
        STRIP: tl.constexpr,
    ):  # fmt: skip
        """out [T, N · D + R]; with STRIP, strip [T, R] is laid into the columns behind."""
        F: tl.constexpr = D // 2
        stride: tl.constexpr = (N + 2 * K) * D
        head = tl.program_id(0)  # heads of a document beside each other: they read the same rows
        kv = head // (N // K)
        first, last, place = _locate(cu_ptr, documents, tl.program_id(1), S, B, 1)
        if last > 0:
            d = tl.arange(0, D)
            i = first + place * B + tl.arange(0, B)
            ok = i < last
            q1, q2 = _rotated(qkv_ptr + head * D, cos_ptr, sin_ptr, i, ok, stride, F)
            top = tl.full((B,), -1e30, tl.float32)
            total = tl.zeros((B,), tl.float32)
            acc = tl.zeros((B, D), tl.float32)
            for block in range(0, place + 1):
                j = first + block * B + tl.arange(0, B)
                there = j < last
                k1, k2 = _rotated(qkv_ptr + (N + kv) * D, cos_ptr, sin_ptr, j, there, stride, F)
                v = tl.load(qkv_ptr + (N + K + kv) * D + j[:, None] * stride + d, mask=there[:, None], other=0.0)
                s = (_dot(q1, tl.trans(k1)) + _dot(q2, tl.trans(k2))) * (scale * 1.4426950408889634)
                s = tl.where((j[None, :] <= i[:, None]) & there[None, :], s, -1e30)
                higher = tl.maximum(top, tl.max(s, 1))
                p = tl.exp2(s - higher[:, None])
                fade = tl.exp2(top - higher)
                total = total * fade + tl.sum(p, 1)
                acc = acc * fade[:, None] + _dot(p.to(v.dtype), v)
                top = higher
            kind = out_ptr.dtype.element_ty
            out = (acc / total[:, None]).to(kind)
            c = head * D + d
            tl.store(out_ptr + i[:, None] * (N * D + R) + c, out, mask=ok[:, None])
            tl.store(lse_ptr + head * tokens + i, top + tl.log2(total), mask=ok)
            if STRIP and head == 0:
                r = tl.arange(0, R)
                strip = tl.load(strip_ptr + i[:, None] * R + r, mask=ok[:, None], other=0.0)
                tl.store(out_ptr + i[:, None] * (N * D + R) + N * D + r, strip, mask=ok[:, None])

    @triton.jit
    def _scores(q1, q2, k1, k2, do, v, delta, lse, i, j, ok, there, scale):
        """(weights, their gradient before the softmax) of query rows i and key rows j, in q's dtype."""
        s = (_dot(q1, tl.trans(k1)) + _dot(q2, tl.trans(k2))) * (scale * 1.4426950408889634)
        seen = (j[None, :] <= i[:, None]) & there[None, :] & ok[:, None]
        p = tl.where(seen, tl.exp2(s - lse[:, None]), 0.0)
        ds = p * (_dot(do, tl.trans(v)) - delta[:, None]) * scale
        return p.to(q1.dtype), ds.to(q1.dtype)

    @triton.jit
    def _query_side(
        qkv_ptr, cos_ptr, sin_ptr, delta_ptr, lse_ptr, dout_ptr, head, i, ok, tokens,
        stride: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    ):  # fmt: skip
        """What backward needs of one head's query rows: both halves of q, d out, delta, log2-sum-exp."""
        q1, q2 = _rotated(qkv_ptr + head * D, cos_ptr, sin_ptr, i, ok, stride, D // 2)
        do = tl.load(dout_ptr + i[:, None] * (N * D) + head * D + tl.arange(0, D), mask=ok[:, None], other=0.0)
        delta = tl.load(delta_ptr + head * tokens + i, mask=ok, other=0.0)
        lse = tl.load(lse_ptr + head * tokens + i, mask=ok, other=0.0)
        return q1, q2, do, delta, lse

    @triton.jit
    def _toward_keys(
        qkv_ptr, cos_ptr, sin_ptr, delta_ptr, lse_ptr, dout_ptr, head, i, there, k1, k2, v, j, ok, dk1, dk2, dv,
        tokens, scale, stride: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    ):  # fmt: skip
        """(dk's halves and dv of key rows j with what one head's query rows i add; the scores' gradient)."""
        q1, q2, do, delta, lse = _query_side(
            qkv_ptr, cos_ptr, sin_ptr, delta_ptr, lse_ptr, dout_ptr, head, i, there, tokens, stride, N, D
        )
        p, ds = _scores(q1, q2, k1, k2, do, v, delta, lse, i, j, there, ok, scale)
        dv += _dot(tl.trans(p), do)
        dk1 += _dot(tl.trans(ds), q1)
        dk2 += _dot(tl.trans(ds), q2)
        return dk1, dk2, dv, ds

    @triton.jit(do_not_specialize=["tokens"])
    def _backward_short(
        qkv_ptr, cos_ptr, sin_ptr, cu_ptr, delta_ptr, lse_ptr, dout_ptr, dqkv_ptr, tokens, scale,
        N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, B: tl.constexpr,
    ):  # fmt: skip
        """A program a (key head, document), where that is one block: all of its gradients from scores made once. Of one
        query head, each is stored before the next is made, so that little is held."""
        F: tl.constexpr = D // 2
        G: tl.constexpr = N // K
        stride: tl.constexpr = (N + 2 * K) * D
        kv = tl.program_id(0)
        first, last = tl.load(cu_ptr + tl.program_id(1)), tl.load(cu_ptr + tl.program_id(1) + 1)
        if (last > first) & (last - first <= B):
            i = first + tl.arange(0, B)
            ok = i < last
            k1, k2 = _rotated(qkv_ptr + (N + kv) * D, cos_ptr, sin_ptr, i, ok, stride, F)
            at = (N + K + kv) * D + i[:, None] * stride + tl.arange(0, D)
            v = tl.load(qkv_ptr + at, mask=ok[:, None], other=0.0)
            if G == 1:
                q1, q2, do, delta, lse = _query_side(
                    qkv_ptr, cos_ptr, sin_ptr, delta_ptr, lse_ptr, dout_ptr, kv, i, ok, tokens, stride, N, D
                )
                p, ds = _scores(q1, q2, k1, k2, do, v, delta, lse, i, i, ok, ok, scale)
                tl.store(dqkv_ptr + at, _dot(tl.trans(p), do).to(dqkv_ptr.dtype.element_ty), mask=ok[:, None])
                d1, d2 = _dot(tl.trans(ds), q1), _dot(tl.trans(ds), q2)
                _store_unrotated(dqkv_ptr + (N + kv) * D, cos_ptr, sin_ptr, i, ok, stride, d1, d2, F)
                d1, d2 = _dot(ds, k1), _dot(ds, k2)
                _store_unrotated(dqkv_ptr + kv * D, cos_ptr, sin_ptr, i, ok, stride, d1, d2, F)
            else:
                dk1, dk2 = tl.zeros((B, F), tl.float32), tl.zeros((B, F), tl.float32)
                dv = tl.zeros((B, D), tl.float32)
                for head in range(kv * G, kv * G + G):
                    dk1, dk2, dv, ds = _toward_keys(
                        qkv_ptr, cos_ptr, sin_ptr, delta_ptr, lse_ptr, dout_ptr, head, i, ok, k1, k2, v, i, ok,
                        dk1, dk2, dv, tokens, scale, stride, N, D,
                    )  # fmt: skip
                    d1, d2 = _dot(ds, k1), _dot(ds, k2)
                    _store_unrotated(dqkv_ptr + head * D, cos_ptr, sin_ptr, i, ok, stride, d1, d2, F)
                tl.store(dqkv_ptr + at, dv.to(dqkv_ptr.dtype.element_ty), mask=ok[:, None])
                _store_unrotated(dqkv_ptr + (N + kv) * D, cos_ptr, sin_ptr, i, ok, stride, dk1, dk2, F)

    @triton.jit(do_not_specialize=["tokens", "documents"])
    def _backward(
        qkv_ptr, cos_ptr, sin_ptr, cu_ptr, delta_ptr, lse_ptr, dout_ptr, dqkv_ptr, tokens, documents, scale,
        N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, S: tl.constexpr, B: tl.constexpr,
    ):  # fmt: skip
        """Documents of several blocks: programs of a key head for dk and dv of a block, and of a query head for dq. A
        program goes on to further blocks: how many there are is not known where it is launched."""
        F: tl.constexpr = D // 2
        G: tl.constexpr = N // K
        stride: tl.constexpr = (N + 2 * K) * D
        task, block = tl.program_id(0), tl.program_id(1)
        first, last, place = _locate(cu_ptr, documents, block, S, B, B + 1)
        while last > 0:
            mine = first + place * B + tl.arange(0, B)
            ok = mine < last
            if task < K:
                kv = task
                k1, k2 = _rotated(qkv_ptr + (N + kv) * D, cos_ptr, sin_ptr, mine, ok, stride, F)
                v_at = qkv_ptr + (N + K + kv) * D + mine[:, None] * stride + tl.arange(0, D)
                v = tl.load(v_at, mask=ok[:, None], other=0.0)
                dk1 = tl.zeros((B, F), tl.float32)
                dk2 = tl.zeros((B, F), tl.float32)
                dv = tl.zeros((B, D), tl.float32)
                for at in range(place * G, (last - first + B - 1) // B * G):
                    i = first + at // G * B + tl.arange(0, B)
                    dk1, dk2, dv, _ = _toward_keys(
                        qkv_ptr, cos_ptr, sin_ptr, delta_ptr, lse_ptr, dout_ptr, kv * G + at % G, i, i < last,
                        k1, k2, v, mine, ok, dk1, dk2, dv, tokens, scale, stride, N, D,
                    )  # fmt: skip
                _store_unrotated(dqkv_ptr + (N + kv) * D, cos_ptr, sin_ptr, mine, ok, stride, dk1, dk2, F)
                dv_at = dqkv_ptr + (N + K + kv) * D + mine[:, None] * stride + tl.arange(0, D)
                tl.store(dv_at, dv.to(dqkv_ptr.dtype.element_ty), mask=ok[:, None])
            else:
                head = task - K
                kv = head // G
                q1, q2, do, delta, lse = _query_side(
                    qkv_ptr, cos_ptr, sin_ptr, delta_ptr, lse_ptr, dout_ptr, head, mine, ok, tokens, stride, N, D
                )
                dq1 = tl.zeros((B, F), tl.float32)
                dq2 = tl.zeros((B, F), tl.float32)
                for other in range(0, place + 1):
                    j = first + other * B + tl.arange(0, B)
                    there = j < last
                    k1, k2 = _rotated(qkv_ptr + (N + kv) * D, cos_ptr, sin_ptr, j, there, stride, F)
                    v_at = qkv_ptr + (N + K + kv) * D + j[:, None] * stride + tl.arange(0, D)
                    v = tl.load(v_at, mask=there[:, None], other=0.0)
                    _, ds = _scores(q1, q2, k1, k2, do, v, delta, lse, mine, j, ok, there, scale)
                    dq1 += _dot(ds, k1)
                    dq2 += _dot(ds, k2)
                _store_unrotated(dqkv_ptr + head * D, cos_ptr, sin_ptr, mine, ok, stride, dq1, dq2, F)
            block += tl.num_programs(1)
            first, last, place = _locate(cu_ptr, documents, block, S, B, B + 1)


def _constants(qkv: Tensor, cu_seqlens: Tensor, heads: int, kv_heads: int) -> dict[str, int]:
    head_dim, documents = qkv.shape[1] // (heads + 2 * kv_heads), cu_seqlens.numel() - 1
    return {"N": heads, "K": kv_heads, "D": head_dim, "S": triton.next_power_of_2(documents), "B": BLOCK}


def _hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def attend_forward(
    qkv_TX: Tensor, cos_TF: Tensor, sin_TF: Tensor, cu_seqlens: Tensor, out: Tensor, heads: int, kv_heads: int,
    scale: float, strip_TR: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Fills the first N · D columns of `out` [T, N · D + R], and the rest from `strip` where there is one; returns
    log2-sum-exp [N, T]. See `rope_attention`."""
    tokens, documents = qkv_TX.shape[0], cu_seqlens.numel() - 1
    constants = _constants(qkv_TX, cu_seqlens, heads, kv_heads)
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=qkv_TX.device)
    launch(
        _forward, (heads, -(-tokens // BLOCK) + documents),
        qkv_TX, cos_TF, sin_TF, cu_seqlens, out, lse, out if strip_TR is None else strip_TR, tokens, documents, scale,
        **constants, R=out.shape[1] - heads * constants["D"], STRIP=strip_TR is not None, **OPTIONS["forward"],
    )  # fmt: skip
    return lse


def attend_backward(
    dout: Tensor, qkv_TX: Tensor, cos_TF: Tensor, sin_TF: Tensor, cu_seqlens: Tensor, delta: Tensor, lse: Tensor,
    heads: int, kv_heads: int, scale: float, beside: Beside | None = None,
) -> Tensor:  # fmt: skip
    """d qkv; dout [T, N · D] contiguous, delta [N, T] float32: the sum of dout · out over each head. beside: one of
    its own, on whose stream the documents of one block go, beside the longer ones."""
    tokens, documents = qkv_TX.shape[0], cu_seqlens.numel() - 1
    dqkv = torch.empty_like(qkv_TX)
    rows = qkv_TX, cos_TF, sin_TF, cu_seqlens, delta, lse, dout, dqkv
    constants = _constants(qkv_TX, cu_seqlens, heads, kv_heads)
    short, long = dict(OPTIONS["backward"]), dict(OPTIONS["backward"])
    if constants["D"] <= 64 and heads == kv_heads and dqkv.element_size() == 2 and _hopper():
        short["maxnreg"], long["maxnreg"] = REGISTERS
    one = {name: constants[name] for name in "NKDB"}
    with beside() if beside else nullcontext():  # all that it reads and writes lives until `join`
        launch(_backward_short, (kv_heads, documents), *rows, tokens, scale, **one, **short)
    tasks = kv_heads + heads
    blocks = -(-tokens // BLOCK) + min(documents, tokens // (BLOCK + 1))
    many = next((many for many in STRIDES if many * tasks >= PROGRAMS), STRIDES[-1])
    launch(_backward, (tasks, min(blocks, many)), *rows, tokens, documents, scale, **constants, **long)
    if beside:
        beside.join()
    return dqkv
