"""Rows -> the tensors of a step: resumable order, shapes that a captured step can rely on, pinned memory.

Legend: T packed tokens, S documents, P supervised positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from minitune.data import packing
from minitune.data.packing import Steps
from minitune.data.store import EncodedRows
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
    """One optimizer step: its packs and what all of them hold together.

    whole: (supervised, tokens) of the step over all processes, where `packs` are one's share of it.
    """

    packs: list[Pack]
    rows: int
    whole: tuple[int, int] | None = None

    @property
    def supervised(self) -> int:
        return sum(p.supervised for p in self.packs) if self.whole is None else self.whole[0]

    @property
    def tokens(self) -> int:
        return sum(p.tokens for p in self.packs) if self.whole is None else self.whole[1]


def make_pack(rows: Sequence[Encoded], numbers: Sequence[int], pin: bool = False) -> Pack:
    """The pack of these rows; `numbers` are the rows' places in the data set."""
    import torch

    chosen = EncodedRows.of(rows)
    ids, learned = chosen.flat()
    lengths = chosen.lengths
    cu = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.arange(len(ids)) - np.repeat(cu[:-1], lengths)
    uids = positions + np.repeat(np.asarray(numbers, dtype=np.int64) << 24, lengths)
    said = np.flatnonzero(learned & (positions > 0))  # nothing stands before a row's first token

    def tensor(values: NDArray, dtype: torch.dtype = torch.int64) -> Tensor:
        made = torch.as_tensor(values).to(dtype)
        return made.pin_memory() if pin else made

    return Pack(
        tensor(ids), tensor(positions), tensor(uids), tensor(cu, torch.int32), tensor(said - 1), tensor(ids[said]),
        tuple(lengths.tolist()), len(said), chosen.longest,
    )  # fmt: skip


class Loader:
    """The steps of a run, epoch after epoch. A step's rows depend on (seed, epoch, step) alone, so any step can be
    the first of a resumed run. rank, ranks: which share of each step's rows this process gets, of how many."""

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
        rank: int = 0,
        ranks: int = 1,
    ):
        self.rows = EncodedRows.of(rows)
        self.rank, self.ranks = rank, ranks
        self.seed, self.shuffle, self.pin = seed, shuffle, pin
        self.rows_per_step, self.tokens_per_step = rows_per_step, tokens_per_step
        self.tokens_per_pack = tokens_per_pack
        self.lengths = self.rows.lengths
        self._epoch: tuple[int, Steps] = (-1, Steps([], [0]))

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The rows' order in an epoch."""
        import torch

        if not self.shuffle:
            return np.arange(len(self.rows))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.rows), generator=generator).numpy()

    def steps(self, epoch: int) -> Steps:
        """The rows of each step of an epoch."""
        if self._epoch[0] != epoch:
            order = self.order(epoch)
            if self.tokens_per_step:
                steps = packing.steps_of_tokens(order, self.lengths, self.tokens_per_step)
            else:
                if self.shuffle:
                    order = packing.level(order, self.lengths, self.rows_per_step)
                steps = packing.steps_of_rows(order, self.rows_per_step)
            self._epoch = (epoch, steps)
        return self._epoch[1]

    def batch(self, epoch: int, step: int) -> StepBatch:
        """One step's tensors, on the host."""
        if self.ranks > 1:
            return self._share(epoch, step)
        rows = self.steps(epoch)[step]
        lengths = dict(zip(rows, self.lengths[rows].tolist(), strict=True))
        packs = packing.packs(rows, lengths, self.tokens_per_pack)
        return StepBatch([make_pack(self.rows.select(p), p, self.pin) for p in packs], len(rows))

    def plans(self, epoch: int, step: int) -> list[list[list[int]]]:
        """The rows of each pack of each process. Where the step fits one pack a process, a share that is a little
        longer than its half, say, is one pack too."""
        rows = self.steps(epoch)[step]
        lengths = dict(zip(rows, self.lengths[rows].tolist(), strict=True))
        room = self.tokens_per_pack
        if sum(lengths.values()) <= self.ranks * room:
            room += room // 64
        shares = packing.deal(rows, lengths, self.ranks)
        return [packing.packs(share, lengths, room) if share else [] for share in shares]

    def _share(self, epoch: int, step: int) -> StepBatch:
        """This process's packs of a step. All processes have equally many, since sharded weights are gathered for each:
        where rows are short of that, a pack is one token that counts for nothing."""
        rows, plans = self.steps(epoch)[step], self.plans(epoch, step)
        made = [make_pack(self.rows.select(p), p, self.pin) for p in plans[self.rank]]
        if spare := max(map(len, plans)) - len(made):
            token = self.rows[rows[0]].input_ids[:1]
            made += [make_pack([Encoded(token, [IGNORED])], [0], self.pin)] * spare
        return StepBatch(made, len(rows), (int(self.rows.supervised[rows].sum()), int(self.lengths[rows].sum())))

    def batches(self, epoch: int = 0) -> Iterator[StepBatch]:
        """All steps of an epoch, in order."""
        for step in range(len(self.steps(epoch))):
            yield self.batch(epoch, step)
