"""A stand-in for the engine: says a script at a pace, in slots, with cancellation. For what needs a known answer
(the page) or a slow one (queues, clients that leave); everything else is tested on the engine itself."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from talker import write_tokenizer

from minitune.checkpoint.stream import TextStream
from minitune.checkpoint.tokenizer import load_tokenizer
from minitune.config import TemplateConfig, UserError
from minitune.data.template import Template
from minitune.infer.engine import EngineStats
from minitune.infer.request import Handle, Piece, Request, TokenLogprob
from minitune.infer.session import Session

EOS = 2


class ScriptedEngine:
    """`script(request)` is what is said; `pace` seconds a token."""

    def __init__(self, tokenizer: Any, script: Callable[[Request], str], pace: float = 0.0, slots: int = 4):
        self.tokenizer, self.script, self.pace, self.slots = tokenizer, script, pace, slots
        self.decoder = SimpleNamespace(config=SimpleNamespace(vocab_size=len(tokenizer)))
        self.limit = 2048
        self.stats = EngineStats(slots=slots)
        self.started = True
        self.handles: list[Handle] = []
        self.seen: list[Request] = []
        self._threads: list[threading.Thread] = []
        self._free = threading.Semaphore(slots)
        self._lock = threading.Lock()

    def start(self) -> None:
        pass

    def wake(self) -> None:
        pass

    def close(self) -> None:
        for handle in self.handles:
            handle.cancel()
        for thread in self._threads:
            thread.join(5)

    def submit(self, request: Request, on_piece: Any = None) -> Handle:
        handle = Handle(self, request, on_piece)  # type: ignore[arg-type]
        self.handles.append(handle)
        self.seen.append(request)
        with self._lock:
            self.stats.waiting += 1
            self.stats.requests += 1
        thread = threading.Thread(target=self._answer, args=(handle,), daemon=True)
        self._threads.append(thread)
        thread.start()
        return handle

    def _answer(self, handle: Handle) -> None:
        while not self._free.acquire(timeout=0.005):
            if handle.cancelled:
                break
        else:
            with self._lock:
                self.stats.waiting -= 1
                self.stats.running += 1
            try:
                self._say(handle)
            except UserError as error:
                handle.finish, handle.error = "error", error
            with self._lock:
                self.stats.running -= 1
            self._free.release()
        if not handle.finish:
            handle.finish = "cancelled"
            with self._lock:
                self.stats.cancelled += 1
                self.stats.waiting -= not handle.ids and self.stats.waiting > 0
        handle.give(None)

    def _say(self, handle: Handle) -> None:
        request, stream = handle.request, TextStream(self.tokenizer)
        wanted = self.tokenizer(self.script(request), add_special_tokens=False)["input_ids"]
        rng = random.Random(request.sampling.seed)
        for _ in range(request.sampling.max_new_tokens):
            if handle.cancelled:
                return
            time.sleep(self.pace)
            scripted = wanted.pop(0) if wanted else EOS
            token = self._draw(request, rng) if request.grammar is not None else scripted
            if token in request.stop_ids:
                handle.finish = "stop"
                return
            handle.ids.append(token)
            self.stats.generated_tokens += 1
            text = stream.push(token)
            handle.text += text
            told = [TokenLogprob(token, -0.5, [(token, -0.5)][: request.logprobs])]
            handle.give(Piece(text, (token,), told if request.logprobs is not None else []))
            if request.grammar is not None and request.grammar.accept(token):
                handle.finish = "stop"
                return
        handle.finish = "length"

    def _draw(self, request: Request, rng: random.Random) -> int:
        bits = torch.zeros(-(-len(self.tokenizer) // 32), dtype=torch.int32)
        request.grammar.mask(bits)  # type: ignore[union-attr]
        allowed = [v for v in range(len(self.tokenizer)) if bits[v // 32].item() >> (v % 32) & 1]
        return rng.choice(allowed)


def scripted_session(
    folder: Path, script: Callable[[Request], str], adapters: tuple[str, ...] = (), pace: float = 0.0, slots: int = 4
) -> Session:
    """A session over the stand-in, with the tiny tokenizer and MiniCPM's template."""
    tokenizer = load_tokenizer(write_tokenizer(folder))
    template = Template(tokenizer, TemplateConfig("minicpm"))
    engine: Any = ScriptedEngine(tokenizer, script, pace, slots)
    return Session(engine, {name: template for name in ("", *adapters)}, tokenizer)
