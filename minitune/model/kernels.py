"""Triton kernels: what all of them share, and the one of the loss.

cross_entropy_   softmax, loss and its gradient over logits, in place. Twin: `train.loss._chunk`.

Importing this module needs no Triton; `AVAILABLE` says whether it is there. Legend: P positions, V vocabulary; that of
`fused_kernels` for what the fused layers share.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    AVAILABLE = True
except ImportError:  # the CPU builds of PyTorch come without it
    AVAILABLE = False


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
    def _mix32(x):
        """`lora.mix32` on uint32."""
        x = x ^ (x >> 16)
        x = x * 0x7FEB352D
        x = x ^ (x >> 15)
        x = x * 0x846CA68B
        return x ^ (x >> 16)

    @triton.jit
    def _kept(drop_ptr, site_ptr, rows, ok, columns):
        """(which of these [rows, columns] dropout keeps, its scale): `lora.Dropout`, draw for draw.

        drop_ptr: int32 [2 + T]: threshold, the bits of the float32 scale, the tokens' keys.
        """
        threshold = tl.load(drop_ptr)
        scale = tl.load(drop_ptr + 1).to(tl.float32, bitcast=True)
        key = tl.load(drop_ptr + 2 + rows, mask=ok, other=0).to(tl.uint32, bitcast=True)
        site = _mix32(tl.load(site_ptr).to(tl.uint32, bitcast=True))
        column = _mix32(columns.to(tl.uint32) ^ site)
        draw = _mix32(key[:, None] ^ column[None, :]).to(tl.int32, bitcast=True)
        return draw >= threshold, scale

    @triton.jit
    def _through_lora(
        dx_ptr, a_ptr, drop_ptr, site_ptr, s, rows, ok, c,
        X: tl.constexpr, R: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, DROP: tl.constexpr,
    ):  # fmt: skip
        """These [rows, c] of the gradient of x: dx of [dx | dh], and dropout's other side of s · dh A. Float32."""
        inside = ok[:, None] & (c < X)[None, :]
        d = tl.load(dx_ptr + rows[:, None] * (X + R) + c, mask=inside, other=0.0)
        out = d.to(tl.float32)
        if R > 0:
            p = tl.arange(0, Q)
            dh = tl.load(dx_ptr + rows[:, None] * (X + R) + X + p, mask=ok[:, None], other=0.0)
            a = tl.load(a_ptr + p[:, None] * X + c, mask=(p < P)[:, None] & (c < X)[None, :], other=0.0)
            part = tl.dot(dh, a, input_precision="ieee") * s
            if DROP:
                kept, scale = _kept(drop_ptr, site_ptr, rows, ok, c)
                part = tl.where(kept, part * scale, 0.0)
            out += part
        return out

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


_compiling: ContextVar[bool] = ContextVar("compiling", default=False)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Runs a kernel; inside `compiling` has it compiled instead."""
    if _compiling.get():
        kernel.warmup(*args, grid=grid, **options)
    else:
        kernel[grid](*args, **options)


@contextmanager
def compiling(pool: Executor) -> Iterator[None]:
    """In this thread, launches only have their kernels compiled, by the pool's threads; at the end all are there.
    Tensors may be on `meta`. A kernel that was compiled before is read from Triton's cache on disk."""
    token = _compiling.set(True)
    try:
        with triton.AsyncCompileMode(pool):
            yield
    finally:
        _compiling.reset(token)


def cross_entropy_(logits_PW: Tensor, targets_P: Tensor, vocab: int, grad: bool) -> Tensor:
    """The loss of each row, float32 [P]; with `grad`, the logits become d loss / d logits in place.

    logits_PW: [P, W], W >= vocab; columns from `vocab` on are padding. targets: int64, -100 where nothing counts.
    """
    rows, width = logits_PW.shape
    loss = torch.empty(rows, dtype=torch.float32, device=logits_PW.device)
    if rows:
        launch(
            _cross_entropy, (rows,),
            logits_PW, targets_P, loss, vocab, width, logits_PW.stride(0), B=4096, GRAD=grad, num_warps=8,
        )  # fmt: skip
    return loss


def with_padding(weight_VH: Tensor, padding: int) -> Tensor:
    """The head's weight [W, H] with the zero rows that lie behind it in memory (`Decoder.allocate`): of an odd width,
    products would go to slow kernels."""
    rows, width = weight_VH.shape
    return weight_VH.detach().as_strided((rows + padding, width), weight_VH.stride())
