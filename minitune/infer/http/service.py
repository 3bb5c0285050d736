"""What the routes serve: the opened model by its public names, the limits, and how things stand."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from minitune.infer.http.errors import ApiError, unknown_model
from minitune.infer.http.metrics import Metrics
from minitune.infer.sampling import Sampling

if TYPE_CHECKING:
    from minitune.data.template import Template
    from minitune.infer.http.grammar import Grammars
    from minitune.infer.session import Session

LOADING, READY, STOPPING = "loading", "ready", "stopping"


@dataclass(frozen=True)
class HttpSettings:
    """What `minitune serve` sets. sampling: for what a request leaves out; api_keys: none means open to all."""

    api_keys: tuple[str, ...] = ()
    cors: tuple[str, ...] = ()
    max_queue: int = 256
    sampling: Sampling = field(default_factory=Sampling)


class Gate:
    """How many answers may be under way or waiting; who comes when it is full is told when to come again."""

    def __init__(self) -> None:
        self.slots, self.limit = 1, 1
        self.inside = 0
        self.seconds = 1.0  # an answer takes, a running mean

    def open(self, slots: int, max_queue: int) -> None:
        self.slots, self.limit = max(1, slots), max(1, slots) + max_queue

    def enter(self, answers: int) -> None:
        """Raises ApiError 429 with Retry-After when full, 400 for what could never come in."""
        if answers > self.limit:
            raise ApiError(400, f"{answers} answers at once; this server takes {self.limit} at most", param="n")
        if self.inside + answers > self.limit:
            rounds = max(1.0, (self.inside - self.slots) / self.slots)
            wait = min(60, math.ceil(rounds * self.seconds))
            message = f"the queue is full ({self.inside} answers); try again in {wait} s"
            raise ApiError(429, message, kind="rate_limit_error", code="queue_full", retry_after=wait)
        self.inside += answers

    def leave(self, seconds: float | None = None) -> None:
        """One answer is finished, after so long; None: it was broken off, which says nothing of the pace."""
        self.inside -= 1
        if seconds is not None:
            self.seconds += 0.1 * (seconds - self.seconds)


class Service:
    """Everything behind the routes. Lives on the event loop; `loaded` comes from the thread that loads.

    base: the base model's public name; adapters: names, in the order given. phase: loading, ready, stopping.
    """

    def __init__(self, settings: HttpSettings, base: str, adapters: tuple[str, ...] = ()):
        self.settings, self.base, self.adapters = settings, base, adapters
        self.phase = LOADING
        self.session: Session | None = None
        self.gate, self.metrics = Gate(), Metrics()
        self.live: set[Callable[[], None]] = set()  # each breaks one answer off
        self.limit = 0
        self._grammars: Grammars | None = None
        # One thread: a tokenizer keeps whether it splits special tokens as a setting, so two at once would mix.
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="prompts")
        self._lock = threading.Lock()

    def loaded(self, session: Session) -> None:
        """The model is there, its engine started."""
        self.session = session
        self.limit = session.engine.limit
        self.gate.open(session.engine.stats.slots, self.settings.max_queue)
        self.metrics.watch(session.engine)
        with self._lock:
            if self.phase == LOADING:
                self.phase = READY

    def stop(self) -> None:
        """No new answers from now on."""
        with self._lock:
            self.phase = STOPPING

    def ready(self) -> Session:
        """Raises ApiError 503 while there is nothing to answer with."""
        if self.phase != READY or self.session is None:
            message = {LOADING: "the model is loading", STOPPING: "the server is stopping"}[self.phase]
            raise ApiError(503, message, kind="server_error", code=self.phase, retry_after=5)
        return self.session

    @property
    def names(self) -> list[str]:
        return [self.base, *self.adapters]

    def adapter_of(self, model: str) -> str:
        """The engine's name of a public name: "" is the base."""
        if model == self.base:
            return ""
        if model in self.adapters:
            return model
        raise unknown_model(model, self.names)

    def template(self, adapter: str) -> Template:
        return self.ready().templates[adapter]

    def grammars(self) -> Grammars:
        """Made when first asked for (a second or two for a large vocabulary); on the worker thread."""
        if self._grammars is None:
            from minitune.infer.http.grammar import Grammars

            session = self.ready()
            stops = {i for template in session.templates.values() for i in template.stop_ids}
            self._grammars = Grammars(session.tokenizer, session.engine.decoder.config.vocab_size, sorted(stops))
        return self._grammars
