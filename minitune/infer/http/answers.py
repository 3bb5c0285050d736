"""From the engine's thread to the event loop and back: answers as they come, and broken off when nobody listens."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from starlette.types import Receive

from minitune.infer.http.errors import ClientGone
from minitune.infer.request import Handle, Piece, Request

if TYPE_CHECKING:
    from minitune.infer.http.service import Service

T = TypeVar("T")
CROWD, BREATH = 8, 0.04  # with more answers than this under way, a stream sends at most every so many seconds
PING_SECONDS = 15.0  # between signs of life while nothing comes: proxies close a silent connection after a minute


class Mailbox:
    """One wake-up of the event loop for all that has come since the last: at 64 streams one a token would be
    thousands of system calls a second, in the thread that decodes."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._items: deque[tuple[Answer, Piece | None]] = deque()
        self._woken = False

    def post(self, answer: Answer, piece: Piece | None) -> None:
        """From any thread."""
        self._items.append((answer, piece))
        if not self._woken:
            self._woken = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._woken = False
        while self._items:
            answer, piece = self._items.popleft()
            answer.take(piece)


class Answer:
    """One of a request's answers. `pieces` are those that nobody has read yet."""

    def __init__(self, owner: Answers, index: int, request: Request):
        self.owner, self.index, self.request = owner, index, request
        self.handle: Handle | None = None
        self.pieces: list[Piece] = []
        self.done = self.told = self.left = False
        self.first = 0.0  # when its first token came

    def take(self, piece: Piece | None) -> None:
        if piece is None and self.handle is None:  # it ended before submit had returned
            asyncio.get_running_loop().call_soon(self.take, None)
            return
        if piece is None:
            self.done = True
            self.owner.finished(self)
        else:
            if piece.ids and not self.first:
                self.first = time.perf_counter()
            self.pieces.append(piece)
        self.owner.news.set()


class Answers:
    """The answers to one HTTP request: `async with answers: ...`; leaving it cancels what is not finished.

    `submit` runs on the worker thread. `batches` yields (answer, its new pieces, whether it is finished); None
    when nothing came for PING_SECONDS. In a crowd what came within BREATH comes together: 64 streams at 250 tokens
    a second would be 16,000 events, and the loop that writes them holds the lock that the decoding thread needs.
    """

    def __init__(self, service: Service, model: str, count: int):
        service.gate.enter(count)
        self._service, self._model = service, model
        self._start = time.perf_counter()
        self._inside = count
        self._closed = False
        self._mailbox = Mailbox(asyncio.get_running_loop())
        self.news = asyncio.Event()
        self.all: list[Answer] = []
        service.live.add(self.cancel)

    async def __aenter__(self) -> Answers:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._closed = True
        self.cancel()
        self._service.live.discard(self.cancel)
        for _ in range(self._inside):
            self._service.gate.leave()
        self._inside = 0

    def cancel(self) -> None:
        for answer in self.all:
            if answer.handle is not None and not answer.done:
                answer.handle.cancel()

    def submit(self, requests: Sequence[Request]) -> None:
        """Hands them to the engine; raises UserError for what it can't answer."""
        engine = self._service.ready().engine
        for index, request in enumerate(requests):
            answer = Answer(self, index, request)
            self.all.append(answer)
            answer.handle = engine.submit(request, partial(self._mailbox.post, answer))
            if self._closed:  # the client left while its prompt was being read
                answer.handle.cancel()

    def finished(self, answer: Answer) -> None:
        handle, metrics, now = answer.handle, self._service.metrics, time.perf_counter()
        assert handle is not None
        whole = bool(answer.first) and handle.finish not in ("cancelled", "error")
        if self._inside:  # else it was counted when the client left
            self._inside -= 1
            self._service.gate.leave(now - self._start if whole else None)
        metrics.answers.labels(self._model, handle.finish).inc()
        if not whole:
            return
        metrics.first.observe(answer.first - self._start)
        metrics.whole.observe(now - self._start)
        if len(handle.ids) > 1:
            metrics.token.observe((now - answer.first) / (len(handle.ids) - 1))

    async def batches(self) -> AsyncIterator[tuple[Answer, list[Piece], bool] | None]:
        sent = False
        while not all(answer.told for answer in self.all):
            try:
                async with asyncio.timeout(PING_SECONDS):
                    await self.news.wait()
            except TimeoutError:
                yield None
                continue
            if sent and self._service.gate.inside > CROWD:
                await asyncio.sleep(BREATH)
            self.news.clear()
            for answer in self.all:
                if answer.pieces or (answer.done and not answer.told):
                    pieces, answer.pieces, answer.told = answer.pieces, [], answer.done
                    yield answer, pieces, answer.done
                    sent = True

    async def whole(self) -> None:
        """Waits until all are finished; their handles then hold everything but the log-probabilities."""
        async for _ in self.batches():
            pass


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes away (ClientGone)."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    watcher, worker = asyncio.ensure_future(gone()), asyncio.ensure_future(work)
    try:
        await asyncio.wait({watcher, worker}, return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            raise ClientGone
        return worker.result()
    finally:
        for task in (watcher, worker):
            task.cancel()
        await asyncio.gather(watcher, worker, return_exceptions=True)


async def in_worker(service: Service, call: Callable[[], T]) -> T:
    """`call` on the one thread that reads prompts."""
    return await asyncio.get_running_loop().run_in_executor(service.worker, call)
