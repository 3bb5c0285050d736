# mypy: disable-error-code="assignment"
"""Triton kernels of a decode step of several rows (`model.decode_rows` launches them): products and norms.

Weights are streamed once, a tile of outputs a program, and the rows, which all programs share, come from the cache.
Where outputs are few, SPLITS programs share the inputs of a tile: each writes its part in float32, and `_add_norm`,
which reads the result anyway, adds them up, always in the same order. Under PDL a program asks for its first weights
while the kernel before it still runs. Legend and PDL as in `decode_kernels`; W weight rows a program.
"""

from __future__ import annotations

from minitune.model.kernels import AVAILABLE

if AVAILABLE:
    import triton
    import triton.language as tl

    from minitune.model.decode_kernels import _after_predecessor

    @triton.jit
    def _soon(ptrs):
        """Asks for these lines to be brought into the cache all programs share; waits for nothing."""
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [ptrs], dtype=tl.int32, is_pure=False, pack=1
        )

    @triton.jit(do_not_specialize=["rows"])
    def _gemm(
        x_ptr, w_ptr, y_ptr, w_stride, rows, outputs, y_stride, gain,
        FULL: tl.constexpr, X: tl.constexpr, SILU: tl.constexpr, SPLITS: tl.constexpr,
        BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """y [B, O] = gain · x [B, X] wᵀ, or with SILU, w [2 O, X]: silu(gate) · up. With SPLITS > 1 instead
        y [SPLITS, B, O] float32, the parts. FULL: B is BM. EARLY: inputs of each weight row that
        are asked for before the wait."""
        SPAN: tl.constexpr = (X + SPLITS * BK - 1) // (SPLITS * BK) * BK
        WHOLE: tl.constexpr = SPAN * SPLITS == X
        split = tl.program_id(1)
        m = tl.arange(0, BM)
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        row = tl.minimum(n, outputs - 1).to(tl.int64)
        k = tl.arange(0, BK)
        first = split * BK  # the splits' blocks lie side by side: what is read at one time is one run of memory
        w_ptrs = w_ptr + row[:, None] * w_stride
        up = outputs.to(tl.int64) * w_stride
        if PDL and EARLY >= 64:
            line = tl.arange(0, EARLY // 64)[None, :] * 64 + split * EARLY  # 64 numbers of half precision a line
            _soon(w_ptrs + tl.minimum(line, X - 1))
            if SILU:
                _soon(w_ptrs + up + tl.minimum(line, X - 1))
        w_ptrs += first + k[None, :]
        x_ptrs = x_ptr + m[:, None] * X + first + k[None, :]
        ok = (m < rows)[:, None]
        acc = tl.zeros((BM, BN), tl.float32)
        more = tl.zeros((BM, BN), tl.float32)
        _after_predecessor(PDL)
        for at in range(0, SPAN * SPLITS, SPLITS * BK):
            if WHOLE:
                w = tl.load(w_ptrs + at)
                x = tl.load(x_ptrs + at) if FULL else tl.load(x_ptrs + at, mask=ok, other=0.0)
            else:
                inside = (first + at + k < X)[None, :]
                w = tl.load(w_ptrs + at, mask=inside, other=0.0)
                x = tl.load(x_ptrs + at, mask=ok & inside, other=0.0)
            acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
            if SILU:
                w_up = tl.load(w_ptrs + up + at) if WHOLE else tl.load(w_ptrs + up + at, mask=inside, other=0.0)
                more = tl.dot(x, tl.trans(w_up), more, input_precision="ieee")
        if SILU:
            acc = acc / (1.0 + tl.exp(-acc)) * more
        if SPLITS > 1:
            y_ptr += split * rows * y_stride
        there = ok & (n < outputs)[None, :]
        tl.store(y_ptr + m[:, None] * y_stride + n[None, :], (acc * gain).to(y_ptr.dtype.element_ty), mask=there)

    @triton.jit
    def _number(word, at: tl.constexpr, kind: tl.constexpr):
        """q - 8 of the number that begins at a bit of each word: with q in its mantissa's last bits a float is
        2 ** (its bits) + q."""
        q = (word >> at) & 15
        if kind == tl.bfloat16:
            return (q.to(tl.int16) | 0x4300).to(kind, bitcast=True) - 136.0
        elif kind == tl.float16:
            return (q.to(tl.int16) | 0x6400).to(kind, bitcast=True) - 1032.0
        else:
            return (q - 8).to(kind)

    @triton.jit
    def _numbers(word, kind: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
        """[BN, GROUP] of words [BN, GROUP / 8]; number i of a word is at bit 4 i."""
        even = tl.join(
            tl.join(_number(word, 0, kind), _number(word, 16, kind)),
            tl.join(_number(word, 8, kind), _number(word, 24, kind)),
        )
        odd = tl.join(
            tl.join(_number(word, 4, kind), _number(word, 20, kind)),
            tl.join(_number(word, 12, kind), _number(word, 28, kind)),
        )
        return tl.reshape(tl.join(even, odd), (BN, GROUP))

    @triton.jit(do_not_specialize=["rows"])
    def _gemm4(
        x_ptr, w_ptr, s_ptr, y_ptr, rows, outputs, y_stride,
        FULL: tl.constexpr, X: tl.constexpr, GROUP: tl.constexpr, SILU: tl.constexpr, SPLITS: tl.constexpr,
        BM: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """As `_gemm`, of four-bit weights: w int32 [O, X / 8], s [O, X / GROUP]. -8 to 7 are exact in half precision,
        so the matrix units multiply them as they are, and a group's scale is put to its sums."""
        GROUPS: tl.constexpr = X // GROUP
        SPAN: tl.constexpr = (GROUPS + SPLITS - 1) // SPLITS
        first = tl.program_id(1) * SPAN
        m = tl.arange(0, BM)
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        row = tl.minimum(n, outputs - 1).to(tl.int64)
        k = tl.arange(0, GROUP)
        kind: tl.constexpr = x_ptr.dtype.element_ty
        w_ptrs = w_ptr + row[:, None] * (X // 8) + tl.arange(0, GROUP // 8)[None, :]
        s_ptrs = s_ptr + row * GROUPS
        up = outputs.to(tl.int64) * GROUPS
        x_ptrs = x_ptr + m[:, None] * X + k[None, :]
        ok = (m < rows)[:, None]
        acc = tl.zeros((BM, BN), tl.float32)
        more = tl.zeros((BM, BN), tl.float32)
        _after_predecessor(PDL)
        for group in range(first, tl.minimum(first + SPAN, GROUPS)):
            word = tl.load(w_ptrs + group * (GROUP // 8))
            scale = tl.load(s_ptrs + group).to(tl.float32)
            x = tl.load(x_ptrs + group * GROUP) if FULL else tl.load(x_ptrs + group * GROUP, mask=ok, other=0.0)
            part = tl.dot(x, tl.trans(_numbers(word, kind, BN, GROUP)), input_precision="ieee")
            acc += part * scale[None, :]
            if SILU:
                word = tl.load(w_ptrs + up * (GROUP // 8) + group * (GROUP // 8))
                scale = tl.load(s_ptrs + up + group).to(tl.float32)
                part = tl.dot(x, tl.trans(_numbers(word, kind, BN, GROUP)), input_precision="ieee")
                more += part * scale[None, :]
        if SILU:
            acc = acc / (1.0 + tl.exp(-acc)) * more
        y_ptr += tl.program_id(1) * rows * y_stride
        there = ok & (n < outputs)[None, :]
        tl.store(y_ptr + m[:, None] * y_stride + n[None, :], acc.to(y_ptr.dtype.element_ty), mask=there)

    @triton.jit(do_not_specialize=["rows"])
    def _add_norm(
        x_ptr, part_ptr, norm_ptr, n_ptr, rows, gain, eps,
        H: tl.constexpr, BH: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """x [B, H] += gain · the sum of its PARTS parts [PARTS, B, H]; n = norm(x). A row a program, BH >= H."""
        c = tl.arange(0, BH)
        ok = c < H
        at = tl.program_id(0) * H + c
        weight = tl.load(norm_ptr + c, mask=ok, other=0.0)
        _after_predecessor(PDL)
        x = tl.load(x_ptr + at, mask=ok, other=0.0)
        if PARTS > 0:
            total = tl.zeros((BH,), tl.float32)
            for part in tl.static_range(PARTS):
                total += tl.load(part_ptr + part * rows * H + at, mask=ok, other=0.0).to(tl.float32)
            x = (x.to(tl.float32) + gain * total).to(x_ptr.dtype.element_ty)
            tl.store(x_ptr + at, x, mask=ok)
        wide = x.to(tl.float32)
        rstd = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / H + eps)
        tl.store(n_ptr + at, (wide * rstd).to(x.dtype) * weight.to(x.dtype), mask=ok)
