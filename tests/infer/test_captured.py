"""Decoding one step ahead of the host: the same answers as decoding plainly, whatever ends, waits or breaks on the way.

There is no graph off a card: the recorded work is called. Most tests put a plain twin in the place of
`model.decode`'s kernels (tests/model/test_decode.py compares those); the last runs them, in Triton's interpreter.
"""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import all_free, answer, ask
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from minitune.checkpoint.weights import load_model
from minitune.infer import capacity, captured, slots
from minitune.infer import engine as engine_module
from minitune.infer.engine import Engine
from minitune.infer.request import Request
from minitune.infer.sampling import Bias
from minitune.model import cache, decode, kernels
from minitune.model.cache import DecodeLayout, PagedCache
from minitune.model.decode import Columns
from minitune.model.decoder import Decoder
from minitune.model.lora import Choice

Golden = Callable[[str], Path]


class PlainStep:
    """`DecodeStep` by the decoder's own layers."""

    def __init__(self, decoder: Decoder, held: PagedCache, columns: Columns, rows: int, limit: int):
        self.decoder, self.cache, self.columns, self.rows = decoder, held, columns, rows
        self.idle = columns.token_S.shape[0] - 1
        self.slot_B = torch.full((rows,), self.idle)
        self.told = torch.zeros(rows, 3, dtype=torch.float64)
        self.scores = torch.zeros(rows, decoder.config.vocab_size)

    def run(self, long: bool, choice: Choice | None = None) -> None:
        c, slot = self.columns, self.slot_B
        position = c.position_S[slot]
        assert not (long and int(position.max()) < decode.LONG) and int(position.max()) < 128
        pages = int(position.max()) // cache.PAGE + 1
        length = torch.maximum(c.prompt_S[slot], position + 1)
        layout = DecodeLayout(self.cache, c.table_SP[slot], position, length, [(None, pages)])
        if choice is not None:
            choice.index_T = c.adapter_S[slot]
        self.scores = self.decoder.head(self.decoder.hidden(c.token_S[slot], position, layout))
        if choice is not None:
            choice.index_T = None
        c.position_S[slot] = torch.where(slot == self.idle, 0, position + 1)

    def take_best(self) -> None:
        best, token = self.scores.float().max(-1)
        self.columns.token_S[self.slot_B] = token
        self.told.copy_(torch.stack((token, torch.ones_like(token), best.isfinite()), dim=1))


@pytest.fixture
def plain(tiny: Decoder, tokenizer: PreTrainedTokenizerBase) -> Engine:
    return Engine(tiny, tokenizer, slots=4)


@pytest.fixture
def twin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines made from here on decode ahead, by the plain twin."""
    monkeypatch.setattr(slots, "CAPTURED", ("cuda", "cpu"))
    monkeypatch.setattr(slots, "why_not", lambda decoder: "")
    monkeypatch.setattr(captured, "DecodeStep", PlainStep)
    monkeypatch.setattr(slots, "Prefill", lambda *given: None)
    monkeypatch.setattr(decode, "LONG", 60)


def ready(engine: Engine) -> Engine:
    """All usual graphs recorded, as an engine's thread does it while nobody asks."""
    while engine._prepare():
        pass
    return engine


def count(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many steps were begun ahead, and how many ran plainly."""
    seen = {"ahead": 0, "plain": 0}
    graphs, hidden = engine._slots.captured, engine._slots._hidden
    follow = graphs._follow

    def followed(*given: Any) -> Any:
        out = follow(*given)
        seen["ahead"] += out is not None
        return out

    def ran(ids: Tensor, position: Tensor, layout: Any) -> Tensor:
        seen["plain"] += isinstance(layout, DecodeLayout)
        return hidden(ids, position, layout)

    monkeypatch.setattr(graphs, "_follow", followed)
    monkeypatch.setattr(engine._slots, "_hidden", ran)
    return seen


def mixed(seed: int, number: int, **fixed: Any) -> list[Request]:
    chance = random.Random(seed)
    requests = []
    for _ in range(number):
        kind = {
            "temperature": chance.choice((0, 0.7, 1.5)),
            "top_p": chance.choice((1, 0.5, 0.95)),
            "top_k": chance.choice((0, 5, 400)),  # 400: more than are looked at first, so some rows are not settled
            "min_p": chance.choice((0, 0, 0.05)),
            "repetition_penalty": chance.choice((1, 1, 1.3)),
            "seed": chance.randrange(2**63),
            "logprobs": chance.choice((None, None, None, 2)),
            "bias": chance.choice((None, None, None, Bias(0.5, 0.5, ((7, 1.0),)))),
        }
        ids = [chance.randrange(3, 512) for _ in range(chance.randrange(1, 70))]
        requests.append(ask(ids, chance.randrange(1, 16), **(kind | fixed)))
    return requests


@pytest.mark.parametrize("seed", range(2))
def test_answers_are_the_plain_ones(
    tiny: Decoder, tokenizer: PreTrainedTokenizerBase, plain: Engine, twin: None, seed: int
) -> None:
    """All kinds of requests through four slots: contexts on both sides of LONG, rows that are not settled, penalties,
    log-probabilities, answers that end; graphs are recorded as they are asked for, or beforehand."""
    requests = mixed(seed, 12)
    expected = answer(plain, *requests)
    for engine in (Engine(tiny, tokenizer, slots=4), ready(Engine(tiny, tokenizer, slots=4))):
        assert answer(engine, *requests) == expected
        assert all_free(engine) and engine._slots.captured is not None


def test_steps_are_begun_ahead(
    tiny: Decoder, tokenizer: PreTrainedTokenizerBase, plain: Engine, twin: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy and plainly sampled answers run ahead throughout; one with log-probabilities never does."""
    engine = ready(Engine(tiny, tokenizer, slots=4))
    seen = count(engine, monkeypatch)
    requests = [ask([5, 9, 77], 20), ask([8], 20, temperature=0.3, top_p=0.8, seed=1)]
    assert answer(engine, requests[0]) == answer(plain, requests[0])
    assert seen == {"ahead": 18, "plain": 0}  # the first token is the prompt's
    assert answer(engine, *requests) == answer(plain, *requests)
    before = seen["ahead"]
    answer(engine, replace(requests[0], logprobs=1))
    assert seen == {"ahead": before, "plain": 0}  # the graph of scores serves it all the same


def test_an_end_token_drops_the_step_that_was_begun(
    tiny: Decoder, tokenizer: PreTrainedTokenizerBase, plain: Engine, twin: None
) -> None:
    """It ends where it should, its slot is another's at once, and what the others say does not change."""
    engine = ready(Engine(tiny, tokenizer, slots=2))
    long = ask([5, 9, 77], 40)
    whole = answer(plain, long)[0]
    stops = [replace(ask([5, 9, 77], 40), stop_ids=frozenset({whole[at]})) for at in (3, 7, 11)]
    expected = answer(plain, long, *stops)
    assert answer(engine, long, *stops) == expected
    assert [len(e) for e in expected][1:] == [whole.index(whole[at]) for at in (3, 7, 11)]
    assert all_free(engine)


def test_cancelling_with_a_step_under_way(
    tiny: Decoder, tokenizer: PreTrainedTokenizerBase, plain: Engine, twin: None
) -> None:
    engine = ready(Engine(tiny, tokenizer, slots=2))
    first, second = engine.submit(ask([5, 9], 60)), engine.submit(ask([7, 7], 30))
    for _ in range(4):
        engine.step()
    assert engine._slots.captured.under_way is not None
    first.cancel()
    third = engine.submit(ask([44, 3, 2], 20, temperature=1.0, top_p=1.0, seed=4))
    engine.run_until_idle()
    assert first.finish == "cancelled" and len(first.ids) < 8
    assert [second.ids, third.ids] == answer(plain, second.request, third.request)
    assert all_free(engine)


def test_giving_way(
    tiny: Decoder, tokenizer: PreTrainedTokenizerBase, twin: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages for two: nobody is turned out with a step under way, and the texts are the same."""
    for module in (cache, capacity, engine_module, slots):
        monkeypatch.setattr(module, "PAGE", 8)
    requests = [ask(list(r.prompt_ids[:20]), 16, temperature=1, seed=n) for n, r in enumerate(mixed(2, 4))]
    expected = answer(Engine(tiny, tokenizer, slots=1), *requests)
    small = ready(Engine(tiny, tokenizer, slots=4, cache_tokens=7 * 8))
    assert answer(small, *requests) == expected
    assert small.stats.preempted > 0 and all_free(small)


def test_adapters(golden: Golden, tokenizer: PreTrainedTokenizerBase, twin: None, monkeypatch: Any) -> None:
    """With and without one in a batch."""
    requests = [replace(r, adapter="a" if n % 3 else "") for n, r in enumerate(mixed(5, 6, logprobs=None))]
    given = {"a": golden("tiny-2b-lora")}
    bases = [load_model(golden("tiny-2b"), device="cpu", dtype="float32") for _ in range(2)]
    engine = ready(Engine(bases[0], tokenizer, adapters=given, slots=4))
    found = answer(engine, *requests)
    monkeypatch.setattr(slots, "CAPTURED", ())
    assert found == answer(Engine(bases[1], tokenizer, adapters=given, slots=4), *requests)


def test_recording_that_fails_is_said_and_changes_no_answer(
    tiny: Decoder, tokenizer: PreTrainedTokenizerBase, plain: Engine, twin: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third graph can't be recorded, while a step is under way."""
    engine = Engine(tiny, tokenizer, slots=4)
    record, made = captured.Captured._record, []

    def fails(self: Any, work: Any, step: Any) -> Any:
        made.append(work)
        if len(made) == 3:
            raise RuntimeError("no memory")
        return record(self, work, step)

    monkeypatch.setattr(captured.Captured, "_record", fails)
    requests = [ask([5, 9, 77], 70), ask([6], 4)]
    with pytest.warns(UserWarning, match="decoding stays plain, which is slow: RuntimeError: no memory"):
        assert answer(engine, *requests) == answer(plain, *requests)
    assert engine.plainly == "RuntimeError: no memory" and all_free(engine)


def test_what_moved_since_is_noticed(tiny: Decoder, tokenizer: PreTrainedTokenizerBase, twin: None) -> None:
    engine = ready(Engine(tiny, tokenizer, slots=2))
    answer(engine, ask([5, 9, 77], 5))
    engine._slots.cache.keys = engine._slots.cache.keys.clone()
    with pytest.raises(RuntimeError, match="the captured step no longer holds: keys was"):
        answer(engine, ask([5, 9], 5), ask([7], 5))


def test_memory_is_free_as_soon_as_the_engine_is_gone(
    tiny: Decoder, tokenizer: PreTrainedTokenizerBase, twin: None
) -> None:
    """Another engine's cache is chosen from what is free: nothing may wait for the garbage collector."""
    engine = ready(Engine(tiny, tokenizer, slots=2))
    answer(engine, ask([5, 9, 77], 5), ask([4], 9, temperature=1.0))
    held = weakref.ref(engine._slots.cache)
    gc.collect()
    gc.disable()
    try:
        del engine
        assert held() is None
    finally:
        gc.enable()


def test_it_is_said_why_decoding_is_plain(plain: Engine) -> None:
    assert plain.plainly == "there is no card" and plain._slots.captured is None
    assert not plain._prepare()


@pytest.mark.skipif(not kernels.AVAILABLE, reason="Triton is not installed")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_by_the_kernels(
    golden: Golden, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """Alone and two at once, greedy and drawn, by the kernels themselves (on a card, by graphs)."""
    plain = Engine(load_model(golden("tiny-2b"), device="cpu", dtype="float32"), tokenizer, slots=2)
    monkeypatch.setattr(slots, "CAPTURED", ("cuda", "cpu"))
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a card")
    if device == "cpu":
        monkeypatch.setattr(
            decode, "TILES", {name: tile._replace(rows=64, warps=1) for name, tile in decode.TILES.items()}
        )
        monkeypatch.setattr(decode, "ATTEND", {1: decode.Split(16, 1, 4)})
        monkeypatch.setattr(engine_module, "pack", lambda decoder: None)  # its weights are for oneDNN alone
    engine = Engine(load_model(golden("tiny-2b"), device=device, dtype="float32"), tokenizer, slots=2)
    assert engine.plainly == ""
    requests = [ask([5, 9, 77], 4), ask([8, 100], 3, temperature=0.9, top_p=0.9, seed=3)]
    assert answer(engine, *requests) == answer(plain, *requests)
    assert answer(engine, requests[0]) == answer(plain, requests[0])
    assert {key.rows for key in engine._slots.captured.graphs} == {1, 2}
