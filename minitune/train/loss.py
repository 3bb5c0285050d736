"""Cross-entropy over supervised tokens only, in chunks, so that [P, V] logits never exist at once.

Legend: P supervised positions, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 2048


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Forms d loss / d hidden (and d weight where the head learns) in the forward pass, chunk by chunk: the logits
    of a chunk are at hand then, and nothing of size V is kept for backward."""

    @staticmethod
    def forward(ctx: Any, h_PH: Tensor, weight_VH: Tensor, targets_P: Tensor, chunk: int) -> Tensor:
        loss = h_PH.new_zeros((), dtype=torch.float32)
        need_h, need_w = ctx.needs_input_grad[:2]
        d_h = torch.empty_like(h_PH) if need_h else None
        d_w = torch.zeros_like(weight_VH) if need_w else None
        for at in range(0, h_PH.shape[0], chunk):
            h, target = h_PH[at : at + chunk], targets_P[at : at + chunk]
            part, d_logits = _chunk(h, weight_VH, target, need_h or need_w)
            loss = loss + part
            if d_h is not None:
                torch.mm(d_logits, weight_VH, out=d_h[at : at + chunk])
            if d_w is not None:
                d_w.addmm_(d_logits.T, h)
        ctx.save_for_backward(*(t for t in (d_h, d_w) if t is not None))
        ctx.which = (need_h, need_w)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        # a 0-dim factor keeps the saved tensor's dtype
        d_h = saved.pop(0) * grads[0] if ctx.which[0] else None
        d_w = saved.pop(0) * grads[0] if ctx.which[1] else None
        return d_h, d_w, None, None


def _chunk(h: Tensor, weight: Tensor, target: Tensor, grad: bool) -> tuple[Tensor, Tensor]:
    """(summed loss, d loss / d logits in h's dtype) of one chunk."""
    logits = F.linear(h, weight).float()
    counts = target >= 0
    safe = target.clamp(min=0)[:, None]
    lse = logits.logsumexp(-1, keepdim=True)
    loss = ((lse - logits.gather(-1, safe))[:, 0] * counts).sum()
    if not grad:
        return loss, loss
    d_logits = (logits - lse).exp_()
    d_logits.scatter_add_(-1, safe, torch.full_like(safe, -1, dtype=d_logits.dtype))
    return loss, (d_logits * counts[:, None]).to(h.dtype)


def cross_entropy_sum(h_PH: Tensor, weight_VH: Tensor, targets_P: Tensor, chunk: int = CHUNK) -> Tensor:
    """The summed cross-entropy (float32 scalar, nats) of `h @ weight.T` against `targets` (-100: not counted).

    Gradients flow to `h` and `weight` where they are required. Divide by the step's supervised tokens.
    """
    if torch.is_grad_enabled() and (h_PH.requires_grad or weight_VH.requires_grad):
        return _ChunkedCrossEntropy.apply(h_PH, weight_VH, targets_P, chunk)
    parts = [
        _chunk(h_PH[at : at + chunk], weight_VH, targets_P[at : at + chunk], False)[0]
        for at in range(0, h_PH.shape[0], chunk)
    ]
    return torch.stack(parts).sum() if parts else h_PH.new_zeros((), dtype=torch.float32)
