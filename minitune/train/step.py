"""One optimizer step: forward, loss, backward, update. Plain, runnable anywhere.

The loss of a step is the sum over its supervised tokens divided by their number, however the rows are packed.
Nothing here waits for the device: what a person sees comes back as device scalars.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minitune.data.loader import Pack, StepBatch
from minitune.model import kernels
from minitune.model.attention import PackedLayout, choose_kernel
from minitune.model.decoder import Decoder, Layer
from minitune.model.lora import Dropout
from minitune.train.loss import cross_entropy_sum, select
from minitune.train.optim import AdamW, LossScale


@dataclass(frozen=True)
class StepResult:
    """Device scalars of a step: the loss (nats a supervised token), the gradient's global norm before clipping, and
    1 where a value was not finite, in which case nothing was updated."""

    loss: Tensor
    grad_norm: Tensor
    skipped: Tensor


class Sharing(Protocol):
    """How the processes of a run make one step of theirs."""

    def gather(self, parameters: Sequence[Tensor], loss: Tensor) -> Tensor:
        """The step's loss, of this process's part of it; the gradients of `parameters` become the step's."""

    def norm(self, norm: Tensor) -> Tensor:
        """The norm of the whole gradient, of that of this process's `parameters`."""


def layout_of(pack: Pack, decoder: Decoder) -> PackedLayout:
    """How the pack's tokens attend."""
    kernel = choose_kernel(decoder.device, decoder.dtype, decoder.config.head_dim, pack.longest)
    return PackedLayout(pack.cu_seqlens, max(pack.lengths), pack.lengths, kernel)


def pack_loss(decoder: Decoder, pack: Pack, dropout: Dropout | None = None, chunk: int = 2048) -> Tensor:
    """The summed cross-entropy of a pack's supervised tokens (float32 scalar)."""
    h_TH = decoder.hidden(pack.input_ids, pack.position_ids, layout_of(pack, decoder), dropout)
    return cross_entropy_sum(select(h_TH, pack.predict), decoder.head_weight, pack.targets, chunk, decoder.padding)


def chunk_of(decoder: Decoder) -> int:
    """Rows of logits at a time: on the CPU, what fits the cache; on a card, what fills it, less where memory is short
    (`model.fused`, recomputed) or they are float32, since no kernel turns them into their gradient in place."""
    if decoder.device.type == "cpu":
        return 256
    small = kernels.why_not(decoder.device) or (decoder.stack is not None and not decoder.stack.keep)
    return 512 if small else 2048


def recompute_layers(decoder: Decoder) -> None:
    """Keeps only each layer's input for backward and computes the rest again (Chen et al. 2016,
    https://arxiv.org/abs/1604.06174). Dropout draws by counter, so the second pass equals the first."""
    inner = decoder.layer_forward

    def forward(layer: Layer, *args: object) -> Tensor:
        return checkpoint(inner, layer, *args, use_reentrant=False, preserve_rng_state=False)  # type: ignore[return-value]

    decoder.layer_forward = forward  # type: ignore[assignment]


class TrainStep:
    """`step(batch, rate)` trains on one batch and returns a `StepResult`.

    dropout: probability, drawn from (seed, step, token). max_grad_norm: 0 never clips. sharing: what joins this
    process's gradients with the others' (`parallel`), where there are others.
    """

    def __init__(
        self,
        decoder: Decoder,
        optimizer: AdamW,
        *,
        dropout: float = 0.0,
        seed: int = 0,
        max_grad_norm: float = 1.0,
        loss_scale: LossScale | None = None,
        sharing: Sharing | None = None,
    ):
        self.decoder, self.optimizer, self.loss_scale = decoder, optimizer, loss_scale
        self.dropout, self.seed, self.max_grad_norm, self.sharing = dropout, seed, max_grad_norm, sharing
        self.step_index = torch.zeros((), dtype=torch.int64, device=decoder.device)
        self.chunk = chunk_of(decoder)
        self.keeps_gradients = decoder.stack is not None  # their memory, from step to step

    @property
    def by_hand(self) -> bool:
        """Whether the layers are written out, not autograd's."""
        return self.decoder.stack is not None

    def places(self) -> list[tuple[str, Callable[[], Tensor]]]:
        """What a captured step reads and writes beyond parameters, gradients and the optimizer's, by name."""
        return []

    def __call__(self, batch: StepBatch, rate: float) -> StepResult:
        device = self.decoder.device
        self.optimizer.rate.fill_(rate)
        share = torch.full((), 1 / batch.supervised, device=device)
        return self.run([pack.to(device) for pack in batch.packs], share)

    def run(self, packs: list[Pack], share: Tensor) -> StepResult:
        """Everything that happens on the device: what `graph.capture` records. `share` is 1 / supervised tokens."""
        return self.update(self.gather(self.gradients(packs, share)))

    def gradients(self, packs: list[Pack], share: Tensor) -> Tensor:
        """The step's first half: these packs' loss, their gradients added to what is there."""
        loss = torch.zeros((), device=self.decoder.device)
        if self.decoder.stack is not None:
            self.decoder.stack.refresh()
        for pack in packs:
            part = pack_loss(self.decoder, pack, self._dropout(pack), self.chunk) * share
            (part if self.loss_scale is None else part * self.loss_scale.scale).backward()
            loss += part.detach()
        return loss

    def gather(self, loss: Tensor) -> Tensor:
        """Between the halves: loss and gradients of all processes."""
        return loss if self.sharing is None else self.sharing.gather(self.optimizer.parameters, loss)

    def _dropout(self, pack: Pack) -> Dropout | None:
        if not self.dropout:
            return None
        return Dropout.at(self.seed, self.step_index, pack.token_uids, self.dropout)

    def update(self, loss: Tensor) -> StepResult:
        """The second half: clipping and the optimizer."""
        grads = [p.grad for p in self.optimizer.parameters if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, 2, torch.float32)))
        if self.sharing is not None:
            norm = self.sharing.norm(norm)
        divisor = torch.ones_like(norm) if self.loss_scale is None else self.loss_scale.scale.clone()
        norm = norm / divisor
        if self.max_grad_norm:  # the Trainer's clipping: by max / (norm + 1e-6), never upwards
            divisor = divisor * ((norm + 1e-6) / self.max_grad_norm).clamp(min=1.0)
        skip = (~torch.isfinite(norm + loss)).float()
        self.optimizer.step(divisor, skip)
        if self.loss_scale is not None:
            self.loss_scale.update(skip)
        self.optimizer.zero_grad(keep=self.keeps_gradients)
        self.step_index += 1
        return StepResult(loss, norm, skip)


@torch.no_grad()
def held_out_loss(
    decoder: Decoder,
    batches: list[StepBatch],
    add: Callable[[Tensor], Tensor] | None = None,
    forward: Callable[[Pack], Tensor] | None = None,
) -> float:
    """The mean cross-entropy (nats) over all supervised tokens of these batches, dropout off. add: the sum over all
    processes, where these batches are one's share. forward: a pack's loss, where the decoder can't be called."""
    training, stack = decoder.training, decoder.stack
    decoder.eval()
    if stack is not None:
        stack.refresh()  # the last update came after the last step's
        stack.flat.requires_grad_(False)  # else the stack would keep what a backward needs
    chunk = chunk_of(decoder)
    forward = forward or (lambda pack: pack_loss(decoder, pack, None, chunk))
    parts = [forward(pack.to(decoder.device)) for b in batches for pack in b.packs]
    decoder.train(training)
    if stack is not None:
        stack.flat.requires_grad_(True)
    total = torch.stack(parts).double().sum()
    return float(total if add is None else add(total)) / sum(b.supervised for b in batches)
