"""Who runs, who waits, and with which pages. Numbers only, no tensors.

First come, first served: requests are admitted in the order of their arrival, and one that does not fit yet holds back
those behind it. When pages run out, the youngest that runs gives its own back and waits again, in its old place; what
it had said stands, and is computed anew. So the oldest always comes to its end.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from minitune.infer.pages import Chain, PagePool
from minitune.infer.request import Handle, Request
from minitune.infer.text import AnswerText


@dataclass(eq=False)
class Sequence:
    """A request that waits or runs. ids: the prompt and the answer so far; computed: how many of them are in the cache.

    prefix: what sequences must have in common to share pages. seed: of its draws. room: the answer's tokens at most.
    """

    number: int
    handle: Handle
    text: AnswerText
    ids: list[int]
    prefix: Hashable
    adapter: int
    seed: int
    room: int
    slot: int = -1
    computed: int = 0
    chain: Chain | None = None

    @property
    def request(self) -> Request:
        return self.handle.request

    @property
    def ready(self) -> bool:
        """Whether only its newest token is not in the cache, so that it can go on token by token."""
        return self.computed == len(self.ids) - 1

    @property
    def held(self) -> Chain:
        assert self.chain is not None, "it does not run"
        return self.chain


class Scheduler:
    """`running` and `waiting`, each by age, the oldest first."""

    def __init__(self, pool: PagePool, slots: int, waiting: Iterable[Sequence] = ()):
        self.pool = pool
        self.running: list[Sequence] = []
        self.waiting = list(waiting)
        self._slots = list(range(slots))  # a heap

    def add(self, sequence: Sequence) -> None:
        bisect.insort(self.waiting, sequence, key=lambda s: s.number)

    def admit(self) -> Sequence | None:
        """Gives the oldest that waits a slot and pages; None where it has to wait, or nobody does.

        It also waits while one that runs is still reading the same beginning: then it shares those pages.
        """
        if not self.waiting or not self._slots:
            return None
        sequence = self.waiting[0]
        if any(self._reads_the_same(other, sequence) for other in self.running):
            return None
        # a spare page for each that runs: who is admitted shall not be turned out at once
        chain = self.pool.open(sequence.prefix, sequence.ids, spare=len(self.running))
        if chain is None:
            return None
        self.waiting.pop(0)
        sequence.slot, sequence.chain, sequence.computed = heapq.heappop(self._slots), chain, chain.reused
        bisect.insort(self.running, sequence, key=lambda s: s.number)
        return sequence

    def _reads_the_same(self, running: Sequence, waiting: Sequence) -> bool:
        if running.ready or running.prefix != waiting.prefix:
            return False
        end = running.computed + self.pool.size
        return end < len(waiting.ids) and running.ids[:end] == waiting.ids[:end]

    def grow(self) -> list[Sequence]:
        """A page for each ready sequence whose pages are full; those that lost theirs."""
        out: list[Sequence] = []
        for sequence in list(self.running):
            if sequence in out or not sequence.ready:
                continue
            while sequence.computed >= len(sequence.held.pages) * self.pool.size:
                if self.pool.grow(sequence.held):
                    continue
                youngest = self.running[-1]
                out.append(youngest)
                self.release(youngest)
                self.add(youngest)
                if youngest is sequence:
                    break
        return out

    def share(self, sequence: Sequence) -> None:
        """Lets others read the pages that are full."""
        self.pool.share(sequence.held, sequence.ids[: sequence.computed])

    def release(self, sequence: Sequence) -> None:
        """Takes a running sequence out; its pages are kept for others while nobody needs their room."""
        self.running.remove(sequence)
        self.pool.close(sequence.held, sequence.ids[: sequence.computed])
        heapq.heappush(self._slots, sequence.slot)
        sequence.slot, sequence.chain, sequence.computed = -1, None, 0

    def drop(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is."""
        if sequence in self.running:
            self.release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
