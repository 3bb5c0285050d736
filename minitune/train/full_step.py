"""A step in which every parameter learns: by hand (`model.full`) where that serves, else through autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from minitune.data.loader import Pack
from minitune.model.decoder import Decoder
from minitune.model.full import FullStack
from minitune.train.optim import AdamW, LossScale
from minitune.train.optim8 import AdamW8
from minitune.train.step import StepResult, TrainStep, layout_of, pack_loss


class Buffer:
    """`model.full.Sink`: a place for each gradient. A step's first one overwrites what lies there."""

    buffered = True

    def __init__(self, matrices: Sequence[Tensor]):
        self.grads = [torch.zeros_like(matrix.data) for matrix in matrices]
        self.written: set[int] = set()

    def place(self, index: int) -> tuple[Tensor, float]:
        beta = float(index in self.written)
        self.written.add(index)
        return self.grads[index], beta

    def ready(self, index: int) -> None:
        pass


class InBackward:
    """`model.full.Sink`: a scratch, used up by the optimizer at once. The embedding's and the head's places are made
    when they are wanted, at the end."""

    buffered = False

    def __init__(self, optimizer: AdamW8, layers: int):
        self.optimizer, self.last = optimizer, 4 * layers
        matrices = optimizer.matrices
        size = max(m.numel() for m in matrices[1 : self.last + 1])
        self.scratch = torch.empty(size, dtype=matrices[0].dtype, device=matrices[0].device)
        self.now: dict[int, Tensor] = {}

    def place(self, index: int) -> tuple[Tensor, float]:
        if index not in self.now:
            matrix = self.optimizer.matrices[index]
            own = self.scratch[: matrix.numel()].view(matrix.shape) if 1 <= index <= self.last else None
            self.now[index] = torch.empty_like(matrix.data) if own is None else own
        return self.now[index], 0.0

    def ready(self, index: int) -> None:
        self.optimizer.use(index, self.now.pop(index))


class FullStep(TrainStep):
    """`stack`: the model by hand; None: autograd. Its dropout is none."""

    optimizer: AdamW | AdamW8  # type: ignore[assignment]

    def __init__(
        self,
        decoder: Decoder,
        optimizer: AdamW | AdamW8,
        stack: FullStack | None = None,
        *,
        max_grad_norm: float = 1.0,
        loss_scale: LossScale | None = None,
    ):
        super().__init__(decoder, optimizer, max_grad_norm=max_grad_norm, loss_scale=loss_scale)  # type: ignore[arg-type]
        self.stack = stack
        self.sink: Buffer | InBackward | None = None
        if stack is not None:
            own = isinstance(optimizer, AdamW8) and optimizer.in_backward
            layers = len(decoder.layers)
            self.sink = InBackward(optimizer, layers) if own else Buffer(stack.matrices)  # type: ignore[arg-type]
            if stack.wholes < layers:
                self.chunk = min(self.chunk, 512)
        elif isinstance(optimizer, AdamW8) and optimizer.in_backward:
            for index, matrix in enumerate(optimizer.matrices):
                matrix.register_post_accumulate_grad_hook(lambda p, i=index: self._used(i, p))  # type: ignore[misc]

    @property
    def by_hand(self) -> bool:
        return self.stack is not None

    def places(self) -> list[tuple[str, Callable[[], Tensor]]]:
        if self.stack is None or self.sink is None:
            return []
        places: list[tuple[str, Callable[[], Tensor]]] = [("scratch", partial(getattr, self.sink, "scratch"))]
        if isinstance(self.sink, Buffer):
            grads = self.sink.grads
            places = [(f"grads {i}", partial(grads.__getitem__, i)) for i in range(len(grads))]
        return [*places, *((name, partial(getattr, self.stack, name)) for name in ("parts_PH", "norm_grad"))]

    def _used(self, index: int, matrix: Tensor) -> None:
        """A gradient of autograd's is there."""
        assert isinstance(self.optimizer, AdamW8) and matrix.grad is not None
        self.optimizer.use(index, matrix.grad)
        matrix.grad = None

    def run(self, packs: list[Pack], share: Tensor) -> StepResult:
        optimizer, loss = self.optimizer, torch.zeros((), device=self.decoder.device)
        own = isinstance(optimizer, AdamW8) and optimizer.in_backward
        if own and len(packs) > 1:
            raise ValueError("an optimizer inside backward takes steps of one pack")
        scaled = share if self.loss_scale is None else share * self.loss_scale.scale
        if isinstance(self.sink, Buffer):
            self.sink.written.clear()
        if self.stack is not None:
            self.stack.norm_grad.zero_()
        for pack in packs:
            if self.stack is None or self.sink is None:
                total = pack_loss(self.decoder, pack, None, self.chunk)
            else:
                layout, sink, chunk = layout_of(pack, self.decoder), self.sink, self.chunk
                total, tape = self.stack.learn(
                    pack.input_ids, pack.position_ids, layout, pack.predict, pack.targets, scaled, sink, chunk
                )
            loss += total.detach() * share
            if own:
                optimizer.open(loss, self.step_index)  # type: ignore[union-attr]
            if self.stack is None or self.sink is None:
                (total * scaled).backward()
            else:
                self.stack.backward(tape, self.sink)
        if isinstance(optimizer, AdamW):
            self._hand_over()
            return self.update(loss)
        vectors = self._vectors()
        if optimizer.in_backward:
            norm, skip = optimizer.close(vectors)
        else:
            grads = self.sink.grads if isinstance(self.sink, Buffer) else [p.grad for p in optimizer.matrices]
            norm, skip = optimizer.step(grads, vectors, loss, self.step_index)  # type: ignore[arg-type]
        for parameter in optimizer.parameters:
            parameter.grad = None
        self.step_index += 1
        return StepResult(loss, norm, skip)

    def _vectors(self) -> Tensor:
        """The gradient of all vectors, float32."""
        if self.stack is not None:
            return self.stack.norm_grad
        assert isinstance(self.optimizer, AdamW8)
        norms = self.optimizer.norms
        return torch.cat([p.grad.float().reshape(-1) for p in norms if p.grad is not None])

    def _hand_over(self) -> None:
        """Gradients made by hand become the parameters'."""
        if self.stack is None or not isinstance(self.sink, Buffer):
            return
        for matrix, grad in zip(self.stack.matrices, self.sink.grads, strict=True):
            matrix.grad = grad
        norms = [p for p in self.decoder.parameters() if p.ndim <= 1]
        for norm, grad in zip(norms, self._vectors().split([p.numel() for p in norms]), strict=True):
            norm.grad = grad.to(norm.dtype)
