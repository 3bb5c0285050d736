"""OpenAI's routes: /v1/chat/completions, /v1/completions, /v1/models."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from minitune.checkpoint.stream import token_bytes
from minitune.infer.http.answers import Answers, in_worker, unless_gone
from minitune.infer.http.errors import unknown_model
from minitune.infer.http.prompts import requests_of
from minitune.infer.http.reply import EventStream, Form, whole
from minitune.infer.http.schema import ChatAsked, CompletionAsked
from minitune.infer.http.service import Service

router = APIRouter()
STARTED = int(time.time())


@router.post("/v1/chat/completions")
async def chat_completions(request: Request, asked: ChatAsked) -> Response:
    return await answer(request, asked, count=asked.n or 1)


@router.post("/v1/completions")
async def completions(request: Request, asked: CompletionAsked) -> Response:
    return await answer(request, asked, count=(asked.n or 1) * len(asked.prompts))


async def answer(request: Request, asked: ChatAsked | CompletionAsked, count: int) -> Response:
    """Both routes: into the engine, and out whole or as a stream."""
    service: Service = request.app.state.service
    session = service.ready()
    service.adapter_of(asked.model)
    spell = token_bytes(session.tokenizer) if asked.logprobs_wanted is not None else None
    form = Form(isinstance(asked, ChatAsked), asked.model, spell, bool(asked.stop), asked.usage_wanted)
    answers = Answers(service, asked.model, count)

    async def submit() -> None:
        await in_worker(service, lambda: answers.submit(requests_of(service, asked)))

    if asked.stream:
        try:
            await unless_gone(request.receive, submit())
        except BaseException:
            await answers.__aexit__()
            raise
        return EventStream(answers, form)

    async def finish() -> dict[str, Any]:
        await submit()
        return await whole(answers, form)

    async with answers:
        return JSONResponse(await unless_gone(request.receive, finish()))


def model_card(service: Service, name: str) -> dict[str, Any]:
    """parent: an adapter's base, None for the base itself (vLLM's field)."""
    return {
        "id": name,
        "object": "model",
        "created": STARTED,
        "owned_by": "minitune",
        "root": service.base,
        "parent": None if name == service.base else service.base,
        "max_model_len": service.limit,
    }


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    service: Service = request.app.state.service
    service.ready()
    return {"object": "list", "data": [model_card(service, name) for name in service.names]}


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> dict[str, Any]:
    service: Service = request.app.state.service
    service.ready()
    if name not in service.names:
        raise unknown_model(name, service.names)
    return model_card(service, name)
