"""The layers of a LoRA run by hand: the plain decoder's values and gradients in a third of its launches.

`FusedStack(decoder)` takes the place of the loop over layers. Forward and backward are written out below, a matrix
multiplication and a kernel of `fused_kernels` in turn; autograd sees one function. What it rests on:
- The adapter's B lies in a strip behind the frozen weight, h = s · dropout(x) Aᵀ in a strip behind the input: base and
  adapter are one multiplication, and so are the gradients of input and h.
- All adapters are slices of one float32 parameter: one optimizer call, one norm; `refresh` makes the computation's
  copies of it after each update.
- Frozen weights get no gradient, so only what `backward` names is kept; with `keep=False` one hidden state and two
  strips a layer (but for the last), and the rest is computed again: all but down, whose result nothing needs, and
  the products of q|k|v and o with A.

Legend: T tokens, H hidden, X inputs, Y outputs, R a strip's width, P rows of A, F FFN width, N heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minitune.model import kernels
from minitune.model.attention_kernels import attend_backward, attend_forward
from minitune.model.decoder import Decoder, Layer
from minitune.model.four_bits import Room
from minitune.model.fused_ops import (
    Beside,
    Counts,
    Slot,
    along_rows,
    grads,
    input_back,
    next_power_of_2,
    norm_back,
    norm_in,
    row_table,
    silu_mul,
    silu_mul_back,
    strip,
)
from minitune.model.lora import Dropout
from minitune.model.quantized import GROUPS, Int4Linear
from minitune.model.rope import rotate

WIDEST = 256  # rows of A that the kernels' tiles hold: more would not fit the memory of a processor
HEADS = (16, 32, 64, 128, 256)  # widths of a head that the kernels' tiles hold
STRIP = 64  # strips are multiples of this: rows stay aligned for the matrix units


def strip_width(rows_of_a: int) -> int:
    """The strip for this many rows of A: a power of two, at least 64; 0 for none."""
    return max(STRIP, next_power_of_2(rows_of_a)) if rows_of_a else 0


def why_not(decoder: Decoder, adapters: bool = True) -> str:
    """Why these layers can't be fused; "" where they can. adapters: whether they are what learns."""
    if reason := kernels.why_not(decoder.device):
        return reason
    if adapters and decoder.lora_config is None:
        return "no adapter learns"
    if decoder.config.head_dim not in HEADS:
        return f"heads of {decoder.config.head_dim} are no power of two"
    for kind in Slot.KINDS:
        linears = decoder.of_kind(kind)
        if any(isinstance(n, Int4Linear) and n.group not in GROUPS for n in linears):
            return "the groups of the 4-bit weights are no 32, 64 or 128"
        if any(n.lora is not None and n.lora.A.shape[0] > WIDEST for n in linears):
            return f"{kind} has more than {WIDEST} rows of A"
        shapes = {None if n.lora is None else tuple((s, e) for _, s, e in n.lora.parts) for n in linears}
        if len(shapes) > 1:
            return "the adapters differ from layer to layer"
    return ""


def flatten(decoder: Decoder) -> nn.Parameter:
    """Makes every adapter a slice of one float32 parameter, which is returned; its gradient's slices are theirs."""
    loras = [linear.lora for linear in decoder.linears() if linear.lora is not None]
    parameters = [p for lora in loras for p in (lora.A, lora.B)]
    flat = nn.Parameter(torch.cat([p.detach().reshape(-1) for p in parameters]))
    flat.grad = torch.zeros_like(flat)
    at = 0
    for parameter in parameters:
        end = at + parameter.numel()
        shape = parameter.shape
        parameter.data = flat.data[at:end].view(shape)
        parameter.grad = flat.grad[at:end].view(shape)
        at = end
    return flat


class Kept(NamedTuple):
    """What a layer's backward needs. Without the rest, its input x1 and the strips of q|k|v and o alone, it is computed
    again."""

    x1: Tensor
    strips: tuple[Tensor | None, Tensor | None] = (None, None)
    x2: Tensor | None = None
    attention: tuple[Any, ...] = ()
    mlp: tuple[Any, ...] = ()


@dataclass
class Context:
    """What is the same for all layers of a pass. drop: see `fused_kernels._kept`; None: no dropout."""

    cos: Tensor
    sin: Tensor
    layout: Any
    drop: Tensor | None


class FusedStack:
    """See the module. The decoder's adapters must be attached and filled; its weights may have been allocated with
    strips (`Decoder.allocate`), otherwise they are copied into wider ones here."""

    def __init__(self, decoder: Decoder, keep: bool = True):
        reason = why_not(decoder)
        if reason:
            raise ValueError(reason)
        self.decoder, self.keep = decoder, keep
        self.flat = flatten(decoder)
        self.shadow = torch.empty_like(self.flat.data, dtype=decoder.dtype)
        self.wide: dict[str, Tensor] = {}
        self.rooms: list[Room] = []
        self.slots: list[dict[str, Slot]] = [{} for _ in decoder.layers]
        self.beside, self.apart, self.counts = Beside(decoder.device), Beside(decoder.device), Counts(decoder.device)
        for kind in Slot.KINDS:
            self._place(kind)
        self._share()
        self.refresh()

    def _place(self, kind: str) -> None:
        """The weights of one kind, widened by a strip where they carry adapters; room for one of them where they have
        four bits."""
        decoder = self.decoder
        linears = decoder.of_kind(kind)
        lora, rows, room = linears[0].lora, None, None
        if isinstance(linears[0], Int4Linear):
            rows = None if lora is None else row_table(linears[0])
            width = linears[0].in_features + (0 if lora is None else strip_width(lora.A.shape[0]))
            room = Room(linears[0].out_features, width, decoder.dtype, decoder.device)
            self.rooms.append(room)
            wides = [room.tensor] * len(linears)
        elif lora is None:
            wides = [linear.weight.data for linear in linears]
        else:
            rows = row_table(linears[0])
            if kind not in decoder.strips:
                decoder.widen(kind, strip_width(lora.A.shape[0]))
            self.wide[kind] = decoder.strips[kind]
            wides = list(self.wide[kind])
        for slots, linear, wide in zip(self.slots, linears, wides, strict=True):
            slots[kind] = Slot(linear, wide, rows, room)

    def _share(self) -> None:
        """Gives each slot its slices of the shadow and of the gradient."""
        at, grad = 0, self.flat.grad
        assert grad is not None
        for slots in self.slots:
            for slot in slots.values():
                if slot.lora is None:
                    continue
                a, b = slot.lora.A.numel(), slot.lora.B.numel()
                slot.a = self.shadow[at : at + a].view_as(slot.lora.A)
                slot.b = self.shadow[at + a : at + a + b].view_as(slot.lora.B)
                slot.da = grad[at : at + a].view_as(slot.lora.A)
                slot.db = grad[at + a : at + a + b].view_as(slot.lora.B)
                at += a + b

    @torch.no_grad()
    def refresh(self) -> None:
        """The computation's copies of A and B, after every change of them."""
        self.shadow.copy_(self.flat)
        layers = len(self.slots)
        start = 0
        for kind in Slot.KINDS:
            first = self.slots[0][kind]
            if first.lora is None:
                continue
            a, b = first.lora.A.numel(), first.lora.B.numel()
            shape, r = first.lora.B.shape, first.r
            b_LYr = self.shadow.view(layers, -1)[:, start + a : start + a + b].view(layers, *shape)
            for i, (_, _, rows, y) in enumerate(first.lora.rows() if kind in self.wide else ()):
                self.wide[kind][:, y, first.X + i * r : first.X + (i + 1) * r].copy_(b_LYr[:, rows])
            start += a + b

    def __call__(self, x_TH: Tensor, cos: Tensor, sin: Tensor, layout: Any, dropout: Dropout | None) -> Tensor:
        drop = None
        if dropout is not None:
            head = torch.stack((dropout.threshold, dropout.scale.float().view(torch.int32)))
            drop = torch.cat((head, dropout.key_T))
        return _Layers.apply(x_TH, self.flat, self, Context(cos, sin, layout, drop))  # type: ignore[no-any-return]

    # Forward

    def attention(
        self, i: int, x: Tensor, y: Tensor | None, ctx: Context, strips: tuple[Tensor | None, ...] | None = None
    ) -> tuple[Tensor, tuple[Any, ...], tuple[Tensor | None, Tensor | None]]:
        """(x + m · y, what backward needs of a layer's attention, its output in the last of them, the strips of q|k|v
        and o where they are kept). strips: those of an earlier pass, which are not computed again."""
        attn, qkv_, o_ = self.layer(i).attn, self.slots[i]["attn.qkv"], self.slots[i]["attn.o"]
        again, keep = strips is not None, not self.whole(i)
        first, second = strips or (None, None)
        x1, n, rstd = norm_in(x, y, self.gain, self.layer(i).attn_norm, qkv_, first)
        if not again:
            first = strip(n, qkv_, ctx.drop, self.counts, keep)
        qkv = qkv_.forward(n)
        out = torch.empty(x.shape[0], o_.X + o_.R, dtype=x.dtype, device=x.device)
        state: Any
        if ctx.layout.kernel == "short":
            cos, sin, cu = ctx.cos[:, 0], ctx.sin[:, 0], ctx.layout.cu_seqlens
            state = attend_forward(qkv, cos, sin, cu, out, attn.heads, attn.kv_heads, attn.scale, second)
        else:
            heads = (attn.heads, attn.kv_heads, attn.kv_heads)
            with torch.enable_grad():
                leaf = qkv.detach().requires_grad_()
                q, k, v = leaf.view(-1, sum(heads), attn.head_dim).split(heads, dim=1)
                q, k = rotate(q, ctx.cos, ctx.sin), rotate(k, ctx.cos, ctx.sin)
                result = ctx.layout.attend(q, k, v, attn.scale).reshape(x.shape[0], -1)
            state = (leaf, result)
            out[:, : o_.X] = result.detach()
            if second is not None:
                out[:, o_.X :] = second
        if not again:
            second = strip(out, o_, ctx.drop, self.counts, keep)
        return x1, (rstd, n, qkv, state, out), (first, second)

    def mlp(self, i: int, x: Tensor, y: Tensor, ctx: Context) -> tuple[Tensor, tuple[Any, ...]]:
        """(x + m · y, what backward needs) of its MLP."""
        slot = self.slots[i]["mlp.gate_up"]
        x2, n, rstd = norm_in(x, y, self.gain, self.layer(i).mlp_norm, slot)
        strip(n, slot, ctx.drop, self.counts)
        gate_up = slot.forward(n)
        return x2, (rstd, n if slot.R else None, gate_up)

    def activated(self, i: int, gate_up: Tensor, ctx: Context) -> Tensor:
        act = silu_mul(gate_up, self.slots[i]["mlp.down"])
        strip(act, self.slots[i]["mlp.down"], ctx.drop, self.counts)
        return act

    def layer_forward(self, i: int, x: Tensor, y: Tensor | None, ctx: Context) -> tuple[Tensor, Tensor, Kept]:
        """(x, y): the residual stream, and what is still to be added to it times m."""
        x1, attention, strips = self.attention(i, x, y, ctx)
        x2, mlp = self.mlp(i, x1, self.slots[i]["attn.o"].forward(attention[-1]), ctx)
        y = self.slots[i]["mlp.down"].forward(self.activated(i, mlp[-1], ctx))
        return x2, y, Kept(x1, strips, x2, attention, mlp) if self.whole(i) else Kept(x1, strips)

    # Backward

    def layer_backward(self, i: int, d: Tensor, kept: Kept, ctx: Context) -> None:
        """d, the gradient of the layer's result, becomes that of its input; the adapters' gradients are added, those
        of q|k|v until the next `beside.join`. The first layer's input needs no gradient: d is worthless then."""
        slots, layer, drop, m, beside = self.slots[i], self.layer(i), ctx.drop, self.gain, self.beside
        qkv_, o_, gate_up_, down_ = (slots[kind] for kind in Slot.KINDS)
        x1, strips, x2, attention, mlp = kept
        if x2 is None:
            beside.join()  # gives memory back
            attention = self.attention(i, x1, None, ctx, strips)[1]
            x2, mlp = self.mlp(i, x1, o_.forward(attention[-1]), ctx)

        rstd, n, gate_up = mlp
        d_act = down_.backward(d, beside)
        if down_.R:
            beside.join()
            grads(d, self.activated(i, gate_up, ctx), d_act, down_, drop, m)
        along = silu_mul_back(gate_up, d_act, down_, drop, m, gate_up_.R > 0)  # gate_up holds its gradient now
        del d_act
        d_n = gate_up_.backward(gate_up, beside)
        if gate_up_.R:
            beside.join()
            grads(gate_up, n, d_n, gate_up_, drop, 1.0)
        del gate_up, mlp
        norm_back(d, d_n, gate_up_, drop, x2, rstd, layer.mlp_norm, along)

        rstd, n, qkv, state, out = attention
        d_out = o_.backward(d, beside)
        if o_.split:
            beside.join()
        if o_.R:
            with beside(d, out, d_out):
                grads(d, out, d_out, o_, drop, m)
        d_qkv = self.attention_backward(i, d_out, qkv, state, out, ctx)
        if qkv_.R:
            along = torch.empty(1, d.shape[0], dtype=torch.float32, device=d.device)
            with beside(d_qkv, qkv, along):
                along_rows(d_qkv, qkv, along)
        d_n = qkv_.backward(d_qkv, beside, needs_dx=i > 0)
        beside.join()  # d is about to change, and the norm needs what came of the side
        if qkv_.R:
            with beside(d_qkv, n, d_n):
                grads(d_qkv, n, d_n, qkv_, drop, 1.0)
        if i > 0:
            norm_back(d, d_n, qkv_, drop, x1, rstd, layer.attn_norm, along)

    def attention_backward(self, i: int, d_out: Tensor, qkv: Tensor, state: Any, out: Tensor, ctx: Context) -> Tensor:
        attn, o = self.layer(i).attn, self.slots[i]["attn.o"]
        d, delta = input_back(d_out, out, o, ctx.drop, self.gain, attn.head_dim)
        if ctx.layout.kernel == "short":
            cos, sin, cu = ctx.cos[:, 0], ctx.sin[:, 0], ctx.layout.cu_seqlens
            of = attn.heads, attn.kv_heads, attn.scale
            return attend_backward(d, qkv, cos, sin, cu, delta, state, *of, beside=self.apart)
        leaf, result = state
        return torch.autograd.grad(result, leaf, d)[0]

    @property
    def gain(self) -> float:
        return self.decoder.config.residual_multiplier

    def whole(self, i: int) -> bool:
        """Whether all of a layer is kept: the last one always, since its backward comes first."""
        return self.keep or i == len(self.slots) - 1

    def layer(self, i: int) -> Layer:
        return self.decoder.layers[i]  # type: ignore[return-value]


class _Layers(torch.autograd.Function):
    """x [T, H] through all layers. `flat` stands for the adapters: its gradient is added to `flat.grad` in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, flat: Tensor, stack: FusedStack, context: Context) -> Tensor:
        y: Tensor | None = None
        kept = []
        for room in stack.rooms:
            room.holder = None  # what a recorded pass left there is not known
        for i in range(len(stack.slots)):
            x, y, one = stack.layer_forward(i, x, y, context)
            kept.append(one if ctx.needs_input_grad[1] else None)
        ctx.stack, ctx.context, ctx.kept = stack, context, kept
        return x if y is None else torch.add(x, y, alpha=stack.gain)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        d = grads[0].clone(memory_format=torch.contiguous_format)
        for i in reversed(range(len(ctx.kept))):
            ctx.stack.layer_backward(i, d, ctx.kept.pop(), ctx.context)
        ctx.stack.beside.join()
        return None, None, None, None
