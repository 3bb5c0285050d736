"""Continuous batching: many requests at once over one decoder, each as if it were alone.

A step admits what fits, reads a pack of prompts (long ones in chunks, so that what runs goes on in between), and gives
every running request one token. `schedule` says who runs, `slots` computes; this file joins them, turns tokens into
answers and is the only one that other threads touch.
"""

from __future__ import annotations

import contextlib
import itertools
import secrets
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from minitune.config import UserError
from minitune.infer.answer import advance
from minitune.infer.capacity import choose
from minitune.infer.pages import PagePool
from minitune.infer.request import EngineStats, Handle, Piece, Request
from minitune.infer.schedule import Scheduler, Sequence
from minitune.infer.slots import Drawn, Slots
from minitune.infer.text import AnswerText
from minitune.model.cache import PAGE
from minitune.model.decoder import Decoder
from minitune.model.packed import pack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens of a prompt that are read between two tokens of what runs, and of all prompts while nothing runs.
CHUNK, IDLE_PACK = {"cpu": 128, "cuda": 1024}, {"cpu": 512, "cuda": 8192}


class Engine:
    """Answers many requests at once with one decoder, which it takes over: its weights may be reordered.

    adapters: {name: folder} of LoRA adapters that requests may name. slots: requests that run at once;
    cache_tokens: room for keys and values (0: both chosen, from memory). limit: tokens of a prompt and its answer.
    Thread-safe: submit, cancel, wake, stats; steps may be made by any thread, one at a time.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: PreTrainedTokenizerBase,
        *,
        adapters: Mapping[str, str | Path] | None = None,
        slots: int = 0,
        cache_tokens: int = 0,
    ):
        self.decoder, self.tokenizer = decoder, tokenizer
        self.adapters = {name: i for i, name in enumerate(adapters or {})}
        choice = None
        if adapters:
            from minitune.checkpoint.adapter import load_stack

            choice = load_stack(decoder, list(adapters.values()))
        pack(decoder)
        kind = decoder.device.type
        slots, pages = choose(decoder, slots, cache_tokens)
        self.limit = min(decoder.config.max_position_embeddings, pages * PAGE)
        self._chunk, self._pack = CHUNK.get(kind, 1024), IDLE_PACK.get(kind, 8192)
        self._pool = PagePool(pages, PAGE)
        self._schedule = Scheduler(self._pool, slots)
        self._slots = Slots(decoder, slots, pages, self.limit, choice)
        self.stats = EngineStats(slots=slots, cache_tokens=pages * PAGE)
        self._numbers = itertools.count()
        self._incoming: list[Sequence] = []
        self._stepping = threading.RLock()
        self._news = threading.Condition()
        self._something_new = self._closed = self._computing = False
        self._thread: threading.Thread | None = None

    def submit(self, request: Request, on_piece: Callable[[Piece | None], None] | None = None) -> Handle:
        """Queues a request; `on_piece` takes its pieces in the engine's thread, in place of the handle's iterator.

        UserError for a prompt that can never be answered, an unknown adapter, an empty stop text.
        """
        self._check(request)
        handle = Handle(self, request, on_piece)
        count, sampling = handle.prompt_tokens, request.sampling
        sequence = Sequence(
            number=-1,
            handle=handle,
            text=AnswerText(self.tokenizer, request.stop),
            ids=list(request.prompt_ids),
            prefix=(request.adapter, self.decoder.rope.regime(count)),
            adapter=self.adapters.get(request.adapter, -1),
            seed=secrets.randbits(63) if sampling.seed is None else sampling.seed,
            room=min(sampling.max_new_tokens, self.limit - count),
        )
        with self._news:
            if self._closed:
                raise UserError("the engine is closed")
            sequence.number = next(self._numbers)
            self._incoming.append(sequence)
            self.stats.requests += 1
            self.stats.prompt_tokens += count
            self.stats.waiting += 1
        self.wake()
        return handle

    def step(self) -> bool:
        """Admits what fits, reads prompts, one token for every running request. False: nothing is left to do.

        Where it raises (a bug, no memory, Ctrl-C), all that ran has ended and the engine can go on.
        """
        with self._stepping, torch.inference_mode(), self._on_card():
            try:
                self._take()
                self._prefill()
                self._decode()
            except BaseException as error:
                self._abandon(error)
                raise
            finally:
                self._count()
            return bool(self._schedule.running or self._schedule.waiting or self._incoming)

    def run_until_idle(self) -> None:
        """Steps in the caller's thread until every request is finished."""
        while self.step():
            pass

    @property
    def started(self) -> bool:
        """Whether a thread of its own makes the steps."""
        return self._thread is not None

    def start(self) -> None:
        """A thread that steps whenever there is work."""
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread; what is under way is cancelled. No request is taken any more."""
        with self._news:
            self._closed = True
        self.wake()
        if self._thread is not None:
            self._thread.join()
        with self._stepping:
            self._take(admit=False)
            for sequence in [*self._schedule.running, *self._schedule.waiting]:
                self._finish(sequence, "cancelled")
            self._count()

    def wake(self) -> None:
        """There is something to look at: a new request, a cancellation."""
        with self._news:
            self._something_new = True
            self._news.notify_all()

    def _work(self) -> None:
        while True:
            try:
                if not self._something_new and not self._closed and self._prepare():
                    continue
            except Exception:  # others are still to be served
                traceback.print_exc()
            with self._news:
                self._news.wait_for(lambda: self._something_new or self._closed)
                self._something_new = False
                if self._closed:
                    return
            try:
                while not self._closed and self.step():
                    pass
            except Exception:  # what ran has been told; others are still to be served
                traceback.print_exc()

    def _prepare(self) -> bool:
        """Records one more of the captured steps, while nobody waits; False: all are."""
        with self._stepping, torch.inference_mode(), self._on_card():
            return self._slots.prepare(all_usual=True)

    def _on_card(self) -> contextlib.AbstractContextManager[object]:
        """The decoder's card as this thread's current one: kernels and captures take that."""
        device = self.decoder.device
        return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()

    @property
    def plainly(self) -> str:
        """Why decode steps are not captured; "" where they are, or will be in a moment."""
        return self._slots.plainly

    def _check(self, request: Request) -> None:
        count, vocabulary = len(request.prompt_ids), self.decoder.config.vocab_size
        if not count:
            raise UserError("the prompt is empty")
        if count >= self.limit:
            if self.limit < self.decoder.config.max_position_embeddings:
                raise UserError(f"the conversation has {count} tokens, the cache holds {self.limit}; shorten it")
            raise UserError(f"the conversation has {count} tokens, the model reads fewer than {self.limit}; shorten it")
        if max(request.prompt_ids) >= vocabulary:
            beyond = f"token {max(request.prompt_ids)} of the prompt is beyond the model's {vocabulary}"
            raise UserError(f"{beyond}: another model's tokenizer")
        if request.adapter and request.adapter not in self.adapters:
            raise UserError(
                f"no adapter is called {request.adapter!r} (there are: {', '.join(self.adapters) or 'none'})"
            )
        if not all(request.stop):
            raise UserError("a stop text is empty")

    def _take(self, admit: bool = True) -> None:
        """New requests into the queue, cancelled ones out, those that fit into slots."""
        with self._news:
            new, self._incoming = self._incoming, []
        for sequence in new:
            self._schedule.add(sequence)
        for sequence in [*self._schedule.running, *self._schedule.waiting]:
            if sequence.handle.cancelled:
                self._finish(sequence, "cancelled")
        while admit and (admitted := self._schedule.admit()):
            self._slots.place(admitted)
            if not admitted.handle.ids:  # not one that had been turned out
                admitted.handle.reused_tokens = admitted.computed
                self.stats.reused_tokens += admitted.computed

    def _prefill(self) -> None:
        """One pack: the next chunk of each prompt that is being read, by age, as far as they fit."""
        reading = [s for s in self._schedule.running if not s.ready]
        room = self._chunk if len(reading) < len(self._schedule.running) else self._pack
        parts: list[tuple[Sequence, int]] = []
        for sequence in reading:
            # the same borders whatever else is read: they may matter to the last bit
            stop = min(len(sequence.ids), (sequence.computed // self._chunk + 1) * self._chunk)
            room -= stop - sequence.computed
            if parts and room < 0:
                break
            parts.append((sequence, stop))
        if not parts:
            return
        with self._device():
            drawn = self._slots.prefill(parts)
        for sequence, stop in parts:
            sequence.computed = stop
            self._schedule.share(sequence)
        self._advance(drawn)

    def _decode(self) -> None:
        """A token for each ready sequence: of a step that the device has been given already, or of one begun now."""
        captured = self._slots.captured
        ready: list[Sequence] = []
        under_way = captured is not None and captured.under_way is not None and bool(captured.under_way.alive())
        if not under_way:
            self.stats.preempted += len(self._schedule.grow())
            ready = [s for s in self._schedule.running if s.ready]
            if not ready:
                return
            for sequence in ready:
                if sequence.computed % PAGE == 0:
                    self._slots.write_pages(sequence)
        with self._device():
            if captured is not None and (under_way or captured.start(ready)):
                drawn = captured.next(self._schedule)
            else:
                drawn = self._slots.decode(ready)
        for one in drawn:
            one.sequence.computed += 1
        self._advance(drawn)
        self._slots.prepare(all_usual=False)

    @contextlib.contextmanager
    def _device(self) -> Iterator[None]:
        """While the device computes the books are right, and are left so by what breaks it off."""
        self._computing = True
        yield
        self._computing = False

    def _advance(self, drawn: Iterable[Drawn]) -> None:
        for one in drawn:
            handle, before = one.sequence.handle, len(one.sequence.ids)
            try:
                piece, finish = advance(one)
                self.stats.generated_tokens += len(one.sequence.ids) - before
                if piece is not None:
                    handle.text += piece.text
                    handle.give(piece)
            except Exception as error:  # noqa: BLE001  a grammar, or a reader of pieces: the others go on
                handle.error, finish = _as_user_error(error), "error"
            if finish:
                self._finish(one.sequence, finish)

    def _finish(self, sequence: Sequence, why: str) -> None:
        """The end of a request, wherever it is."""
        self._schedule.drop(sequence)
        handle = sequence.handle
        self.stats.cancelled += why == "cancelled"
        handle.finish = why
        try:
            handle.give(None)
        except Exception:  # noqa: BLE001  nobody listens any more
            traceback.print_exc()

    def _abandon(self, error: BaseException) -> None:
        """Ends all that runs, after a step that was broken off; the cache is kept where its books are right."""
        running, failed = list(self._schedule.running), isinstance(error, Exception)
        if self._slots.captured is not None:
            self._slots.captured.under_way = None
        if not self._computing:
            self._pool = PagePool(self._pool.count, self._pool.size)
            self._schedule = Scheduler(self._pool, self.stats.slots, self._schedule.waiting)
        self._computing = False
        for sequence in running:
            if isinstance(error, Exception):
                sequence.handle.error = _as_user_error(error)
            if sequence in self._schedule.running:
                self._schedule.release(sequence)
            self._finish(sequence, "error" if failed else "cancelled")

    def _count(self) -> None:
        stats, schedule = self.stats, self._schedule
        stats.running, stats.waiting = len(schedule.running), len(schedule.waiting) + len(self._incoming)
        stats.cache_tokens_kept = self._pool.kept * PAGE
        stats.cache_tokens_used = (self._pool.count - self._pool.available) * PAGE


def _as_user_error(error: Exception) -> UserError:
    if isinstance(error, UserError):
        return error
    reason = (str(error).strip().splitlines() or [""])[0]
    return UserError(f"the answer was broken off: {type(error).__name__}: {reason}"[:300])


def answer_all(engine: Engine, requests: Iterable[Request]) -> list[Handle]:
    """Submits all, runs until idle; the handles in order. A request that fails has its `error` set."""
    handles = [engine.submit(request) for request in requests]
    engine.run_until_idle()
    return handles
