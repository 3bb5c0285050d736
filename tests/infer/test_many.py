"""One engine, many askers: adapters side by side, stop texts, grammars, threads that come and go."""

from __future__ import annotations

import gc
import random
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import all_free, alone, answer, ask, scores
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from minitune.checkpoint.adapter import save_adapter
from minitune.checkpoint.weights import load_model
from minitune.config import UserError
from minitune.infer.engine import Engine, answer_all
from minitune.infer.request import Piece
from minitune.infer.session import open_model
from minitune.model.lora import LoraConfig, attach

Golden = Callable[[str], Path]
PROMPT = [1, 7, 9, 300, 41, 12, 400, 8]


@pytest.fixture
def engine(talker: Path, tokenizer: PreTrainedTokenizerBase) -> Engine:
    return Engine(load_model(talker, device="cpu", dtype="float32"), tokenizer, slots=8)


@pytest.fixture(scope="module")
def adapters(talker: Path, golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """PEFT's own, and two of other ranks, scales and targets; one leaves layers out."""
    folder = tmp_path_factory.mktemp("adapters")
    made = {"official": golden("tiny-2b-lora")}
    for name, config in {
        "wide": LoraConfig(5, 3, 0.0, "all-linear"),
        "narrow": LoraConfig(2, 64, 0.0, r".*layers\.[02]\.(self_attn\.v_proj|mlp\.up_proj)", use_rslora=True),
    }.items():
        decoder = load_model(talker, device="cpu", dtype="float32")
        attach(decoder, config, seed=3)
        for linear in decoder.linears():
            if linear.lora is not None:
                torch.nn.init.normal_(linear.lora.B, std=0.2, generator=torch.Generator().manual_seed(1))
        save_adapter(decoder, folder / name, "base")
        made[name] = folder / name
    return made


def test_each_request_gets_its_own_adapter(
    talker: Path, tokenizer: PreTrainedTokenizerBase, adapters: dict[str, Path]
) -> None:
    """All at once over one base: tokens and log-probabilities of each are those of a decoder with that one alone."""
    engine = Engine(load_model(talker, device="cpu", dtype="float32"), tokenizer, adapters=adapters, slots=8)
    names = ["", *adapters, "", *reversed(adapters)]
    requests = [ask(PROMPT + [20 + n], 12, adapter=name, logprobs=0) for n, name in enumerate(names)]
    handles = [engine.submit(request) for request in requests]
    engine.run_until_idle()
    told = [[named.logprob for piece in handle for named in piece.logprobs] for handle in handles]
    texts = set()
    for name, handle, logprobs in zip(names, handles, told, strict=True):
        single = load_model(talker, adapters.get(name), device="cpu", dtype="float32")
        prompt = list(handle.request.prompt_ids)
        rows = scores(single, prompt + handle.ids)[len(prompt) - 1 : -1].log_softmax(-1)
        assert rows.argmax(-1).tolist() == handle.ids
        assert max(abs(float(row[i]) - p) for row, i, p in zip(rows, handle.ids, logprobs, strict=True)) < 3e-5
        texts.add((name, tuple(handle.ids[:4])))
    assert len({ids for _, ids in texts}) >= len(adapters) + 1  # they do differ


def test_adapters_share_no_cache(talker: Path, tokenizer: PreTrainedTokenizerBase, adapters: dict[str, Path]) -> None:
    """The same prompt under another name is computed anew, and under its own is found."""
    base = load_model(talker, device="cpu", dtype="float32")
    engine = Engine(base, tokenizer, adapters=adapters, slots=2, cache_tokens=2000)
    long = (PROMPT * 10)[:75]
    reused = [alone(engine, ask(long, 2, adapter=name)).reused_tokens for name in ("", "wide", "official", "wide", "")]
    assert reused == [0, 0, 0, 74, 74]


def test_an_adapter_of_another_model_is_refused(
    golden: Golden, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    decoder = load_model(golden("tiny-1b"), device="cpu", dtype="float32")
    with pytest.raises(UserError, match="tiny-2b-lora: made for another model"):
        Engine(decoder, tokenizer, adapters={"a": golden("tiny-2b-lora")})


def test_opening_gives_each_adapter_its_template(talker: Path, adapter: Path) -> None:
    """The base is prompted as published, the adapter as it was trained."""
    session = open_model(str(talker), {"mine": adapter}, device="cpu", slots=2)
    assert session.templates["mine"].tuned and not session.templates[""].tuned
    assert set(session.engine.adapters) == {"mine"}


def test_a_stop_text_ends_the_answer(engine: Engine, tokenizer: PreTrainedTokenizerBase) -> None:
    """Cut at a text that lies across tokens; what is read piece by piece is what the handle holds."""
    whole = alone(engine, ask(PROMPT, 40))
    assert whole.text == tokenizer.decode(whole.ids, skip_special_tokens=True)
    assert len(whole.text) > 12
    stop = whole.text[5:8]
    handle = engine.submit(ask(PROMPT, 40, stop=("never there", stop)))
    pieces = list(handle)
    assert handle.finish == "stop"
    assert "".join(p.text for p in pieces) == handle.text == whole.text[: whole.text.index(stop)]
    assert handle.ids == whole.ids[: len(handle.ids)] == [i for p in pieces for i in p.ids]
    assert len(handle.ids) < len(whole.ids)
    assert all_free(engine)


class OneOf:
    """A grammar: one of some token lists. Counts what it was asked."""

    def __init__(self, *texts: list[int], broken: str = ""):
        self.texts, self.taken, self.broken = texts, [], broken

    def mask(self, bits: Tensor) -> None:
        if self.broken == "mask":
            raise UserError("too hard")
        bits.zero_()
        at = len(self.taken)
        for text in self.texts:
            if text[:at] == self.taken:
                bits[text[at] // 32] |= (1 << (text[at] % 32)) - (1 << 32) * (text[at] % 32 == 31)

    def accept(self, token: int) -> bool:
        if self.broken == "accept":
            raise UserError("too hard")
        self.taken.append(token)
        return self.taken in self.texts


def test_a_grammar_rules_its_row_alone(engine: Engine) -> None:
    """Whatever the model would say, at any temperature; word borders and the last, partial word included."""
    texts = [[31, 32, 63, 511], [31, 64, 5], [480, 0]]
    seen = set()
    for seed in range(12):
        requests = [
            ask(PROMPT, 9, grammar=OneOf(*texts), temperature=30, top_p=1, seed=seed),
            ask(PROMPT, 9),
            ask(PROMPT, 9, grammar=OneOf(*texts), top_p=0.9, temperature=30, seed=seed),
        ]
        free, ruled = answer(engine, requests[1])[0], answer_all(engine, requests)
        assert ruled[1].ids == free
        for handle in (ruled[0], ruled[2]):
            assert handle.ids in texts and handle.finish == "stop"
            seen.add(tuple(handle.ids))
    assert len(seen) == 3
    for broken in ("mask", "accept"):
        bad, good = answer_all(engine, [ask(PROMPT, 9, grammar=OneOf(*texts, broken=broken)), ask(PROMPT, 9)])
        assert (bad.finish, str(bad.error), good.ids) == ("error", "too hard", free)
    empty = alone(engine, ask(PROMPT, 9, grammar=OneOf()))
    assert (empty.finish, str(empty.error)) == ("error", "the grammar allows no token")
    assert all_free(engine)


def test_a_reader_that_fails_ends_its_request_alone(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    def reader(piece: Piece | None) -> None:
        raise ValueError("closed")

    bad, good = engine.submit(ask(PROMPT, 9), reader), engine.submit(ask(PROMPT, 9))
    engine.run_until_idle()
    assert bad.finish == "error" and len(good.ids) == 9 and all_free(engine)
    assert "ValueError: closed" in capsys.readouterr().err


def test_threads_that_come_and_go(engine: Engine) -> None:
    """Six threads submit, read, cancel in the middle and vanish, through pages for a part of them: whoever reads to
    the end reads what the request gives alone, and at the end all is free."""
    fresh = Engine(engine.decoder, engine.tokenizer, slots=1)
    prompts = [[1, 5 + n, *PROMPT[: n % 8]] for n in range(12)]
    requests = [ask(p, 4 + n, temperature=1, top_p=1, seed=n) for n, p in enumerate(prompts)]
    expected = answer(fresh, *requests)
    engine.start()
    faults: list[Any] = []
    cancelled = [0] * 6

    def asker(number: int) -> None:
        chance = random.Random(number)
        try:
            for _ in range(25):
                which = chance.randrange(len(requests))
                handle = engine.submit(requests[which])
                if chance.random() < 0.4:
                    for _, _ in zip(range(chance.randrange(4)), handle, strict=False):
                        pass
                    handle.cancel()
                    cancelled[number] += handle.finish in ("", "cancelled")
                    continue
                ids = [i for piece in handle for i in piece.ids]
                if ids != expected[which] or handle.finish != "length":
                    faults.append((which, ids, handle.finish))
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=asker, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert faults == [] and sum(cancelled) > 10
    end = time.monotonic() + 20
    while not all_free(engine) and time.monotonic() < end:
        time.sleep(0.02)
    assert all_free(engine) and engine.stats.requests == 150
    engine.close()


def test_closing_ends_what_is_under_way(engine: Engine) -> None:
    engine.start()
    handles = [engine.submit(ask(PROMPT, 110)) for _ in range(12)]
    next(iter(handles[0]))
    engine.close()
    for handle in handles:
        list(handle)
    assert {handle.finish for handle in handles} <= {"cancelled", "length"} and "cancelled" in {
        handle.finish for handle in handles
    }
    assert all_free(engine)
    with pytest.raises(UserError, match="closed"):
        engine.submit(ask(PROMPT))


def test_memory_stays_flat(engine: Engine) -> None:
    """2,000 short requests, a part of them broken off: nothing is kept but the pages that there were before."""

    def some(count: int) -> None:
        for start in range(0, count, 20):
            handles = [
                engine.submit(
                    ask([1, (start + n) % 500 + 3, n + 3], 2, stop=("x",), logprobs=1, repetition_penalty=1.1)
                )
                for n in range(20)
            ]
            engine.step()
            for handle in handles[::3]:
                handle.cancel()
            engine.run_until_idle()

    def peak() -> int:
        gc.collect()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    some(400)
    objects = len(gc.get_objects())
    before = peak()
    some(2000)
    assert peak() - before < 4096  # KiB
    assert len(gc.get_objects()) - objects < 2000
    assert all_free(engine) and engine.stats.requests == 2400
