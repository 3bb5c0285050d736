"""One AdamW update of a matrix with moments of 8 bits and stochastic rounding: a Triton kernel and its plain twin.

Moments lie in blocks of 256 values, each with a float32 scale for either moment, its largest value (block-wise
quantisation: Dettmers et al. 2022, https://arxiv.org/abs/2110.02861). Codes are fourth roots: half of them lie in the
first decade below the largest value, a quarter in the second, and so on, so that small values keep digits, and no table
is needed:

    m = ± scale · (q / 127)⁴        ± q int8
    v = scale · (q / 255)⁴          q uint8; at least 1 where v is not zero, since m is divided by √v

All that becomes fewer bits is rounded to one of its two neighbours with the probability that makes it right on average
(for bfloat16 weights: Zamirai et al. 2021, https://arxiv.org/abs/2010.06192). Plain rounding would lose every change
smaller than half a step: v decays by a thousandth a step, and its code's steps are a hundredth. A value draws 32 bits
from (seed, step, counter), a counter for each value of the model (of 2³² values): 16 round the weight, 8 each moment.

Legend: n values of a parameter, G blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from minitune.model import kernels
from minitune.model.kernels import AVAILABLE, launch
from minitune.model.lora import mix32

BLOCK = 256
ROWS, WARPS = 4, 4  # blocks a program, its warps
SPAN, PROGRAMS = 2048, 1056  # values a sum of squares loads at once, and into how many parts it is split at most
CHUNK = 1 << 20  # values the twin takes at once


class Moments(NamedTuple):
    """m int8 [n], v uint8 [n], float32 scales [G] of each."""

    m: Tensor
    v: Tensor
    m_scale: Tensor
    v_scale: Tensor


class Rule(NamedTuple):
    """How to update. Tensors lie on the device.

    hyper: float32 [3], rate / (1 - beta1^t), 1 / √(1 - beta2^t), 1 - rate · weight decay. key: int32 scalar, a hash of
    (seed, step). bad: float32 scalar, nothing is done where it is not 0. max_norm: 0 never clips.
    """

    hyper: Tensor
    key: Tensor
    bad: Tensor
    beta1: float
    beta2: float
    eps: float
    max_norm: float


if AVAILABLE:
    import triton
    import triton.language as tl

    from minitune.model.kernels import _mix32

    # that n and span divide by 16 makes loads wide; where a scalar lies does not matter
    @triton.jit(do_not_specialize=["programs"], do_not_specialize_on_alignment=["part_ptr", "sum_ptr"])
    def _sum_squares(
        g_ptr, part_ptr, count_ptr, sum_ptr, bad_ptr, n, span, programs, B: tl.constexpr, P: tl.constexpr
    ):  # fmt: skip
        """sum = Σ g²; bad = 1 where that is not finite. The last program to be done adds the parts, in their order."""
        first = tl.program_id(0) * span
        total = tl.zeros((B,), tl.float32)
        for at in range(first, first + span, B):
            i = at + tl.arange(0, B)
            g = tl.load(g_ptr + i, mask=i < n, other=0.0).to(tl.float32)
            total += g * g
        tl.store(part_ptr + tl.program_id(0), tl.sum(total, 0))
        tl.debug_barrier()
        if tl.atomic_add(count_ptr, 1, sem="acq_rel") == programs - 1:
            p = tl.arange(0, P)
            parts = tl.load(part_ptr + p, mask=p < programs, other=0.0, cache_modifier=".cg")
            whole = tl.sum(parts, 0)
            tl.store(sum_ptr, whole)
            tl.store(count_ptr, 0)
            if (whole < float("inf")) == 0:  # neither infinite nor NaN
                tl.store(bad_ptr, 1.0)

    @triton.jit
    def _coded(a, draw, most):
        """The fourth root of a, up to the next whole number or down to the last by draw (uint32 below 256)."""
        k = tl.minimum(tl.floor(tl.sqrt(tl.sqrt(a))), most)
        low, high = k * k, (k + 1.0) * (k + 1.0)
        low, high = low * low, high * high
        climbs = (draw.to(tl.float32) + 0.5) * 0.00390625 * (high - low) < a - low
        return tl.minimum(k + tl.where(climbs, 1.0, 0.0), most)

    @triton.jit(do_not_specialize=["first"], do_not_specialize_on_alignment=["sum_ptr"])
    def _update(
        w_ptr, g_ptr, m_ptr, v_ptr, ms_ptr, vs_ptr, hyper_ptr, key_ptr, bad_ptr, sum_ptr,
        beta1, rest1, beta2, rest2, eps, max_norm, first, n, ROUND: tl.constexpr, R: tl.constexpr,
    ):  # fmt: skip
        """R blocks of 256 values. See `update`."""
        square = tl.load(sum_ptr)
        if (tl.load(bad_ptr) == 0.0) & (square < float("inf")):
            shrink = tl.where(max_norm > 0.0, tl.minimum(max_norm / (tl.sqrt(square) + 1e-6), 1.0), 1.0)
            rate, second, decay = tl.load(hyper_ptr), tl.load(hyper_ptr + 1), tl.load(hyper_ptr + 2)
            block = tl.program_id(0) * R + tl.arange(0, R)
            i = block[:, None] * 256 + tl.arange(0, 256)[None, :]
            ok = i < n
            there = block * 256 < n
            g = tl.load(g_ptr + i, mask=ok, other=0.0).to(tl.float32) * shrink
            code = tl.load(m_ptr + i, mask=ok, other=0).to(tl.float32)
            scale = tl.load(ms_ptr + block, mask=there, other=0.0) * (1.0 / 260144641.0)
            m = code * tl.abs(code) * (code * code) * scale[:, None] * beta1 + g * rest1
            code = tl.load(v_ptr + i, mask=ok, other=0).to(tl.float32)
            scale = tl.load(vs_ptr + block, mask=there, other=0.0) * (1.0 / 4228250625.0)
            code = code * code
            v = code * code * scale[:, None] * beta2 + g * g * rest2

            w = tl.load(w_ptr + i, mask=ok, other=0.0).to(tl.float32)
            w = w * decay - rate * (m / (tl.sqrt(v) * second + eps))
            key = tl.load(key_ptr).to(tl.uint32, bitcast=True)
            draw = _mix32(_mix32(i.to(tl.uint32) + first.to(tl.uint32)) ^ key)
            if ROUND:
                bits = w.to(tl.uint32, bitcast=True)
                finite = (bits & 0x7F800000) != 0x7F800000
                bits = tl.where(finite, bits + (draw & 0xFFFF), bits) & 0xFFFF0000
                w = bits.to(tl.float32, bitcast=True)
            tl.store(w_ptr + i, w.to(w_ptr.dtype.element_ty), mask=ok)

            top = tl.max(tl.abs(m), 1)
            tl.store(ms_ptr + block, top, mask=there)
            k = _coded(tl.abs(m) * (1.0 / tl.maximum(top, 1e-30))[:, None] * 260144641.0, (draw >> 16) & 0xFF, 127.0)
            tl.store(m_ptr + i, tl.where(m < 0.0, -k, k).to(tl.int8), mask=ok)

            top = tl.max(v, 1)
            tl.store(vs_ptr + block, top, mask=there)
            k = _coded(v * (1.0 / tl.maximum(top, 1e-30))[:, None] * 4228250625.0, draw >> 24, 255.0)
            k = tl.maximum(k, tl.where(v > 0.0, 1.0, 0.0))
            tl.store(v_ptr + i, k.to(tl.int32).to(tl.uint8), mask=ok)


def by_kernel(device: torch.device) -> bool:
    """Whether the kernels serve there, not their twins."""
    return device.type == "cuda" and not kernels.why_not(device)


def sum_squares(g: Tensor, out: Tensor, bad: Tensor, work: Tensor) -> None:
    """out (float32 scalar) = Σ g²; bad (float32 scalar) becomes 1 where that is not finite.

    work: float32 [1 + PROGRAMS], zero at the beginning: a counter, then the parts. g contiguous.
    """
    if g.numel() >= 1 << 31:
        raise ValueError(f"a parameter of {g.numel():,} values is more than these kernels count")
    span = SPAN * -(-g.numel() // (SPAN * PROGRAMS))
    programs = -(-g.numel() // span)
    launch(
        _sum_squares, (programs,),
        g, work[1:], work[:1].view(torch.int32), out, bad, g.numel(), span, programs,
        B=SPAN, P=2048, num_warps=4,
    )  # fmt: skip


def sum_squares_plain(g: Tensor, out: Tensor, bad: Tensor) -> None:
    """The same in plain torch."""
    out.copy_(torch.linalg.vector_norm(g, dtype=torch.float32).square())
    bad.copy_(torch.where(torch.isfinite(out), bad, torch.ones_like(bad)))


def update(w: Tensor, g: Tensor, state: Moments, rule: Rule, square: Tensor, first: int) -> None:
    """AdamW's step of one parameter, in place: w (bfloat16, rounded stochastically, or float32), its moments.

    g: the gradient, contiguous, of w's size; it is shortened to `rule.max_norm` where √square is longer (square:
    float32 scalar). Nothing is done where that is not finite. first: the counter of its first
    value's draw, an int32; the next values have the next ones.
    """
    blocks = state.m_scale.numel()
    launch(
        _update, (-(-blocks // ROWS),),
        w, g, *state, rule.hyper, rule.key, rule.bad, square,
        rule.beta1, 1 - rule.beta1, rule.beta2, 1 - rule.beta2, rule.eps, rule.max_norm, first, w.numel(),
        ROUND=w.dtype == torch.bfloat16, R=ROWS, num_warps=WARPS,
    )  # fmt: skip


@torch.no_grad()
def update_plain(w: Tensor, g: Tensor, state: Moments, rule: Rule, square: Tensor, first: int) -> None:
    """`update` in plain torch, operation for operation."""
    w, g = w.view(-1), g.reshape(-1)
    go = (rule.bad == 0) & torch.isfinite(square)
    shrink = torch.ones_like(square)
    if rule.max_norm:
        shrink = (rule.max_norm / (square.sqrt() + 1e-6)).clamp(max=1.0)
    for at in range(0, w.numel(), CHUNK):
        some, blocks = slice(at, at + CHUNK), slice(at // BLOCK, (at + CHUNK) // BLOCK)
        part = Moments(state.m[some], state.v[some], state.m_scale[blocks], state.v_scale[blocks])
        new = _updated(w[some], g[some].float() * shrink, part, rule, at, first)
        for old, value in zip((w[some], *part), new, strict=True):
            old.copy_(torch.where(go, value, old))


def _updated(w: Tensor, g: Tensor, state: Moments, rule: Rule, at: int, first: int) -> tuple[Tensor, ...]:
    """(w, m, v, m_scale, v_scale) of values from place `at` on."""
    n, (rate, second, decay) = w.numel(), rule.hyper
    each = torch.arange(n, device=w.device) // BLOCK  # a value's block
    code = state.m.float()
    m = code * code.abs() * (code * code) * (state.m_scale * (1.0 / 260144641.0))[each] * rule.beta1
    m = m + g * (1 - rule.beta1)
    code = state.v.float()
    code = code * code
    v = code * code * (state.v_scale * (1.0 / 4228250625.0))[each] * rule.beta2 + g * g * (1 - rule.beta2)
    new = w.float() * decay - rate * (m / (v.sqrt() * second + rule.eps))

    place = torch.arange(at, at + n, dtype=torch.int32, device=w.device)
    draw = mix32(mix32(place + first) ^ rule.key)
    if w.dtype == torch.bfloat16:
        new = round_stochastically(new, draw)
    top_m, top_v = (_tops(t, state.m_scale.numel()) for t in (m.abs(), v))
    k = _coded_plain(m.abs() * (1.0 / top_m.clamp(min=1e-30))[each] * 260144641.0, (draw >> 16) & 0xFF, 127.0)
    code_m = torch.where(m < 0, -k, k).to(torch.int8)
    k = _coded_plain(v * (1.0 / top_v.clamp(min=1e-30))[each] * 4228250625.0, (draw >> 24) & 0xFF, 255.0)
    code_v = torch.maximum(k, (v > 0).float()).to(torch.uint8)
    return new.to(w.dtype), code_m, code_v, top_m, top_v


def _tops(x: Tensor, blocks: int) -> Tensor:
    """The largest value of each block; the last one may be short."""
    return torch.nn.functional.pad(x, (0, blocks * BLOCK - x.numel())).view(blocks, BLOCK).amax(1)


def _coded_plain(a: Tensor, draw: Tensor, most: float) -> Tensor:
    k = a.sqrt().sqrt().floor().clamp(max=most)
    low, high = k * k, (k + 1.0) * (k + 1.0)
    low, high = low * low, high * high
    climbs = (draw.float() + 0.5) * 0.00390625 * (high - low) < a - low
    return (k + climbs.float()).clamp(max=most)


def round_stochastically(x: Tensor, draw: Tensor) -> Tensor:
    """float32 -> the bfloat16 value below or above it in size (as float32), by the low 16 of `draw`'s int32 bits."""
    bits = x.view(torch.int32)
    finite = (bits & 0x7F800000) != 0x7F800000
    return (torch.where(finite, bits + (draw & 0xFFFF), bits) & -0x10000).view(torch.float32)


def launch_all(dtype: torch.dtype) -> None:
    """Both launches on `meta`, for `kernels.compiling`."""
    n = 64 * BLOCK
    with torch.device("meta"):
        w, m, v = (torch.empty(n, dtype=kind) for kind in (dtype, torch.int8, torch.uint8))
        scales, scalar, work = torch.empty(n // BLOCK), torch.empty(()), torch.empty(1 + PROGRAMS)
        rule = Rule(torch.empty(3), torch.empty((), dtype=torch.int32), scalar, 0.9, 0.999, 1e-8, 1.0)
    sum_squares(w, scalar, scalar, work)
    update(w, w, Moments(m, v, scales, scales), rule, scalar, 1 << 20)
