"""Answers to held-out questions by the engine, all of a model's at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minitune.data.records import Message
from minitune.data.template import Template
from minitune.evaluate import habits
from minitune.evaluate.held_out import HeldOut
from minitune.evaluate.settings import EvaluateConfig
from minitune.infer.engine import Engine
from minitune.infer.request import Request
from minitune.infer.sampling import Sampling

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Question:
    """A held-out row as a question: everything before its last answer, and that answer."""

    place: tuple[str, int]
    messages: tuple[Message, ...]
    wanted: str

    @property
    def text(self) -> str:
        return self.messages[-1].content


@dataclass(frozen=True)
class Answer:
    """What a model said. finish: stop, length or context (`infer.request.Handle`); ids: its tokens, EOS excluded."""

    text: str
    finish: str
    ids: tuple[int, ...]


def questions(held: HeldOut, most: int, seed: int) -> list[Question]:
    """At most `most` of the rows, a seeded choice in the files' order."""
    order = torch.randperm(len(held.places), generator=torch.Generator().manual_seed(seed)).tolist()
    out = []
    for i in sorted(order[:most]):
        *before, last = held.conversations[i].messages
        out.append(Question(held.places[i], tuple(before), last.content.strip()))
    return out


def sampling_of(config: EvaluateConfig) -> Sampling:
    return Sampling(
        temperature=config.temperature,
        top_p=config.top_p,
        repetition_penalty=config.repetition_penalty,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
    )


def ask(
    engine: Engine,
    template: Template,
    asked: Sequence[Question],
    sampling: Sampling,
    adapter: str = "",
    progress: Progress = lambda done: None,
) -> list[Answer | None]:
    """The answers in order; None where the question is longer than the model reads."""
    limit = engine.decoder.config.max_position_embeddings
    prompts = [tuple(template.prompt_ids(question.messages)) for question in asked]
    requests = [
        Request(prompt, sampling, frozenset(template.stop_ids), adapter=adapter) if len(prompt) < limit else None
        for prompt in prompts
    ]
    handles = [engine.submit(request) if request else None for request in requests]
    waiting, more = [h for h in handles if h], True
    while more:
        more = engine.step()
        still = [h for h in waiting if not h.finish]
        progress(len(waiting) - len(still))
        waiting = still
    for handle in handles:
        if handle and handle.error:
            raise handle.error
    return [Answer(h.text, h.finish, tuple(h.ids)) if h else None for h in handles]


def summary(
    given: Sequence[Answer], asked: Sequence[Question], recited: Sequence[habits.Recital] | None
) -> dict[str, Any]:
    """What can be counted of one side's answers; shares from 0 to 1."""
    count = len(given)

    def share(flags: Any) -> float:
        return sum(map(bool, flags)) / count

    out: dict[str, Any] = {
        "answers": count,
        "tokens": sum(len(a.ids) for a in given) / count,
        "stops": share(a.finish == "stop" for a in given),
        "empty": share(not a.text.strip() for a in given),
        "echoes": share(habits.squeezed(a.text) == habits.squeezed(q.text) for a, q in zip(given, asked, strict=True)),
        "repetition": sum(habits.repetition(a.ids) for a in given) / count,
        "loops": share(habits.loops(a.ids) for a in given),
    }
    if recited is not None:
        out["recited"] = share(r.recited for r in recited)
        out["recited_whole"] = share(r.equal for r in recited)
    return out
