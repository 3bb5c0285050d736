"""The few Triton kernels that a library does not have, each with its plain twin.

rope_attention   rotary and causal attention over packed short documents in one launch, q|k|v as they leave their
                 linear. Twin: `rope.rotate` and `attention.reference`. Flash attention's tiles of 128 waste most of
                 their work on documents of some 50 tokens, and three more launches a layer rotate and copy.
cross_entropy_   softmax, loss and its gradient over logits, in place. Twin: `train.loss._chunk`.

Legend: T packed tokens, N query heads, K key/value heads, D head width, F = D / 2, S documents, P positions,
V vocabulary. Importing this module needs Triton; `AVAILABLE` says whether it is there.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    AVAILABLE = True
except ImportError:  # the CPU builds of PyTorch come without it
    AVAILABLE = False

BLOCK = 64  # tokens a tile of attention; most documents are one, so that loads have nothing to run ahead of
LONGEST = 512  # tokens a document for which the short-document kernel is chosen


def ampere(device: torch.device) -> bool:
    """Whether it is a card of compute capability 8.0 or newer: bfloat16, flash attention and Triton ask for one."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8


def why_not(device: torch.device) -> str:
    """Why the kernels don't run on a device; "" where they do (on the CPU: in Triton's interpreter)."""
    if device.type == "cuda" and not ampere(device):
        return "the card is older than Ampere"
    return "" if AVAILABLE else "Triton is not installed"


if AVAILABLE:

    @triton.jit
    def _dot(a, b):
        """float32 stays float32 (the matrix units would round it to 10 bits); half precision is not touched."""
        return tl.dot(a, b, input_precision="ieee")

    @triton.jit
    def _locate(cu_ptr, documents, block, S: tl.constexpr, B: tl.constexpr):
        """(first token, end, the block's place) of the document that the grid's `block` falls into; end 0: none."""
        at = tl.arange(0, S)
        start = tl.load(cu_ptr + at, mask=at < documents, other=0)
        end = tl.load(cu_ptr + at + 1, mask=at < documents, other=0)
        blocks = (end - start + B - 1) // B
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

    @triton.jit
    def _forward(
        qkv_ptr, cos_ptr, sin_ptr, cu_ptr, out_ptr, lse_ptr, tokens, documents, scale, out_stride,
        N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, S: tl.constexpr, B: tl.constexpr,
    ):  # fmt: skip
        F: tl.constexpr = D // 2
        stride: tl.constexpr = (N + 2 * K) * D
        head = tl.program_id(1)
        kv = head // (N // K)
        first, last, place = _locate(cu_ptr, documents, tl.program_id(0), S, B)
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
            out = acc / total[:, None]
            kind = out_ptr.dtype.element_ty
            tl.store(out_ptr + i[:, None] * out_stride + head * D + d, out.to(kind), mask=ok[:, None])
            tl.store(lse_ptr + head * tokens + i, top + tl.log2(total), mask=ok)

    @triton.jit
    def _backward(
        qkv_ptr, cos_ptr, sin_ptr, cu_ptr, delta_ptr, lse_ptr, dout_ptr, dqkv_ptr, tokens, documents, scale,
        N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, S: tl.constexpr, B: tl.constexpr,
    ):  # fmt: skip
        """One program a (block, key head) for dk and dv, and one a (block, query head) for dq. Where a document is one
        block and each query head has its own keys, the former's scores are all there is: it stores dq too."""
        F: tl.constexpr = D // 2
        G: tl.constexpr = N // K
        stride: tl.constexpr = (N + 2 * K) * D
        task = tl.program_id(1)
        first, last, place = _locate(cu_ptr, documents, tl.program_id(0), S, B)
        d = tl.arange(0, D)
        log2e_scale = scale * 1.4426950408889634
        if last > 0:
            mine = first + place * B + tl.arange(0, B)
            ok = mine < last
            if (task < N) & ((G > 1) | (last - first > B)):
                head = task
                kv = head // G
                q1, q2 = _rotated(qkv_ptr + head * D, cos_ptr, sin_ptr, mine, ok, stride, F)
                at = mine[:, None] * (N * D) + head * D + d
                do = tl.load(dout_ptr + at, mask=ok[:, None], other=0.0)
                delta = tl.load(delta_ptr + head * tokens + mine, mask=ok, other=0.0)
                lse = tl.load(lse_ptr + head * tokens + mine, mask=ok, other=0.0)
                dq1 = tl.zeros((B, F), tl.float32)
                dq2 = tl.zeros((B, F), tl.float32)
                for block in range(0, place + 1):
                    j = first + block * B + tl.arange(0, B)
                    there = j < last
                    k1, k2 = _rotated(qkv_ptr + (N + kv) * D, cos_ptr, sin_ptr, j, there, stride, F)
                    v = tl.load(qkv_ptr + (N + K + kv) * D + j[:, None] * stride + d, mask=there[:, None], other=0.0)
                    s = (_dot(q1, tl.trans(k1)) + _dot(q2, tl.trans(k2))) * log2e_scale
                    seen = (j[None, :] <= mine[:, None]) & there[None, :] & ok[:, None]
                    p = tl.where(seen, tl.exp2(s - lse[:, None]), 0.0)
                    ds = (p * (_dot(do, tl.trans(v)) - delta[:, None]) * scale).to(k1.dtype)
                    dq1 += _dot(ds, k1)
                    dq2 += _dot(ds, k2)
                _store_unrotated(dqkv_ptr + head * D, cos_ptr, sin_ptr, mine, ok, stride, dq1, dq2, F)
            if task >= N:
                kv = task - N
                k1, k2 = _rotated(qkv_ptr + (N + kv) * D, cos_ptr, sin_ptr, mine, ok, stride, F)
                v = tl.load(qkv_ptr + (N + K + kv) * D + mine[:, None] * stride + d, mask=ok[:, None], other=0.0)
                dk1 = tl.zeros((B, F), tl.float32)
                dk2 = tl.zeros((B, F), tl.float32)
                dv = tl.zeros((B, D), tl.float32)
                for block in range(place, (last - first + B - 1) // B):
                    i = first + block * B + tl.arange(0, B)
                    there = i < last
                    for g in range(0, G):
                        head = kv * G + g
                        q1, q2 = _rotated(qkv_ptr + head * D, cos_ptr, sin_ptr, i, there, stride, F)
                        at = i[:, None] * (N * D) + head * D + d
                        do = tl.load(dout_ptr + at, mask=there[:, None], other=0.0)
                        delta = tl.load(delta_ptr + head * tokens + i, mask=there, other=0.0)
                        lse = tl.load(lse_ptr + head * tokens + i, mask=there, other=0.0)
                        s = (_dot(q1, tl.trans(k1)) + _dot(q2, tl.trans(k2))) * log2e_scale
                        seen = (mine[None, :] <= i[:, None]) & there[:, None] & ok[None, :]
                        p = tl.where(seen, tl.exp2(s - lse[:, None]), 0.0)
                        dv += _dot(tl.trans(p.to(do.dtype)), do)
                        ds = (p * (_dot(do, tl.trans(v)) - delta[:, None]) * scale).to(q1.dtype)
                        dk1 += _dot(tl.trans(ds), q1)
                        dk2 += _dot(tl.trans(ds), q2)
                        if (G == 1) & (last - first <= B):
                            dq1 = _dot(ds, k1)
                            dq2 = _dot(ds, k2)
                            _store_unrotated(dqkv_ptr + head * D, cos_ptr, sin_ptr, i, there, stride, dq1, dq2, F)
                _store_unrotated(dqkv_ptr + (N + kv) * D, cos_ptr, sin_ptr, mine, ok, stride, dk1, dk2, F)
                kind = dqkv_ptr.dtype.element_ty
                tl.store(dqkv_ptr + (N + K + kv) * D + mine[:, None] * stride + d, dv.to(kind), mask=ok[:, None])

    @triton.jit
    def _cross_entropy(logits_ptr, targets_ptr, loss_ptr, vocab, width, stride, B: tl.constexpr, GRAD: tl.constexpr):
        """One program a row: its loss, and in place of its logits their gradient; columns behind `vocab` become 0."""
        row = tl.program_id(0).to(tl.int64)
        logits_ptr += row * stride
        target = tl.load(targets_ptr + row)
        top = -float("inf")
        total = 0.0
        for at in range(0, vocab, B):
            c = at + tl.arange(0, B)
            x = tl.load(logits_ptr + c, mask=c < vocab, other=-float("inf")).to(tl.float32)
            higher = tl.maximum(top, tl.max(x, 0))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
            top = higher
        lse = top + tl.log(total)
        counts = target >= 0
        hit = tl.load(logits_ptr + tl.maximum(target, 0)).to(tl.float32)
        tl.store(loss_ptr + row, tl.where(counts, lse - hit, 0.0))
        if GRAD:
            for at in range(0, width, B):
                c = at + tl.arange(0, B)
                x = tl.load(logits_ptr + c, mask=c < vocab, other=-float("inf")).to(tl.float32)
                d = tl.exp(x - lse) - tl.where(c == target, 1.0, 0.0)
                d = tl.where(counts & (c < vocab), d, 0.0)
                tl.store(logits_ptr + c, d.to(logits_ptr.dtype.element_ty), mask=c < width)


def _grid(tokens: int, documents: int, tasks: int) -> tuple[int, int]:
    return (-(-tokens // BLOCK) + documents, tasks)


def attend_forward(
    qkv_TX: Tensor,
    cos_TF: Tensor,
    sin_TF: Tensor,
    cu_seqlens: Tensor,
    out: Tensor,
    heads: int,
    kv_heads: int,
    scale: float,
) -> Tensor:
    """Fills the first N · D columns of `out` [T, at least N · D]; returns log2-sum-exp [N, T]. See `rope_attention`."""
    tokens, width = qkv_TX.shape
    head_dim, documents = width // (heads + 2 * kv_heads), cu_seqlens.numel() - 1
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=qkv_TX.device)
    _forward[_grid(tokens, documents, heads)](
        qkv_TX, cos_TF, sin_TF, cu_seqlens, out, lse, tokens, documents, scale, out.stride(0),
        N=heads, K=kv_heads, D=head_dim, S=triton.next_power_of_2(documents), B=BLOCK, num_warps=4, num_stages=1,
    )  # fmt: skip
    return lse


def attend_backward(
    dout: Tensor, qkv_TX: Tensor, cos_TF: Tensor, sin_TF: Tensor, cu_seqlens: Tensor, delta: Tensor, lse: Tensor,
    heads: int, kv_heads: int, scale: float,
) -> Tensor:  # fmt: skip
    """d qkv; dout [T, N · D] contiguous, delta [N, T] float32: the sum of dout · out over each head."""
    tokens, width = qkv_TX.shape
    head_dim, documents = width // (heads + 2 * kv_heads), cu_seqlens.numel() - 1
    dqkv = torch.empty_like(qkv_TX)
    _backward[_grid(tokens, documents, heads + kv_heads)](
        qkv_TX, cos_TF, sin_TF, cu_seqlens, delta, lse, dout, dqkv, tokens, documents, scale,
        N=heads, K=kv_heads, D=head_dim, S=triton.next_power_of_2(documents), B=BLOCK, num_warps=4, num_stages=1,
    )  # fmt: skip
    return dqkv


@torch.library.custom_op("minitune::rope_attention", mutates_args=())
def rope_attention(
    qkv_TX: Tensor, cos_TF: Tensor, sin_TF: Tensor, cu_seqlens: Tensor, heads: int, kv_heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Rotates q and k and attends causally within each document.

    qkv_TX: [T, (N + 2K) · D], contiguous, D a power of two from 32 to 128. cos_TF, sin_TF: float32 [T, F], contiguous.
    cu_seqlens: int32 [S + 1], covering all T tokens. Returns (out [T, N · D], log2-sum-exp [N, T] float32).
    """
    width = heads * (qkv_TX.shape[1] // (heads + 2 * kv_heads))
    out = torch.empty(qkv_TX.shape[0], width, dtype=qkv_TX.dtype, device=qkv_TX.device)
    return out, attend_forward(qkv_TX, cos_TF, sin_TF, cu_seqlens, out, heads, kv_heads, scale)


@rope_attention.register_fake
def _(qkv_TX, cos_TF, sin_TF, cu_seqlens, heads, kv_heads, scale):
    tokens, width = qkv_TX.shape
    head_dim = width // (heads + 2 * kv_heads)
    return qkv_TX.new_empty(tokens, heads * head_dim), qkv_TX.new_empty(heads, tokens, dtype=torch.float32)


@torch.library.custom_op("minitune::rope_attention_backward", mutates_args=())
def rope_attention_backward(
    dout: Tensor,
    qkv_TX: Tensor,
    cos_TF: Tensor,
    sin_TF: Tensor,
    cu_seqlens: Tensor,
    out: Tensor,
    lse: Tensor,
    heads: int,
    kv_heads: int,
    scale: float,
) -> Tensor:
    """d loss / d qkv of `rope_attention`."""
    delta = (dout.float() * out.float()).view(out.shape[0], heads, -1).sum(-1).T.contiguous()
    return attend_backward(dout.contiguous(), qkv_TX, cos_TF, sin_TF, cu_seqlens, delta, lse, heads, kv_heads, scale)


@rope_attention_backward.register_fake
def _(dout, qkv_TX, cos_TF, sin_TF, cu_seqlens, out, lse, heads, kv_heads, scale):
    return torch.empty_like(qkv_TX)


def _save(ctx, inputs, output):
    qkv, cos, sin, cu, ctx.heads, ctx.kv_heads, ctx.scale = inputs
    ctx.save_for_backward(qkv, cos, sin, cu, *output)


def _differentiate(ctx, dout, dlse):
    qkv, cos, sin, cu, out, lse = ctx.saved_tensors
    dqkv = rope_attention_backward(dout, qkv, cos, sin, cu, out, lse, ctx.heads, ctx.kv_heads, ctx.scale)
    return dqkv, None, None, None, None, None, None


rope_attention.register_autograd(_differentiate, setup_context=_save)


def cross_entropy_(logits_PW: Tensor, targets_P: Tensor, vocab: int, grad: bool) -> Tensor:
    """The loss of each row, float32 [P]; with `grad`, the logits become d loss / d logits in place.

    logits_PW: [P, W], W >= vocab; columns from `vocab` on are padding. targets: int64, -100 where nothing counts.
    """
    rows, width = logits_PW.shape
    loss = torch.empty(rows, dtype=torch.float32, device=logits_PW.device)
    if rows:
        _cross_entropy[(rows,)](
            logits_PW, targets_P, loss, vocab, width, logits_PW.stride(0), B=4096, GRAD=grad, num_warps=8
        )
    return loss
