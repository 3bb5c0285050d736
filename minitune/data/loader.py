"""Rows -> the tensors of a step: resumable order, shapes that a captured step can rely on, pinned memory.

Legend: T packed tokens, S documents, P supervised positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minitune.data import packing
from minitune.data.template import IGNORED, Encoded

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Pack:
    """Documents laid end to end.

    input_ids, position_ids, token_uids: int64 [T]; positions restart with each document; a token's uid is its row's
    number in the data set and its place in the row, wherever it is packed. cu_seqlens: int32 [S + 1].
    predict, targets: int64 [P]: the logits at token `predict[i]` should say `targets[i]` (-100: padding).
    lengths: the documents' lengths on the host. supervised: targets that count. longest: a bound of the lengths.
    """

    input_ids: Tensor
    position_ids: Tensor
    token_uids: Tensor
    cu_seqlens: Tensor
    predict: Tensor
    targets: Tensor
    lengths: tuple[int, ...]
    supervised: int
    longest: int

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def to(self, device: torch.device) -> Pack:
        """The same on a device; the copy does not wait."""
        names = ("input_ids", "position_ids", "token_uids", "cu_seqlens", "predict", "targets")
        moved = {n: getattr(self, n).to(device, non_blocking=True) for n in names}
        return Pack(**moved, lengths=self.lengths, supervised=self.supervised, longest=self.longest)


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step: its packs and what all of them hold together."""

    packs: list[Pack]
    rows: int

    @property
    def supervised(self) -> int:
        return sum(p.supervised for p in self.packs)

    @property
    def tokens(self) -> int:
        return sum(p.tokens for p in self.packs)


def make_pack(rows: Sequence[Encoded], numbers: Sequence[int], pin: bool = False) -> Pack:
    """The pack of these rows; `numbers` are the rows' places in the data set."""
    import torch

    ids: list[int] = []
    positions: list[int] = []
    uids: list[int] = []
    predict: list[int] = []
    targets: list[int] = []
    for row, number in zip(rows, numbers, strict=True):
        base = len(ids)
        ids += row.input_ids
        positions += range(len(row.input_ids))
        uids += range(number << 24, (number << 24) + len(row.input_ids))
        for i, label in enumerate(row.labels[1:]):
            if label != IGNORED:
                predict.append(base + i)
                targets.append(label)
    lengths = tuple(len(row.input_ids) for row in rows)
    cu = [0]
    for length in lengths:
        cu.append(cu[-1] + length)

    def tensor(values: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
        made = torch.tensor(values, dtype=dtype)
        return made.pin_memory() if pin else made

    return Pack(
        tensor(ids), tensor(positions), tensor(uids), tensor(cu, torch.int32), tensor(predict), tensor(targets),
        lengths, len(targets), max(lengths, default=0),
    )  # fmt: skip


class Loader:
    """The steps of a run, epoch after epoch. A step's rows depend on (seed, epoch, step) alone, so any step can be
    the first of a resumed run."""

    def __init__(
        self,
        rows: Sequence[Encoded],
        *,
        rows_per_step: int,
        tokens_per_step: int = 0,
        tokens_per_pack: int = 8192,
        seed: int = 0,
        shuffle: bool = True,
        pin: bool = False,
    ):
        self.rows, self.seed, self.shuffle, self.pin = rows, seed, shuffle, pin
        self.rows_per_step, self.tokens_per_step = rows_per_step, tokens_per_step
        self.tokens_per_pack = tokens_per_pack
        self.lengths = [len(row.input_ids) for row in rows]
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def order(self, epoch: int) -> list[int]:
        """The rows' order in an epoch."""
        import torch

        if not self.shuffle:
            return list(range(len(self.rows)))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.rows), generator=generator).tolist()

    def steps(self, epoch: int) -> list[list[int]]:
        """The rows of each step of an epoch."""
        if self._epoch[0] != epoch:
            order = self.order(epoch)
            if self.tokens_per_step:
                steps = packing.steps_of_tokens(order, self.lengths, self.tokens_per_step)
            else:
                steps = packing.steps_of_rows(order, self.rows_per_step)
            self._epoch = (epoch, steps)
        return self._epoch[1]

    def batch(self, epoch: int, step: int) -> StepBatch:
        """One step's tensors, on the host."""
        rows = self.steps(epoch)[step]
        packs = packing.packs(rows, self.lengths, self.tokens_per_pack)
        return StepBatch([make_pack([self.rows[r] for r in p], p, self.pin) for p in packs], len(rows))

    def batches(self, epoch: int = 0) -> Iterator[StepBatch]:
        """All steps of an epoch, in order."""
        for step in range(len(self.steps(epoch))):
            yield self.batch(epoch, step)
