"""Cross-entropy over supervised tokens only, in chunks, so that [P, V] logits never exist at once.

Legend: P supervised positions, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minitune.model import kernels

CHUNK = 2048


class _Select(torch.autograd.Function):
    """Rows of a matrix. Indexing's own backward sorts the indices; here a sum into zeros does, since a row that comes
    twice is padding, whose gradient is zero."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, index_P: Tensor) -> Tensor:
        ctx.save_for_backward(index_P)
        ctx.rows = x_TH.shape[0]
        return x_TH.index_select(0, index_P)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        d_TH = grads[0].new_zeros(ctx.rows, grads[0].shape[1])
        return d_TH.index_add_(0, ctx.saved_tensors[0], grads[0]), None


def select(x_TH: Tensor, index_P: Tensor) -> Tensor:
    """x[index], [P, H]."""
    return _Select.apply(x_TH, index_P)  # type: ignore[no-any-return]


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Forms d loss / d hidden (and d weight where the head learns) in the forward pass, chunk by chunk: the logits
    of a chunk are at hand then, and nothing of size V is kept for backward."""

    @staticmethod
    def forward(ctx: Any, h_PH: Tensor, weight_VH: Tensor, targets_P: Tensor, chunk: int, padding: int) -> Tensor:
        loss = h_PH.new_zeros((), dtype=torch.float32)
        need_h, need_w = ctx.needs_input_grad[:2]
        d_h = torch.empty_like(h_PH) if need_h else None
        d_w = torch.zeros_like(weight_VH) if need_w else None
        chunk_of, vocab = (_fused_chunk if fused(h_PH) else _chunk), weight_VH.shape[0]
        weight_WH = head_of(weight_VH, padding, unit_of(h_PH.device))
        for at in range(0, h_PH.shape[0], chunk):
            h, target = h_PH[at : at + chunk], targets_P[at : at + chunk]
            part, d_logits = chunk_of(h, weight_WH, target, vocab, need_h or need_w)
            loss = loss + part
            if d_h is not None:
                torch.mm(d_logits, weight_WH, out=d_h[at : at + chunk])
            if d_w is not None:
                d_w.addmm_(d_logits[:, :vocab].T, h)
            del d_logits  # else it would be there beside the next chunk's
        ctx.save_for_backward(*(t for t in (d_h, d_w) if t is not None))
        ctx.which = (need_h, need_w)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        # a 0-dim factor keeps the saved tensor's dtype
        d_h = saved.pop(0) * grads[0] if ctx.which[0] else None
        d_w = saved.pop(0) * grads[0] if ctx.which[1] else None
        return d_h, d_w, None, None, None


def head_of(weight_VH: Tensor, padding: int, unit: int) -> Tensor:
    """The weight [W, H] whose products have rows at multiples of `unit`: with the zero rows that lie behind it, or,
    where none do (it is a slice of several processes, made whole), a copy with some."""
    missing = 0 if padding else -weight_VH.shape[0] % unit
    return F.pad(weight_VH.detach(), (0, 0, 0, missing)) if missing else kernels.with_padding(weight_VH, padding)


def unit_of(device: torch.device) -> int:
    """Rows that begin elsewhere keep a card's matrix units off."""
    return 8 if device.type == "cuda" else 1


def fused(h_PH: Tensor) -> bool:
    """Whether the kernel that turns logits into their gradient in place serves here."""
    return h_PH.device.type == "cuda" and not kernels.why_not(h_PH.device)


def _fused_chunk(h: Tensor, weight: Tensor, target: Tensor, vocab: int, grad: bool) -> tuple[Tensor, Tensor]:
    logits = F.linear(h, weight)
    return kernels.cross_entropy_(logits, target, vocab, grad).sum(), logits


def _chunk(h: Tensor, weight: Tensor, target: Tensor, vocab: int, grad: bool) -> tuple[Tensor, Tensor]:
    """(summed loss, d loss / d logits in h's dtype) of one chunk."""
    logits = F.linear(h, weight).float()
    logits[:, vocab:] = -torch.inf
    counts = target >= 0
    safe = target.clamp(min=0)[:, None]
    lse = logits.logsumexp(-1, keepdim=True)
    loss = ((lse - logits.gather(-1, safe))[:, 0] * counts).sum()
    if not grad:
        return loss, loss
    d_logits = logits.sub_(lse).exp_()  # in place: a chunk of float32 logits is the largest thing there is
    d_logits.scatter_add_(-1, safe, torch.full_like(safe, -1, dtype=d_logits.dtype))
    return loss, d_logits.mul_(counts[:, None]).to(h.dtype)


def cross_entropy_sum(
    h_PH: Tensor, weight_VH: Tensor, targets_P: Tensor, chunk: int = CHUNK, padding: int = 0
) -> Tensor:
    """The summed cross-entropy (float32 scalar, nats) of `h @ weight.T` against `targets` (-100: not counted).

    Gradients flow to `h` and `weight` where they are required. Divide by the step's supervised tokens.
    `padding`: zero rows behind the weight in memory, which the multiplication may take along.
    """
    if torch.is_grad_enabled() and (h_PH.requires_grad or weight_VH.requires_grad):
        return _ChunkedCrossEntropy.apply(h_PH, weight_VH, targets_P, chunk, padding)
    chunk_of, weight_WH = (_fused_chunk if fused(h_PH) else _chunk), head_of(weight_VH, padding, unit_of(h_PH.device))
    parts = [
        chunk_of(h_PH[at : at + chunk], weight_WH, targets_P[at : at + chunk], weight_VH.shape[0], False)[0]
        for at in range(0, h_PH.shape[0], chunk)
    ]
    return torch.stack(parts).sum() if parts else h_PH.new_zeros((), dtype=torch.float32)
