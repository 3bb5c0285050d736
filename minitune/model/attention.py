"""Causal attention over packed documents: four ways to compute the same thing.

Legend: T packed tokens, N query heads, K key/value heads, D head width, S documents (or slots).
`varlen` is flash attention over variable lengths; `documents` goes document by document (CPU); `masked` is one
call with a block-diagonal mask, of static shape (older cards, float32 on a card). `short` is the Triton kernel that
rotates and attends in one launch (`rope_attention`). `reference` is the plain twin
that all of them, and cached decoding, are tested against.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from minitune.model import attention_kernels, kernels

Kernel = Literal["short", "varlen", "documents", "masked"]


def choose_kernel(device: torch.device, dtype: torch.dtype, head_dim: int = 0, longest: int = 0) -> Kernel:
    """The fastest way that exists for this device, dtype, head width and longest document (0: not known)."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return kernel_of(capability, kernels.AVAILABLE, dtype, head_dim, longest)


def kernel_of(
    capability: tuple[int, int], triton: bool, dtype: torch.dtype, head_dim: int = 0, longest: int = 0
) -> Kernel:
    """The same for a card of this compute capability, (0, 0) for a CPU; triton: whether kernels of ours can run."""
    if capability == (0, 0):
        return "documents"
    if dtype in (torch.bfloat16, torch.float16) and capability[0] >= 8:
        short = triton and head_dim in (32, 64, 128) and 0 < longest <= attention_kernels.LONGEST
        return "short" if short else "varlen"
    return "masked"


@dataclass(frozen=True)
class PackedLayout:
    """Where documents begin in a pack.

    cu_seqlens: int32 [S + 1], cumulative lengths, the last one repeated where a pack has fewer documents.
    lengths: the same on the host, for the `documents` kernel; may be empty for the others.
    max_seqlen: an upper bound of every length.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    lengths: tuple[int, ...]
    kernel: Kernel
    made: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @staticmethod
    def of(lengths: list[int], device: torch.device, dtype: torch.dtype) -> PackedLayout:
        """The layout of documents of these lengths, laid end to end."""
        cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
        return PackedLayout(cu, max(lengths), tuple(lengths), choose_kernel(device, dtype))

    def for_layer(self, index: int) -> PackedLayout:
        """Packed attention keeps nothing between layers."""
        return self

    def attend(self, q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, scale: float) -> Tensor:
        """Causal attention within each document -> [T, N, D]."""
        if self.kernel == "varlen":
            return _varlen(q_TND, k_TKD, v_TKD, self.cu_seqlens, self.max_seqlen, scale)
        if self.kernel == "documents":
            return _documents(q_TND, k_TKD, v_TKD, self.lengths, scale)
        return sdpa(q_TND, *alike(q_TND, k_TKD, v_TKD), scale, self._mask(q_TND))

    def _mask(self, q_TND: Tensor) -> Tensor:
        """0 where a token sees another, -inf elsewhere, [T, T] in q's dtype; all layers share one."""
        if "mask" not in self.made:
            tokens, dtype = q_TND.shape[0], q_TND.dtype
            ids_T = document_ids(self.cu_seqlens, tokens)
            at_T = torch.arange(tokens, device=q_TND.device)
            seen_TT = (ids_T[:, None] == ids_T) & (at_T[:, None] >= at_T)
            hidden = torch.full((), -torch.inf, dtype=dtype, device=q_TND.device)
            self.made["mask"] = torch.where(seen_TT, torch.zeros_like(hidden), hidden)
        return self.made["mask"]

    def length_T(self, tokens: int) -> Tensor:
        """The length of each token's document, [T]."""
        lengths = self.cu_seqlens.diff()
        return lengths[document_ids(self.cu_seqlens, tokens).clamp(max=lengths.numel() - 1)]


def document_ids(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The number of each token's document, [T]; tokens behind the last document share one number."""
    at_T = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.bucketize(at_T, cu_seqlens, right=True) - 1


def alike(q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values repeated to as many heads as there are queries, where a kernel takes no fewer: `varlen` of torch
    2.11, and the one that a card has for masks."""
    groups = q_TND.shape[1] // k_TKD.shape[1]
    if groups == 1:
        return k_TKD, v_TKD
    return k_TKD.repeat_interleave(groups, dim=1), v_TKD.repeat_interleave(groups, dim=1)


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    k, v = alike(q, k, v)
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale, window_size=(-1, 0))  # type: ignore[return-value]


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """[L, N, D], [M, K, D] -> [L, N, D]; causal where no mask is given."""
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    gqa = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=gqa)
    return out[0].transpose(0, 1)


def _documents(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float) -> Tensor:
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat([sdpa(*part, scale) for part in parts])


def reference(q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, lengths: list[int], scale: float | None = None) -> Tensor:
    """Attention as the formula says it, in float64, document by document; for tests."""
    scale = scale if scale is not None else 1 / math.sqrt(q_TND.shape[-1])
    groups, out = q_TND.shape[1] // k_TKD.shape[1], []
    for q, k, v in zip(q_TND.split(lengths), k_TKD.split(lengths), v_TKD.split(lengths), strict=True):
        k, v = (t.double().repeat_interleave(groups, dim=1) for t in (k, v))
        score_NLL = torch.einsum("lnd,mnd->nlm", q.double(), k) * scale
        causal_LL = torch.ones(score_NLL.shape[1:], dtype=torch.bool, device=q.device).tril()
        weight_NLL = score_NLL.masked_fill(~causal_LL, -math.inf).softmax(-1)
        out.append(torch.einsum("nlm,mnd->lnd", weight_NLL, v))
    return torch.cat(out).to(q_TND.dtype)
