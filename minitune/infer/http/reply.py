"""Answers in OpenAI's objects: whole, and as a stream of server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from minitune.infer.http.answers import Answer, Answers, unless_gone
from minitune.infer.http.errors import ApiError, ClientGone, engine_failed
from minitune.infer.http.logprobs import Aligned, chat_form, completion_form
from minitune.infer.request import Piece

REASONS = {"stop": "stop", "length": "length", "context": "length"}
HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-store",
    "x-accel-buffering": "no",  # nginx passes each event on at once
}


@dataclass
class Form:
    """How one request's answers are written. chat: which of the two routes; spell: a token's bytes."""

    chat: bool
    model: str
    spell: Callable[[int], bytes] | None  # None: no log-probabilities
    stops: bool
    usage: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    aligned: dict[int, Aligned] = field(default_factory=dict)
    offsets: dict[int, int] = field(default_factory=dict)

    def head(self, chunk: bool) -> dict[str, Any]:
        kind = "chat.completion" if self.chat else "text_completion"
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}",
            "object": f"{kind}.chunk" if chunk and self.chat else kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
        }

    def logprobs(self, answer: Answer, pieces: list[Piece], text: str, done: bool) -> dict[str, Any] | None:
        """Those of the tokens behind `text`, in the route's form; None where none were asked for."""
        if self.spell is None:
            return None
        aligned = self.aligned.setdefault(answer.index, Aligned(self.spell, self.stops))
        entries = aligned.take(pieces, done, done and finish_of(answer) == "stop")
        if self.chat:
            return chat_form(entries, self.spell)
        offset = self.offsets.get(answer.index, 0)
        self.offsets[answer.index] = offset + len(text)
        return completion_form(entries, self.spell, offset)


def finish_of(answer: Answer) -> str:
    """OpenAI's finish_reason. Raises ApiError for an answer that broke off inside."""
    handle = answer.handle
    assert handle is not None
    if handle.finish not in REASONS:
        raise engine_failed(handle.error, handle.finish)
    return REASONS[handle.finish]


def usage_of(answers: Answers) -> dict[str, Any]:
    """Each prompt counts once, however many answers it has."""
    handles = [answer.handle for answer in answers.all if answer.handle is not None]
    prompts = {h.request.prompt_ids: h for h in handles}
    prompt = sum(h.prompt_tokens for h in prompts.values())
    said = sum(len(h.ids) for h in handles)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": said,
        "total_tokens": prompt + said,
        "prompt_tokens_details": {"cached_tokens": sum(h.reused_tokens for h in prompts.values())},
    }


async def whole(answers: Answers, form: Form) -> dict[str, Any]:
    """The answers when all are finished."""
    pieces: dict[int, list[Piece]] = {}
    async for batch in answers.batches():
        if batch is not None:
            pieces.setdefault(batch[0].index, []).extend(batch[1])
    choices = []
    for answer in answers.all:
        reason = finish_of(answer)
        text = "".join(piece.text for piece in pieces[answer.index])
        choice: dict[str, Any] = {"index": answer.index, "finish_reason": reason}
        choice["logprobs"] = form.logprobs(answer, pieces[answer.index], text, True)
        if form.chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        choices.append(choice)
    return {**form.head(chunk=False), "choices": choices, "usage": usage_of(answers)}


async def events(answers: Answers, form: Form) -> AsyncIterator[bytes]:
    """The stream: chunks, the usage where asked for, [DONE]; a fault inside is an event with `error`, and the end."""
    head = form.head(chunk=True) | ({"usage": None} if form.usage else {})
    if form.chat:
        for answer in answers.all:
            yield event(head | {"choices": [chunk(form, answer, {"role": "assistant", "content": ""})]})
    try:
        async for batch in answers.batches():
            if batch is None:
                yield b": waiting\n\n"
                continue
            answer, pieces, done = batch
            text = "".join(piece.text for piece in pieces)
            told = form.logprobs(answer, pieces, text, done)
            if text or (told and any(told.values())):
                delta = {"content": text} if form.chat else text
                yield event(head | {"choices": [chunk(form, answer, delta, told)]})
            if done:
                last = chunk(form, answer, {} if form.chat else "", reason=finish_of(answer))
                yield event(head | {"choices": [last]})
    except ApiError as error:
        yield event(error.body())
        return
    if form.usage:
        yield event(head | {"choices": [], "usage": usage_of(answers)})
    yield b"data: [DONE]\n\n"


def chunk(form: Form, answer: Answer, delta: Any, logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
    return {
        "index": answer.index,
        "delta" if form.chat else "text": delta,
        "logprobs": logprobs,
        "finish_reason": reason,
    }


def event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """Sends the events as they come; the answers are broken off as soon as the client is gone, also while none come."""

    def __init__(self, answers: Answers, form: Form):
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._answers, self._form = answers, form

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def stream() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for data in events(self._answers, self._form):
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        async with self._answers:
            try:
                await unless_gone(receive, stream())
            except (ClientGone, OSError):  # OSError: a send to a closed connection, on some servers
                return
