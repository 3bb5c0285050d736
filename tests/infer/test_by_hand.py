"""Prompts by the kernels of `model.prefill`, through the engine, in Triton's interpreter where there is no card: the
answers and log-probabilities of an engine that reads them by the decoder's layers (tests/model/test_prefill.py compares
the scores themselves)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from asking import all_free, ask
from transformers import PreTrainedTokenizerBase

from minitune.checkpoint.weights import load_model
from minitune.infer import capacity, slots
from minitune.infer import engine as engine_module
from minitune.infer.captured import Captured
from minitune.infer.engine import Engine, answer_all
from minitune.infer.request import Request
from minitune.model import cache, kernels, lora, prefill

pytestmark = pytest.mark.skipif(not kernels.AVAILABLE, reason="Triton is not installed")

Golden = Callable[[str], Path]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL, CHUNK = 16, 24  # tokens a page, and a chunk: prompts are read in pieces, and share pages


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (cache, capacity, engine_module, slots):
        monkeypatch.setattr(module, "PAGE", SMALL)
    monkeypatch.setattr(prefill, "ROWS", 16)
    monkeypatch.setattr(engine_module, "CHUNK", {"cpu": CHUNK, "cuda": CHUNK})
    monkeypatch.setattr(engine_module, "pack", lambda decoder: None)  # its weights are for oneDNN alone
    monkeypatch.setattr(lora, "packable", lambda device, dtype: False)
    monkeypatch.setattr(slots, "Captured", lambda *given: None)  # decoding is another test's


def turns(engine: Engine, rounds: list[list[Request]]) -> list[tuple[list[int], list[float]]]:
    """Tokens and log-probabilities, a round asked together."""
    out = []
    for requests in rounds:
        pieces: list[list[float]] = [[] for _ in requests]
        handles = []
        for request, found in zip(requests, pieces, strict=True):
            handles.append(
                engine.submit(request, lambda p, f=found: f.extend(one.logprob for one in p.logprobs) if p else None)
            )
        engine.run_until_idle()
        assert [h.error for h in handles] == [None] * len(handles)
        assert [len(found) for found in pieces] == [len(h.ids) for h in handles]
        out += [(h.ids, found) for h, found in zip(handles, pieces, strict=True)]
    assert all_free(engine)
    return out


def test_answers_are_the_plain_ones(
    golden: Golden, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks, several prompts in a pack, a beginning from the cache (whole pages, and one that is copied), a repetition
    penalty, with and without an adapter."""
    text = [(7 * at * at + 3 * at + 11) % 509 + 3 for at in range(90)]
    first = [ask(text[:41], 2, logprobs=0), ask(text[50:53], 3, logprobs=0, adapter="a")]
    second = [
        ask([*text[:40], 9, 4], 2, logprobs=0, repetition_penalty=1.3),
        ask([*text[50:53], 8], 2, logprobs=0, adapter="a"),
        ask(text[20:37], 2, logprobs=0),
    ]
    given = {"a": golden("tiny-2b-lora")}
    plain = Engine(
        load_model(golden("tiny-2b"), device="cpu", dtype="float32"),
        tokenizer,
        adapters=given,
        slots=3,
        cache_tokens=400,
    )
    assert plain._slots.by_hand is None
    expected = turns(plain, [first, second])
    monkeypatch.setattr(slots, "CAPTURED", ("cuda", "cpu"))
    engine = Engine(
        load_model(golden("tiny-2b"), device=DEVICE, dtype="float32"),
        tokenizer,
        adapters=given,
        slots=3,
        cache_tokens=400,
    )
    while engine._prepare():
        pass
    monkeypatch.setattr(engine._slots, "_plain_prefill", None)  # nothing may fall back to it
    got = turns(engine, [first, second])
    assert engine.stats.reused_tokens == plain.stats.reused_tokens > 32
    assert [ids for ids, _ in got] == [ids for ids, _ in expected]
    for (_, ours), (_, theirs) in zip(got, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_the_first_prompt_does_not_wait_for_a_compiler(
    golden: Golden, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read plainly; what it missed is prepared after it, and reads the next one."""
    monkeypatch.setattr(slots, "CAPTURED", ("cuda", "cpu"))
    engine = Engine(load_model(golden("tiny-2b"), device=DEVICE, dtype="float32"), tokenizer, slots=1, cache_tokens=400)
    by_hand, plainly = engine._slots.by_hand, []
    assert by_hand is not None
    read = engine._slots._plain_prefill
    monkeypatch.setattr(engine._slots, "_plain_prefill", lambda *given: plainly.append(1) or read(*given))
    request = ask([5, 9, 77], 2)
    (one,) = answer_all(engine, [request])
    assert by_hand.ready and len(plainly) == 1
    (two,) = answer_all(engine, [replace(request, prompt_ids=(5, 9, 77))])
    assert one.ids == two.ids and len(plainly) == 1


def test_what_can_not_be_compiled_stays_plain(
    golden: Golden, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(slots, "CAPTURED", ("cuda", "cpu"))
    monkeypatch.setattr(prefill.Prefill, "prepare", fails)
    engine = Engine(load_model(golden("tiny-2b"), device=DEVICE, dtype="float32"), tokenizer, slots=1, cache_tokens=400)
    with pytest.warns(UserWarning, match="prompts are read plainly, which is slow: RuntimeError: no compiler"):
        assert not engine._prepare()
    (one,) = answer_all(engine, [ask([5, 9, 77], 2)])
    assert len(one.ids) == 2 and engine._slots.by_hand is None


def test_a_size_that_can_not_be_recorded(
    golden: Golden, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts are launched kernel by kernel then, and said so once; decoding is not touched."""

    def fails(self: object, size: int, adapters: bool) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(slots, "CAPTURED", ("cuda", "cpu"))
    monkeypatch.setattr(prefill.Prefill, "_record", fails)
    engine = Engine(load_model(golden("tiny-2b"), device=DEVICE, dtype="float32"), tokenizer, slots=1, cache_tokens=400)
    assert engine._prepare()  # compiled
    with pytest.warns(UserWarning, match="prompts are launched kernel by kernel: RuntimeError: no memory") as said:
        while engine._prepare():
            pass
        (one,) = answer_all(engine, [ask([5, 9, 77], 2)])
    assert len(one.ids) == 2 and len(said) == 1
    by_hand = engine._slots.by_hand
    assert by_hand is not None and by_hand.ready and not by_hand.left and not engine.plainly


def test_a_weight_that_was_put_elsewhere(
    golden: Golden, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recorded prompt would read where it was."""
    monkeypatch.setattr(slots, "CAPTURED", ("cuda", "cpu"))
    monkeypatch.setattr(slots, "Captured", Captured)
    given = {"a": golden("tiny-2b-lora")}
    decoder = load_model(golden("tiny-2b"), device=DEVICE, dtype="float32")
    engine = Engine(decoder, tokenizer, adapters=given, slots=1, cache_tokens=400)
    while engine._slots.contract is None:
        assert engine._prepare()
    stacked = next(linear.lora for linear in decoder.linears() if linear.lora is not None)
    stacked.A = stacked.A.clone()
    engine.submit(ask([5, 9, 77], 1))
    with pytest.raises(RuntimeError, match=r"no longer holds: .*\.A was"):
        engine.run_until_idle()
