"""Asking an engine, for tests: requests in one line, and what is in the cache when all is over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minitune.infer.engine import Engine, answer_all
from minitune.infer.request import Handle, Request
from minitune.infer.sampling import Sampling
from minitune.model.decoder import Decoder


def ask(ids: list[int], tokens: int = 16, **more: Any) -> Request:
    """A greedy request; settings of `Sampling` and fields of `Request` by name."""
    own = {name: more.pop(name) for name in list(more) if name in Request.__dataclass_fields__}
    return Request(tuple(ids), Sampling(**{"temperature": 0, "max_new_tokens": tokens, **more}), **own)


def answer(engine: Engine, *requests: Request) -> list[list[int]]:
    """The tokens of each, asked together."""
    handles = answer_all(engine, requests)
    assert [h.error for h in handles] == [None] * len(handles)
    return [h.ids for h in handles]


def alone(engine: Engine, request: Request) -> Handle:
    return answer_all(engine, [request])[0]


def all_free(engine: Engine) -> bool:
    """Nothing runs, and every page and slot can be had."""
    pool, stats = engine._pool, engine.stats
    free = pool.available == pool.count and len(engine._schedule._slots) == stats.slots
    return free and not (stats.running or stats.waiting or stats.cache_tokens_used)


def greedy(decoder: Decoder, ids: list[int], tokens: int) -> list[int]:
    """By computing every token anew, without any cache."""
    ids = list(ids)
    start = len(ids)
    for _ in range(tokens):
        ids.append(int(scores(decoder, ids)[-1].argmax()))
    return ids[start:]


@torch.no_grad()
def scores(decoder: Decoder, ids: list[int]) -> Tensor:
    """[T, V], without any cache."""
    return decoder.logits(torch.tensor([ids]))[0]
