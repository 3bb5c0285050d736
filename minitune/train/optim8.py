"""AdamW with moments of 8 bits: after the backward pass, or inside it, a matrix at a time.

After it (`adamw_8bit`) the gradients lie in a buffer, and are clipped by their exact global norm. Inside it
(`adamw_8bit_in_backward`) each matrix is updated as soon as its gradient is there, which is then given up; no gradient
waits for another, so each is clipped by its own norm, to an equal share of max_grad_norm (of K gradients 1/√K each, the
norms' weights together being one): all of them together are never longer than asked for. The norm that a step reports
is that of all of them before clipping.

Norms' weights have a float32 master copy and 32-bit moments. A value that is not finite updates nothing: what the loss
tells is known before backward begins. Inside backward a gradient may still overflow where the loss did not; that
matrix and all that come after it in the pass stay as they were, those before it had finite gradients, and the run
stops at the next row of its log: every weight is finite and of a step that counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minitune.config import TrainConfig
from minitune.model.lora import mix32
from minitune.train import adamw8
from minitune.train.adamw8 import BLOCK, PROGRAMS, Moments, Rule

BYTES = ("m", "v")
FLOATS = ("m_scale", "v_scale", "masters", "vector_m", "vector_v")


class AdamW8:
    """parameters: what learns, in an order that is the same in each run of a model: it decides the draws. Vectors' data
    are laid into one tensor. Raises ValueError for float16: its range is too small to round in."""

    def __init__(self, parameters: Iterable[nn.Parameter], config: TrainConfig, in_backward: bool):
        self.parameters, self.in_backward = list(parameters), in_backward
        self.matrices = [p for p in self.parameters if p.ndim > 1]
        self.norms = [p for p in self.parameters if p.ndim <= 1]
        device, dtype = self.matrices[0].device, self.matrices[0].dtype
        if dtype == torch.float16:
            raise ValueError("8-bit AdamW rounds into bfloat16 weights (or leaves float32 ones); use --dtype bfloat16")
        self.betas, self.eps = (float(config.adam_beta1), float(config.adam_beta2)), float(config.adam_epsilon)
        self.decay, max_norm = config.weight_decay, float(config.max_grad_norm)
        if in_backward:
            max_norm /= math.sqrt(len(self.matrices) + 1)
        self.kernels = adamw8.by_kernel(device)
        self.joined = torch.cat([p.detach().reshape(-1) for p in self.norms])
        at = 0
        for p in self.norms:
            p.data = self.joined[at : at + p.numel()].view(p.shape)
            at += p.numel()
        blocks = [-(-p.numel() // BLOCK) for p in self.matrices]
        empty = partial(torch.zeros, device=device)
        self.m, self.v = empty(sum(blocks) * BLOCK, dtype=torch.int8), empty(sum(blocks) * BLOCK, dtype=torch.uint8)
        self.m_scale, self.v_scale = empty(sum(blocks)), empty(sum(blocks))
        self.masters = self.joined.to(device, torch.float32, copy=True)
        self.vector_m, self.vector_v = torch.zeros_like(self.masters), torch.zeros_like(self.masters)
        self.moments, self.firsts, first = [], [], 0
        for p, count in zip(self.matrices, blocks, strict=True):
            some, own = slice(first * BLOCK, first * BLOCK + p.numel()), slice(first, first + count)
            self.moments.append(Moments(self.m[some], self.v[some], self.m_scale[own], self.v_scale[own]))
            self.firsts.append((first * BLOCK + (1 << 31)) % (1 << 32) - (1 << 31))  # as an int32
            first += count
        self.rate, self.count = empty(()), empty((), dtype=torch.float64)
        self.squares, self.work = empty(len(self.matrices) + 1), empty(1 + PROGRAMS)  # the last one is the vectors'
        self.rule = Rule(empty(3), empty((), dtype=torch.int32), empty(()), *self.betas, self.eps, max_norm)
        self.seed = config.seed

    def open(self, loss: Tensor, step_index: Tensor) -> None:
        """Begins a step's updates. loss: float32 scalar, whose being finite decides whether there are any. step_index:
        int64 scalar, another in each step of a run."""
        rule = self.rule
        skip = (~torch.isfinite(loss)).double()
        t = self.count + 1
        first, second = (1 - beta**t for beta in self.betas)
        rate = self.rate.double()
        rule.hyper.copy_(torch.stack((rate / first, second.rsqrt(), 1 - rate * self.decay)))
        seed = torch.full_like(step_index, self.seed & 0x7FFFFFFF, dtype=torch.int32)
        rule.key.copy_(mix32(step_index.to(torch.int32) ^ mix32(seed)))
        rule.bad.copy_(skip)
        self.count += 1 - skip

    def use(self, index: int, grad: Tensor) -> None:
        """Inside backward: updates a matrix by its gradient, clipped by its own norm."""
        self.square(index, grad)
        self.update(index, grad, self.squares[index])

    def square(self, index: int, grad: Tensor) -> None:
        if self.kernels:
            adamw8.sum_squares(grad, self.squares[index], self.rule.bad, self.work)
        else:
            adamw8.sum_squares_plain(grad, self.squares[index], self.rule.bad)

    def update(self, index: int, grad: Tensor, square: Tensor) -> None:
        function = adamw8.update if self.kernels else adamw8.update_plain
        function(self.matrices[index].data, grad, self.moments[index], self.rule, square, self.firsts[index])

    def close(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Ends a step inside backward with the gradient of all vectors (float32). (the global norm before clipping, 1
        where a value was not finite)."""
        own = vectors.square().sum()
        self.squares[-1].copy_(own)
        self._vectors(vectors, own)
        return self.squares.sum().sqrt(), torch.maximum(self.rule.bad, (~torch.isfinite(own)).float())

    def step(self, grads: Sequence[Tensor], vectors: Tensor, loss: Tensor, step_index: Tensor) -> tuple[Tensor, Tensor]:
        """A step with all gradients at hand, clipped by their global norm, which is returned with the 1 where nothing
        was updated."""
        for i, grad in enumerate(grads):
            self.square(i, grad)
        self.squares[-1].copy_(vectors.square().sum())
        total = self.squares.sum()
        norm = total.sqrt()
        self.open(loss + norm, step_index)
        for i, grad in enumerate(grads):
            self.update(i, grad, total)
        self._vectors(vectors, total)
        return norm, self.rule.bad.clone()

    def _vectors(self, g: Tensor, square: Tensor) -> None:
        """The vectors' update, in 32 bits; no weight decay."""
        (beta1, beta2), rule = self.betas, self.rule
        go = (rule.bad == 0) & torch.isfinite(square)
        if rule.max_norm:
            g = g * (rule.max_norm / (square.sqrt() + 1e-6)).clamp(max=1.0)
        m, v = torch.lerp(g, self.vector_m, beta1), torch.lerp(g.square(), self.vector_v, beta2)
        new = self.masters - rule.hyper[0] * m / (v.sqrt() * rule.hyper[1] + self.eps)
        for old, value in ((self.masters, new), (self.vector_m, m), (self.vector_v, v)):
            old.copy_(torch.where(go, value, old))
        self.joined.copy_(self.masters)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, **{name: getattr(self, name) for name in (*BYTES, *FLOATS)}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            getattr(self, name).copy_(value)

    def places(self) -> list[tuple[str, Callable[[], Any]]]:
        """What a captured step reads and writes, each by its name and how it is found."""
        names = ("rate", "count", "squares", "work", "joined", *BYTES, *FLOATS)
        rule = [(name, partial(getattr, self.rule, name)) for name in ("hyper", "key", "bad")]
        return [*((name, partial(getattr, self, name)) for name in names), *rule]
