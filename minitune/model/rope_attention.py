"""The kernels of `attention_kernels` for autograd, as an operator of torch's.

Legend: T packed tokens, N query heads, K key/value heads, D head width, F = D / 2, X all columns of q|k|v.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minitune.model.attention_kernels import attend_backward, attend_forward


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
