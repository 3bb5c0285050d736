"""Decode steps recorded as CUDA graphs and replayed, one step ahead of the host.

A step is two graphs: one gives the scores of a batch (`model.decode`), one draws the tokens and puts them into the
slots. So the device can go on to the next token before the host has looked at this one: what the host finds out too
late (an end token, a cancellation) costs a row of one step, whose result is dropped. What a graph can't do (grammars,
log-probabilities, a bias) is drawn plainly after the first graph. A batch runs in the smallest recorded size that
holds it, padded with rows of the idle slot; what is not recorded yet runs plainly.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from minitune.infer.draw import kind_of
from minitune.infer.schedule import Scheduler, Sequence
from minitune.model import decode
from minitune.model.contract import Contract
from minitune.model.decode import DecodeStep

if TYPE_CHECKING:
    from minitune.infer.slots import Drawn, Slots

SIZES = (1, 2, 4, 8, 16, 32, 64)  # rows


class Run(NamedTuple):
    """A graph of scores: rows, contexts of more than `decode.LONG` tokens, adapters."""

    rows: int
    long: bool
    adapters: bool


class Draw(NamedTuple):
    """A graph of draws: rows, their `kind_of`, whether a repetition penalty is among them."""

    rows: int
    kinds: frozenset[str]
    penalised: bool


@dataclass
class UnderWay:
    """A step that the device has been given: its rows, each with the slot that it had then, and where [B, 3] (token,
    settled, scores finite) will be. void: sequences whose row is worth nothing."""

    rows: list[tuple[Sequence, int]]
    told: Tensor
    done: torch.cuda.Event | None
    void: set[Sequence] = field(default_factory=set)

    def alive(self) -> set[Sequence]:
        return {sequence for sequence, slot in self.rows if sequence.slot == slot} - self.void


class Captured:
    """The graphs of some slots' decode steps. `prepare` records them; `start` and `next` are steps."""

    def __init__(self, slots: Slots, limit: int):
        self.limit = limit
        self.slots: Slots = weakref.proxy(slots)  # in a circle, a card's memory would wait for the garbage collector
        self.cuda = slots.decoder.device.type == "cuda"
        most = slots.token_S.shape[0] - 1
        self.sizes = [size for size in SIZES if size < 2 * most]
        self.steps: dict[int, DecodeStep] = {}
        self.graphs: dict[Run | Draw, Callable[[], None]] = {}
        self.asked: list[Run | Draw] = []
        self.under_way: UnderWay | None = None
        self.contract: Contract | None = None
        self._slots_of: dict[int, tuple[int, ...]] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.cuda else None
        draws = [frozenset({kind}) for kind in ("greedy", "near")]
        self._usual: list[Run | Draw] = []
        for rows in reversed(self.sizes):
            self._usual += [Draw(rows, kinds, False) for kinds in draws]
            for adapters in (False, True)[: 1 + (slots.choice is not None)]:
                self._usual += [Run(rows, long, adapters) for long in (False, True)[: 1 + (limit > decode.LONG)]]

    def prepare(self, all_usual: bool) -> bool:
        """Records one graph that was asked for, or with `all_usual` one that may be; False: there is none."""
        if all_usual and not self.asked:
            self.asked = [key for key in self._usual if key not in self.graphs][:1]
        if not self.asked:
            return False
        key = self.asked.pop(0)
        self.graphs[key] = self._record(self._work(key), self._step(key.rows))
        if self.contract is None:
            self.contract = self._contract()
        return True

    def start(self, sequences: Items[Sequence]) -> bool:
        """Gives the device the next step of these ready sequences; False: it is not recorded."""
        self.under_way = self._launch([(sequence, sequence.computed) for sequence in sequences])
        return self.under_way is not None

    def next(self, schedule: Scheduler) -> list[Drawn]:
        """The tokens of the step that is under way, after the device has been given the one that follows."""
        now, self.under_way = self.under_way, None
        assert now is not None
        self.under_way = self._follow(schedule, now)
        if now.done is not None:
            now.done.synchronize()  # the one place that waits for the device
        out: list[Drawn] = []
        alive = now.alive()
        for (sequence, _), (token, settled, fine) in zip(now.rows, now.told.tolist(), strict=True):
            if sequence in alive:
                if fine and not settled:  # too many candidates: drawn again by itself
                    if self.under_way is not None:
                        self.under_way.void.add(sequence)
                    self.slots.restore(sequence)
                    out += self.slots.decode([sequence])
                else:
                    out.append(self.slots.drawn(sequence, int(token) if fine else -1))
        return out

    def scores(self, sequences: Items[Sequence]) -> Tensor | None:
        """The next token's scores [B, V] of ready sequences, whose positions move on; None: it is not recorded."""
        step, replay = self._found([(sequence, sequence.computed) for sequence in sequences])
        if step is None:
            return None
        self._select(step, sequences)
        replay()
        return step.scores[: len(sequences)]

    def drop(self) -> None:
        """Takes back the step under way, as if it had never begun."""
        if self.under_way is not None:
            for sequence in self.under_way.alive():
                self.slots.restore(sequence)
        self.under_way = None

    def _follow(self, schedule: Scheduler, now: UnderWay) -> UnderWay | None:
        """The step after `now`, whose tokens are not known yet: of all that surely go on, and have pages for it."""
        alive = now.alive()
        going: list[tuple[Sequence, int]] = []
        for sequence in schedule.running:
            ends = sequence in alive and len(sequence.handle.ids) + 1 >= sequence.room
            if sequence.ready and not ends:
                going.append((sequence, sequence.computed + (sequence in alive)))
        if not going:
            return None
        for sequence, place in going:
            if place >= len(sequence.held.pages) * schedule.pool.size:
                if not schedule.pool.grow(sequence.held):
                    return None  # somebody has to give way, which can't be done under way
                self.slots.write_last_page(sequence)
        return self._launch(going)

    def _launch(self, going: Items[tuple[Sequence, int]]) -> UnderWay | None:
        """Both graphs of sequences whose next tokens stand at these places."""
        sequences = [sequence for sequence, _ in going]
        requests = [sequence.request for sequence in sequences]
        if any(r.grammar is not None or r.logprobs is not None or r.bias is not None for r in requests):
            return None
        step, replay = self._found(going)
        if step is None:
            return None
        kinds = frozenset(kind_of(r.sampling) for r in requests) - {"greedy"} or frozenset({"greedy"})
        draw = self._find(Draw(step.rows, kinds, any(r.sampling.repetition_penalty != 1 for r in requests)))
        if draw is None:
            return None
        self._select(step, sequences)
        replay()
        draw()
        count = len(sequences)
        told = torch.empty(count, 3, dtype=step.told.dtype, pin_memory=self.cuda)
        told.copy_(step.told[:count], non_blocking=True)
        done = torch.cuda.Event() if self.cuda else None
        if done is not None:
            done.record()
        return UnderWay([(sequence, sequence.slot) for sequence in sequences], told, done)

    def _found(self, going: Items[tuple[Sequence, int]]) -> tuple[DecodeStep | None, Callable[[], None]]:
        rows = next((size for size in self.sizes if size >= len(going)), 0)
        if not rows:
            return None, lambda: None
        long = max(place for _, place in going) + 1 > decode.LONG
        replay = self._find(Run(rows, long, any(sequence.adapter >= 0 for sequence, _ in going)))
        return (None, lambda: None) if replay is None else (self._step(rows), replay)

    def _find(self, key: Run | Draw) -> Callable[[], None] | None:
        if key not in self.graphs and key not in self.asked:
            self.asked.append(key)
        return self.graphs.get(key)

    def _select(self, step: DecodeStep, sequences: Iterable[Sequence]) -> None:
        """Says which slots the step's rows are; the contract is checked where that changes."""
        chosen = tuple(sequence.slot for sequence in sequences)
        if self._slots_of.get(step.rows) == chosen:
            return
        if self.contract is not None:
            self.contract.check()
        idle = self.slots.token_S.shape[0] - 1
        padded = torch.tensor([*chosen, *[idle] * (step.rows - len(chosen))])
        step.slot_B.copy_(padded.pin_memory() if self.cuda else padded, non_blocking=True)
        self._slots_of[step.rows] = chosen

    def _step(self, rows: int) -> DecodeStep:
        if rows not in self.steps:
            slots = self.slots
            self.steps[rows] = DecodeStep(slots.decoder, slots.cache, slots.columns, rows, self.limit)
        return self.steps[rows]

    def _work(self, key: Run | Draw) -> Callable[[], None]:
        """What a graph is to do."""
        step = self._step(key.rows)
        if isinstance(key, Run):
            return partial(step.run, key.long, self.slots.choice if key.adapters else None)
        if key.kinds == {"greedy"} and not key.penalised:
            return step.take_best

        slots = self.slots

        def drawn() -> None:
            _, told = slots.draw_rows(step.scores.float(), step.slot_B, key.kinds, key.penalised)
            step.told.copy_(told)

        return drawn

    def _record(self, work: Callable[[], None], step: DecodeStep) -> Callable[[], None]:
        """The graph of `work`. All rows are idle meanwhile, so that neither warming up nor recording touches a
        sequence. Off a card (tests) it is the work itself."""
        if not self.cuda:
            return work
        step.slot_B.fill_(self.slots.token_S.shape[0] - 1)
        self._slots_of.pop(step.rows, None)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()
        return graph.replay

    def _contract(self) -> Contract:
        """Weights, adapters, cache and columns."""
        slots = self.slots
        places: list[tuple[str, Callable[[], Tensor | None]]] = []
        for name, module in slots.decoder.named_modules():
            for held in (module._parameters, module._buffers):
                there = [key for key, tensor in held.items() if tensor is not None and not tensor.is_mkldnn]
                places += [(f"{name}.{key}", partial(held.get, key)) for key in there]
        columns = [name for name in vars(slots) if name.endswith(("_S", "_SP"))]
        places += [(name, partial(getattr, slots, name)) for name in columns]
        places += [(name, partial(getattr, slots.cache, name)) for name in ("keys", "values")]
        return Contract(places)
