"""What is asked of the engine, and what comes back."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from minitune.config import UserError
from minitune.infer.sampling import Bias, Sampling

if TYPE_CHECKING:
    from torch import Tensor

    from minitune.infer.engine import Engine


class Grammar(Protocol):
    """What may come next, token by token (the form of xgrammar's matcher)."""

    def mask(self, bits: Tensor) -> None:
        """Sets `bits`, int32 [ceil(V/32)] on the CPU: bit v % 32 of word v // 32 says whether token v may come."""

    def accept(self, token: int) -> bool:
        """Takes the token that was drawn; whether the text is finished now."""


@dataclass(frozen=True)
class Request:
    """One prompt to be answered.

    prompt_ids: by `data.template` (or a plain text's ids). stop_ids: tokens that end the answer and are no part of
    it. stop: texts that do; the answer ends before the first of them, across token and character borders. adapter: a
    name that the engine was given, "" for the base. logprobs: None, or how many of the likeliest tokens to tell
    beside the chosen one (0: the chosen one alone). bias: None where nothing is added to the scores.
    """

    prompt_ids: tuple[int, ...]
    sampling: Sampling
    stop_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    adapter: str = ""
    logprobs: int | None = None
    grammar: Grammar | None = None
    bias: Bias | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """log softmax of the model's raw scores in float32, before penalty, temperature, filters and grammar."""

    token: int
    logprob: float
    top: list[tuple[int, float]] = field(default_factory=list)  # the likeliest, falling


@dataclass(frozen=True)
class Piece:
    """What one step gave one request.

    text: "" while a character or a possible stop text is incomplete. ids: the step's token; () where only held-back
    text comes. logprobs: as many as ids where they were asked for, else [].
    """

    text: str
    ids: tuple[int, ...] = ()
    logprobs: list[TokenLogprob] = field(default_factory=list)


class Handle:
    """A request under way.

    finish: "" while it runs; then stop | length (max_new_tokens) | context (no position or no cache is left) |
    cancelled | error. ids: every token drawn, a stop id excluded, those of a stop text included. text: what was
    given out. Both are complete when `finish` is set.

    Iterating yields Pieces until the end and raises `error` there. Where the engine has no thread of its own
    (`Engine.start`), iterating runs it. Breaking off cancels the request.
    """

    def __init__(self, engine: Engine, request: Request, on_piece: Callable[[Piece | None], None] | None = None):
        self.request = request
        self.prompt_tokens = len(request.prompt_ids)
        self.reused_tokens = 0  # of the prompt: found in the cache
        self.ids: list[int] = []
        self.text = ""
        self.finish = ""
        self.error: UserError | None = None
        self.cancelled = False
        self.on_piece = on_piece
        self._engine = engine
        self._pieces: queue.SimpleQueue[Piece | None] = queue.SimpleQueue()

    def cancel(self) -> None:
        """From any thread, at any time; its slot and pages are free at the engine's next step."""
        if not self.finish:
            self.cancelled = True
            self._engine.wake()

    def give(self, piece: Piece | None) -> None:
        """The engine's side: hands a piece over, None at the end."""
        (self.on_piece or self._pieces.put)(piece)

    def __iter__(self) -> Iterator[Piece]:
        if self.on_piece is not None:
            raise ValueError("the pieces of this request go to on_piece")
        try:
            while (piece := self._next()) is not None:
                yield piece
        finally:
            self.cancel()
        if self.error is not None:
            raise self.error

    def _next(self) -> Piece | None:
        while self._pieces.empty() and not self._engine.started:
            self._engine.step()
        return self._pieces.get()


@dataclass
class EngineStats:
    """Counts since the start, and how things stand; read from any thread."""

    slots: int = 0
    running: int = 0
    waiting: int = 0
    cache_tokens: int = 0  # room for
    cache_tokens_used: int = 0  # held by requests that run
    cache_tokens_kept: int = 0  # of finished requests, for a prompt that begins the same; given up when room is needed
    requests: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0  # of the prompts': found in the cache
    generated_tokens: int = 0
    cancelled: int = 0
    preempted: int = 0
