"""The whole model by hand where every parameter learns: forward, loss and backward without autograd.

`FullStack(decoder, whole)` uses the forward of `model.fused`, here without adapters. Backward goes layer by layer, and
each weight's gradient is one multiplication into a place that a `Sink` names: a buffer of all gradients, or a scratch
that is used up at once (the optimizer stepped inside backward). On a card that happens on a second stream, beside the
chain of gradients that the next layer waits for. A layer that is kept whole keeps q|k|v, what attention
gave, gate|up and two hidden states; another one its input alone, and the rest is computed again. The norms' results
are always computed again: they cost a pass over a hidden state.

The tied embedding's gradient is the head's part, then the input rows'. Where gradients have no buffer, the logits'
gradient is kept while it is the smaller one, and the matrix [V, H] made at the end, when no layer's activations are
there any more.

Legend: T tokens, P supervised positions, H hidden, V vocabulary, W vocabulary with padding, X inputs, Y outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from minitune.model import fused, kernels
from minitune.model.decoder import Decoder, RMSNorm
from minitune.model.full_kernels import PROGRAMS, add_rows, norm_back
from minitune.model.fused import Context, FusedStack
from minitune.model.fused_ops import Beside, Counts, Slot, norm_in, silu_mul, silu_mul_back


class Sink(Protocol):
    """Where gradients go. Matrices have the numbers of `FullStack.matrices`."""

    buffered: bool  # whether each gradient has a place of its own, which outlives the pass

    def place(self, index: int) -> tuple[Tensor, float]:
        """Where the gradient of a matrix is to be written (its shape), and by what that which lies there is multiplied
        first: 0 (whatever it is) or 1. The place is the same until `ready`. Both are called under the stream that
        writes; a layer's matrices have one stream, each is done with before the next."""
        ...

    def ready(self, index: int) -> None:
        """It is written, and this pass needs the matrix no more."""
        ...


class Kept(NamedTuple):
    """What a layer's backward needs; without the rest, its input x1 alone, it is computed again."""

    x1: Tensor
    x2: Tensor | None = None
    attention: tuple[Any, ...] = ()  # 1/rms of x1, q|k|v, state, result
    mlp: tuple[Any, ...] = ()  # 1/rms of x2, gate|up


@dataclass
class Tape:
    """A pass between forward and backward. d_logits: None where the head's gradient is made already."""

    ids_T: Tensor
    predict_P: Tensor
    ctx: Context
    kept: list[Kept]
    x_PH: Tensor
    rstd_P: Tensor
    h_PH: Tensor
    d_PH: Tensor
    d_logits_PW: Tensor | None


def why_not(decoder: Decoder) -> str:
    """Why this decoder can't be done by hand; "" where it can."""
    return fused.why_not(decoder, adapters=False)


class FullStack(FusedStack):
    """See the module. `whole`: how many layers, from the last, keep all that their backward needs.

    matrices: the embedding; q|k|v, o, gate|up and down of each layer; the head where it has a matrix of its own: the
    decoder's parameters in their order, less the norms. norm_grad: float32, to which the gradient of all norms' weights
    is added, two of each layer and the last. Parameters must stay where they are.
    """

    def __init__(self, decoder: Decoder, whole: int):
        if reason := why_not(decoder):
            raise ValueError(reason)
        self.decoder, self.wholes = decoder, max(1, whole)
        self.counts = Counts(decoder.device)
        linears = [decoder.of_kind(kind) for kind in Slot.KINDS]
        self.slots = [
            {kind: Slot(linear, linear.weight.data, None) for kind, linear in zip(Slot.KINDS, layer, strict=True)}
            for layer in zip(*linears, strict=True)
        ]
        self.tied = decoder.lm_head is None
        self.matrices = [p for p in decoder.parameters() if p.ndim > 1]
        size = (2 * len(self.slots) + 1) * decoder.config.hidden_size
        self.beside, self.apart = Beside(decoder.device), Beside(decoder.device)
        self.norm_grad = torch.zeros(size, dtype=torch.float32, device=decoder.device)
        self.parts_PH = self.norm_grad.new_zeros(PROGRAMS, decoder.config.hidden_size)

    @property
    def head_WH(self) -> Tensor:
        """The head with the zero rows behind it (`Decoder.allocate`)."""
        return kernels.with_padding(self.decoder.head_weight, self.decoder.padding)

    def whole(self, i: int) -> bool:
        return i >= len(self.slots) - self.wholes

    # Forward

    @torch.no_grad()
    def learn(
        self, ids_T: Tensor, positions_T: Tensor, layout: Any, predict_P: Tensor, targets_P: Tensor, share: Tensor,
        sink: Sink, chunk: int,
    ) -> tuple[Tensor, Tape]:  # fmt: skip
        """(the summed cross-entropy, float32 scalar; what `backward` goes on with). Gradients are those of the sum
        times `share` (float32 scalar). chunk: positions whose logits exist at once, where they are not kept."""
        decoder, config = self.decoder, self.decoder.config
        length_T = layout.length_T(ids_T.shape[0]) if decoder.rope.needs_length else None
        ctx = Context(*decoder.rope(positions_T, length_T), layout, None)
        x = F.embedding(ids_T, decoder.embed.weight) * config.embedding_multiplier
        y: Tensor | None = None
        kept = []
        for i in range(len(self.slots)):
            x, y, one = self.layer_forward(i, x, y, ctx)
            kept.append(one)
        assert y is not None
        x, y = x.index_select(0, predict_P), y.index_select(0, predict_P)
        x_PH, n_PH, rstd_P = norm_in(x, y, self.gain, decoder.norm, self.slots[0]["attn.qkv"])
        loss, h_PH, d_PH, d_logits = self._head(n_PH / config.logits_scaling, targets_P, share, sink, chunk)
        return loss, Tape(ids_T, predict_P, ctx, kept, x_PH, rstd_P, h_PH, d_PH, d_logits)

    def _head(
        self, h_PH: Tensor, targets_P: Tensor, share: Tensor, sink: Sink, chunk: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(loss, share · h, the gradient of h, that of the logits where it is still needed)."""
        head_WH, vocab = self.head_WH, self.decoder.head_weight.shape[0]
        shared_PH, d_PH = (h_PH.float() * share).to(h_PH.dtype), torch.empty_like(h_PH)
        loss = torch.zeros((), dtype=torch.float32, device=h_PH.device)
        positions, width = h_PH.shape
        at_once = sink.buffered or positions > width  # then the gradient [V, H] is the smaller thing to keep
        chunk = chunk if at_once else max(1, positions)
        logits = None
        for at in range(0, h_PH.shape[0], chunk):
            some = slice(at, at + chunk)
            logits = None  # else it would be there beside the next one
            logits = torch.mm(h_PH[some], head_WH.t())
            loss += kernels.cross_entropy_(logits, targets_P[some], vocab, grad=True).sum()
            torch.mm(logits, head_WH, out=d_PH[some])
            if at_once:
                self._add_head(logits, shared_PH[some], sink, None if at == 0 else 1.0)
        d_PH.copy_(d_PH.float() * (share / self.decoder.config.logits_scaling))
        return loss, shared_PH, d_PH, None if at_once else logits

    def _add_head(self, d_logits_PW: Tensor, h_PH: Tensor, sink: Sink, beta: float | None) -> None:
        """The head's gradient; beta: what the sink says where it is None."""
        place, its = sink.place(0 if self.tied else len(self.matrices) - 1)
        vocab, beta = place.shape[0], its if beta is None else beta
        whole = vocab - vocab % 8  # of an odd width, the library's kernels for old cards would take the product
        for some in (slice(0, whole), slice(whole, vocab)):
            if some.start < some.stop:
                place[some].addmm_(d_logits_PW[:, some].t(), h_PH, beta=beta)

    def layer_forward(self, i: int, x: Tensor, y: Tensor | None, ctx: Context) -> tuple[Tensor, Tensor, Kept]:  # type: ignore[override]
        x1, (rstd, _, *attention), _ = self.attention(i, x, y, ctx)
        x2, (second, _, gate_up) = self.mlp(i, x1, self.slots[i]["attn.o"].forward(attention[-1]), ctx)
        y = self.slots[i]["mlp.down"].forward(silu_mul(gate_up, self.slots[i]["mlp.down"]))
        return x2, y, Kept(x1, x2, (rstd, *attention), (second, gate_up)) if self.whole(i) else Kept(x1)

    # Backward

    @torch.no_grad()
    def backward(self, tape: Tape, sink: Sink) -> None:
        """Every gradient, from the head down."""
        decoder, top, width = self.decoder, len(self.slots), self.decoder.config.hidden_size
        d_PH = torch.zeros_like(tape.d_PH)
        self._norm(2 * top, d_PH, tape.d_PH, tape.x_PH, tape.rstd_P, decoder.norm)
        d = d_PH.new_zeros(tape.ids_T.shape[0], width)
        d.index_add_(0, tape.predict_P, d_PH)  # a position that comes twice is padding, of zeros
        del d_PH
        for i in reversed(range(top)):
            self.layer_gradients(i, d, tape.kept.pop(), tape.ctx, sink)
        self.beside.join()
        if tape.d_logits_PW is not None:
            self._add_head(tape.d_logits_PW, tape.h_PH, sink, None)
            tape.d_logits_PW = None
        if not self.tied:
            sink.ready(len(self.matrices) - 1)
        place, beta = sink.place(0)
        if not self.tied and beta == 0:
            place.zero_()
        add_rows(d, tape.ids_T, place, decoder.config.embedding_multiplier)
        sink.ready(0)

    def layer_gradients(self, i: int, d: Tensor, kept: Kept, ctx: Context, sink: Sink) -> None:
        """d, the gradient of the layer's result, becomes that of its input."""
        slots, layer, m = self.slots[i], self.layer(i), self.gain
        qkv_, o_, gate_up_, down_ = (slots[kind] for kind in Slot.KINDS)
        x1, x2, attention, mlp = kept
        del kept
        if x2 is None:
            _, (rstd, _, *rest), _ = self.attention(i, x1, None, ctx)
            x2, (second, _, gate_up) = self.mlp(i, x1, o_.forward(rest[-1]), ctx)
            attention, mlp = (rstd, *rest), (second, gate_up)
            del rest

        rstd, gate_up = mlp
        act = torch.mm(d, down_.wide)
        silu_mul_back(gate_up, act, down_, None, m, along=False, again=True)  # gate_up holds its gradient now
        self._weight(4 * i + 4, d, act, m, sink)
        d_n = torch.mm(gate_up, gate_up_.wide)
        self._weight(4 * i + 3, gate_up, x2, 1.0, sink, layer.mlp_norm)
        del act, gate_up, mlp
        self.beside.join(but=3)  # d is about to change, which the weight before this one was multiplied by
        self._norm(2 * i + 1, d, d_n, x2, rstd, layer.mlp_norm)

        rstd, qkv, state, out = attention
        d_out = torch.mm(d, o_.wide)
        self._weight(4 * i + 2, d, out, m, sink)
        d_qkv = self.attention_backward(i, d_out, qkv, state, out, ctx)
        del d_out, qkv, state, out, attention
        d_n = torch.mm(d_qkv, qkv_.wide)
        self._weight(4 * i + 1, d_qkv, x1, 1.0, sink, layer.attn_norm)
        del d_qkv
        self.beside.join(but=3)
        self._norm(2 * i, d, d_n, x1, rstd, layer.attn_norm)

    def _weight(
        self, index: int, dy_TY: Tensor, x_TX: Tensor, gain: float, sink: Sink, norm: RMSNorm | None = None
    ) -> None:
        """gain · dyᵀ x, to where the sink wants it, on the second stream; with norm, the norm of x. What the sink then
        does is a piece by itself, which no longer needs dy and x."""
        with self.beside(dy_TY, x_TX):
            if norm is not None:
                x_TX = norm_in(x_TX, None, gain, norm, self.slots[0]["attn.qkv"])[1]
            place, beta = sink.place(index)
            place.addmm_(dy_TY.t(), x_TX, beta=beta, alpha=gain)
        with self.beside():
            sink.ready(index)

    def _norm(self, index: int, d: Tensor, dy: Tensor, x: Tensor, rstd: Tensor, norm: RMSNorm) -> None:
        """The gradients of a norm's weight and of its input, which is added to d."""
        grad = self.norm_grad[index * d.shape[1] :][: d.shape[1]]
        norm_back(d, dy, x, rstd, norm.weight, self.parts_PH, grad)
