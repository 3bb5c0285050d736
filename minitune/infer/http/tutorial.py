"""`POST /` in the form of the tutorial's FastAPI chapter: prompt and history in, response and history out."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Any

from fastapi import APIRouter, Request

from minitune.infer.chat import Message
from minitune.infer.http.answers import Answers, in_worker, unless_gone
from minitune.infer.http.errors import ApiError
from minitune.infer.http.prompts import chat_ids, check_length
from minitune.infer.http.reply import finish_of
from minitune.infer.http.schema import TutorialAsked
from minitune.infer.http.service import Service
from minitune.infer.request import Request as EngineRequest

router = APIRouter()


def turns_of(history: list[Any] | None) -> list[Message]:
    """The history as messages: a list of [question, answer] pairs, or of {"role", "content"}."""
    out: list[Message] = []
    for i, item in enumerate(history or []):
        if isinstance(item, dict) and isinstance(item.get("content"), str):
            if item.get("role") in ("system", "user", "assistant"):
                out.append(Message(item["role"], item["content"]))
                continue
        elif isinstance(item, list) and len(item) == 2 and all(isinstance(text, str) for text in item):
            out += [Message("user", item[0]), Message("assistant", item[1])]
            continue
        form = 'a pair [question, answer] or {"role", "content"}'
        raise ApiError(400, f"history[{i}] is not {form}", param="history")
    return out


def extended(history: list[Any] | None, prompt: str, response: str) -> list[Any]:
    """The history with this turn, in the form that it came in."""
    if history and isinstance(history[0], list):
        return [*history, [prompt, response]]
    return [*(history or []), {"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def request_of(service: Service, asked: TutorialAsked) -> EngineRequest:
    """max_length counts the prompt too, as in the model's own chat function. Runs on the worker thread."""
    adapter = service.adapter_of(model_of(service, asked))
    ids = chat_ids(service, adapter, [*turns_of(asked.history), Message("user", asked.prompt)])
    check_length(service, ids, "prompt")
    room = min(asked.max_length or service.limit, service.limit) - len(ids)
    if room < 1:
        message = f"the prompt has {len(ids)} tokens, max_length is {asked.max_length}; raise it"
        raise ApiError(400, message, param="max_length")
    given = {n: v for n in ("temperature", "top_p") if (v := getattr(asked, n)) is not None}
    sampling = replace(service.settings.sampling, **given, seed=None, max_new_tokens=room)
    return EngineRequest(tuple(ids), sampling, frozenset(service.template(adapter).stop_ids), adapter=adapter)


def model_of(service: Service, asked: TutorialAsked) -> str:
    """The form names no model: the adapter where there is just one, else the base."""
    return asked.model or (service.adapters[0] if len(service.adapters) == 1 else service.base)


@router.post("/")
async def create_item(request: Request, asked: TutorialAsked) -> dict[str, Any]:
    service: Service = request.app.state.service
    service.ready()

    async with Answers(service, model_of(service, asked), 1) as answers:

        async def finish() -> str:
            await in_worker(service, lambda: answers.submit([request_of(service, asked)]))
            await answers.whole()
            answer = answers.all[0]
            finish_of(answer)
            assert answer.handle is not None
            return answer.handle.text

        response = await unless_gone(request.receive, finish())
    return {
        "response": response,
        "history": extended(asked.history, asked.prompt, response),
        "status": 200,
        "time": datetime.now().strftime("%Y-%m-%d %H:%M:%S"),
    }
