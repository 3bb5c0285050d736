"""Adapters over several processes (DDP): every process holds all of what learns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minitune.train.parallel import Team


class Replicas:
    """Every process holds all of what learns (an adapter): gradients are added up after backward, so that each makes
    the same update."""

    def __init__(self, team: Team):
        self.team = team

    def gather(self, parameters: Sequence[Tensor], loss: Tensor) -> Tensor:
        """The step's loss; the gradients become the whole step's, in one sum."""
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = self.team.sum(torch.cat([loss.reshape(1), *(g.reshape(-1) for g in grads)]))
        for grad, part in zip(grads, flat[1:].split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))
        return flat[0]

    def norm(self, norm: Tensor) -> Tensor:
        """The gradient's norm, of this process's."""
        return norm
