"""The loss of each supervised token, and what follows from it: means, perplexities, rows.

Legend: P supervised positions of a pack, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from minitune.data import packing
from minitune.data.loader import Pack, make_pack
from minitune.data.template import IGNORED, Encoded
from minitune.model.attention import PackedLayout, choose_kernel
from minitune.model.decoder import Decoder

Progress = Callable[[int], None]  # how many are done since the last call


@dataclass(frozen=True)
class Losses:
    """Nats. rows[i]: (the sum over its supervised tokens, their number)."""

    rows: list[tuple[float, int]]

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.rows)

    @property
    def mean(self) -> float:
        """A supervised token weighs the same wherever it stands, as in training."""
        return math.fsum(total for total, _ in self.rows) / self.tokens

    @property
    def perplexity(self) -> float:
        return exponential(self.mean)

    def of(self, row: int) -> float:
        total, count = self.rows[row]
        return total / count


def exponential(loss: float) -> float:
    """exp(loss); infinite where a float can't hold it."""
    return math.exp(loss) if loss < 700 else math.inf


@torch.no_grad()
def score(decoder: Decoder, pack: Pack) -> tuple[Tensor, Tensor]:
    """(log-probability float32 [P] of each target, whether it is the likeliest token bool [P]), on the host."""
    pack = pack.to(decoder.device)
    kernel = choose_kernel(decoder.device, decoder.dtype, decoder.config.head_dim, pack.longest)
    layout = PackedLayout(pack.cu_seqlens, max(pack.lengths), pack.lengths, kernel)
    h_PH = decoder.hidden(pack.input_ids, pack.position_ids, layout)[pack.predict]
    chunk = 256 if decoder.device.type == "cpu" else 2048  # logits of all positions at once would be gigabytes
    logprobs, likeliest = [], []
    for at in range(0, len(h_PH), chunk):
        logits_PV = F.linear(h_PH[at : at + chunk], decoder.head_weight).float()
        target_P = pack.targets[at : at + chunk]
        logprobs.append(logits_PV.gather(1, target_P[:, None])[:, 0] - logits_PV.logsumexp(1))
        likeliest.append(logits_PV.argmax(1) == target_P)
    return torch.cat(logprobs).cpu(), torch.cat(likeliest).cpu()


@dataclass(frozen=True)
class Probe:
    """A text and what is asked of it: (i, token) asks how likely `token` is behind ids[: i + 1]."""

    ids: list[int]
    asked: list[tuple[int, int]]

    @staticmethod
    def of(row: Encoded) -> Probe:
        """Each supervised token of a row, behind all that stands before it."""
        return Probe(row.input_ids, [(i, label) for i, label in enumerate(row.labels[1:]) if label != IGNORED])


def packs_of(probes: Sequence[Probe], tokens_per_pack: int, device: torch.device) -> list[list[int]]:
    """Numbers of the probes, longest first and alike together, in packs of at most `tokens_per_pack` tokens."""
    most = tokens_per_pack if device.type != "cpu" else min(tokens_per_pack, 1024)  # training's rule
    lengths = [len(probe.ids) for probe in probes]
    order = sorted(range(len(probes)), key=lambda i: -lengths[i])
    return list(packing.steps_of_tokens(order, lengths, most))


def score_probes(
    decoder: Decoder, probes: Sequence[Probe], tokens_per_pack: int, progress: Progress = lambda done: None
) -> list[tuple[Tensor, Tensor]]:
    """`score` of each probe, in their order. They share packs; what they see of each other is nothing."""
    training = decoder.training
    decoder.eval()
    out: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0))] * len(probes)
    for numbers in packs_of(probes, tokens_per_pack, decoder.device):
        rows = [Encoded(probes[i].ids, [IGNORED] * len(probes[i].ids)) for i in numbers]
        plain = make_pack(rows, numbers)
        starts = plain.cu_seqlens.tolist()
        asked = [
            (start + at, token) for i, start in zip(numbers, starts, strict=False) for at, token in probes[i].asked
        ]
        predict, targets = torch.tensor(asked, dtype=torch.int64).reshape(-1, 2).unbind(1)
        logprobs, likeliest = score(decoder, replace(plain, predict=predict, targets=targets, supervised=len(asked)))
        counts = [len(probes[i].asked) for i in numbers]
        parts = zip(logprobs.split(counts), likeliest.split(counts), strict=True)
        for i, part in zip(numbers, parts, strict=True):
            out[i] = part
        progress(len(numbers))
    decoder.train(training)
    return out


def losses(
    decoder: Decoder, rows: Sequence[Encoded], tokens_per_pack: int, progress: Progress = lambda done: None
) -> Losses:
    """The cross-entropy of each row's supervised tokens."""
    scored = score_probes(decoder, [Probe.of(row) for row in rows], tokens_per_pack, progress)
    return Losses([(-float(logprobs.double().sum()), len(logprobs)) for logprobs, _ in scored])
