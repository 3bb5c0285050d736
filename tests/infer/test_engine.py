"""The engine against the official code's tokens, against computing every token anew, and against itself alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import all_free, alone, answer, ask, greedy, scores
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase
from twins import hub_twin

from minitune.checkpoint.weights import load_model
from minitune.config import UserError
from minitune.infer import capacity, slots
from minitune.infer import engine as engine_module
from minitune.infer.engine import Engine, answer_all
from minitune.infer.request import Request
from minitune.infer.sampling import Bias
from minitune.model import cache
from minitune.model.cache import PAGE
from minitune.model.decoder import Decoder

Golden = Callable[[str], Path]


@pytest.fixture(scope="module")
def row(golden: Golden) -> list[int]:
    return load_file(golden("tiny-2b") / "expected.safetensors")["input_ids"][0].tolist()


@pytest.fixture
def engine(tiny: Decoder, tokenizer: PreTrainedTokenizerBase) -> Engine:
    return Engine(tiny, tokenizer, slots=8)


def mixed(seed: int, count: int, vocabulary: int = 512) -> list[Request]:
    """Requests of all kinds and lengths."""
    chance = random.Random(seed)
    return [
        ask(
            [chance.randrange(3, vocabulary) for _ in range(chance.randrange(1, 100))],
            chance.randrange(1, 24),
            temperature=chance.choice((0, 0.7, 1.5)),
            top_p=chance.choice((1, 0.5, 0.95)),
            top_k=chance.choice((0, 5, 400)),
            min_p=chance.choice((0, 0, 0.05)),
            repetition_penalty=chance.choice((1, 1, 1.3)),
            seed=chance.randrange(2**63),
            logprobs=chance.choice((None, 0, 3)),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("base, adapter", [("tiny-2b", None), ("tiny-1b", None), ("tiny-2b", "tiny-2b-lora")])
@pytest.mark.parametrize("company", [0, 7])
def test_greedy_tokens_are_the_official_codes(
    golden: Golden, tokenizer: PreTrainedTokenizerBase, base: str, adapter: str | None, company: int
) -> None:
    """MHA, GQA, and an adapter, 16 tokens after 8, EOS not stopping; alone, and in a full batch of all kinds."""
    decoder = load_model(golden(base), device="cpu", dtype="float32")
    engine = Engine(decoder, tokenizer, adapters={"a": golden(adapter)} if adapter else None, slots=8)
    expected = load_file(golden(adapter or base) / "expected.safetensors")
    others = mixed(3, company)
    for prompt, official in zip(expected["input_ids"].tolist(), expected["greedy_ids"].tolist(), strict=True):
        request = ask(prompt[:8], adapter="a" if adapter else "")
        assert answer(engine, *others[:4], request, *others[4:])[len(others[:4])] == official
    assert all_free(engine)


def test_scores_are_those_without_a_cache(engine: Engine, tiny: Decoder, row: list[int]) -> None:
    """Prompts of several lengths read in chunks of 5, then token by token: each token's log-probability, and the
    likeliest ones, are those of the whole text computed anew."""
    engine._chunk = 5
    prompts = [row[:1], row[:8], (row * 4)[: PAGE + 1], (row * 5)[:100]]
    handles = answer_all(engine, [ask(p, 12, temperature=1.5, top_p=1, seed=4, logprobs=4) for p in prompts])
    named = [[named for piece in engine.submit(handle.request) for named in piece.logprobs] for handle in handles]
    for prompt, handle, tokens in zip(prompts, handles, named, strict=True):
        expected = scores(tiny, prompt + handle.ids)[len(prompt) - 1 : -1].log_softmax(-1)
        assert [t.token for t in tokens] == handle.ids
        for one, line in zip(tokens, expected, strict=True):
            assert abs(one.logprob - float(line[one.token])) < 2e-5
            best = line.topk(4)
            assert [i for i, _ in one.top] == best.indices.tolist()
            assert max(abs(v - float(b)) for (_, v), b in zip(one.top, best.values, strict=True)) < 2e-5


def test_what_is_told_depends_on_the_request(engine: Engine, row: list[int]) -> None:
    """None, the chosen token alone, and n, side by side in one batch."""
    handles = [engine.submit(ask(row[:8], 5, logprobs=n)) for n in (None, 0, 2)]
    engine.run_until_idle()
    named = [[named for piece in handle for named in piece.logprobs] for handle in handles]
    assert [len(t) for t in named] == [0, 5, 5]
    assert [len(t.top) for t in named[1] + named[2]] == [0] * 5 + [2] * 5
    assert all(t.logprob == t.top[0][1] and t.token == t.top[0][0] for t in named[2])  # greedy


def told(engine: Engine, requests: list[Request]) -> list[list[tuple[int, float]]]:
    """Each request's tokens and their log-probabilities."""
    handles = [engine.submit(request) for request in requests]
    engine.run_until_idle()
    return [[(named.token, named.logprob) for piece in handle for named in piece.logprobs] for handle in handles]


@pytest.mark.parametrize("base, threads", [("tiny-2b", 1), ("tiny-1b", 1), ("tiny-1b", 2)])
def test_a_batch_changes_no_answer(golden: Golden, tokenizer: PreTrainedTokenizerBase, base: str, threads: int) -> None:
    """Requests of all kinds through eight slots give what each gives alone in a fresh engine, seeds included:
    the same tokens, and with oneDNN the same log-probabilities to the last bit."""
    decoder = load_model(golden(base), device="cpu", dtype="float32")
    engine = Engine(decoder, tokenizer, slots=8)
    requests = [replace(r, logprobs=0) for r in mixed(1, 30 if threads == 1 else 3)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = told(engine, requests)
        alone_ = [told(Engine(decoder, tokenizer, slots=1), [request])[0] for request in requests]
    finally:
        torch.set_num_threads(before)
    assert [[i for i, _ in t] for t in together] == [[i for i, _ in t] for t in alone_]
    if decoder.head_packed is not None:
        assert together == alone_
    assert all_free(engine) and engine.stats.preempted == 0


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> int:
    """Pages of 8 tokens, so that tiny texts fill many."""
    for module in (cache, capacity, engine_module, slots):
        monkeypatch.setattr(module, "PAGE", 8)
    return 8


@pytest.mark.parametrize("pages", [12, 23])
def test_running_out_of_pages_changes_no_answer(
    tiny: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    small_pages: int,
    pages: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Eight slots and pages for two: the youngest are turned out and computed again; the texts are the same."""
    requests = [ask(list(r.prompt_ids[:40]), 40, temperature=1, seed=n) for n, r in enumerate(mixed(2, 9))]
    expected = answer(Engine(tiny, tokenizer, slots=1), *requests)
    small = Engine(tiny, tokenizer, slots=8, cache_tokens=pages * small_pages)
    ended: list[int] = []
    handles = []
    for number, request in enumerate(requests):
        end: Any = lambda piece, number=number: ended.append(number) if piece is None else None  # noqa: E731
        handles.append(small.submit(request, end))
    schedule, grow = small._schedule, small._schedule.grow

    def watched() -> list[Any]:
        before = [sequence.number for sequence in schedule.running]
        out = grow()
        assert sorted(s.number for s in out) == before[len(before) - len(out) :]  # the youngest, never the oldest
        assert len(out) < len(before) or not before
        return out

    monkeypatch.setattr(schedule, "grow", watched)
    small.run_until_idle()
    assert [h.ids for h in handles] == expected
    assert small.stats.preempted > 0 and all_free(small)
    assert ended.index(0) < 3 and ended[-1] > 5  # nobody waits for those that came later


def test_a_seed_repeats_an_answer(engine: Engine, row: list[int]) -> None:
    def draws(seed: int | None) -> list[int]:
        return answer(engine, ask(row[:8], 12, temperature=2, top_p=1, seed=seed))[0]

    assert draws(3) == draws(3) != draws(4)
    assert draws(2**62 + 3) != draws(3)
    assert draws(None) != draws(None)


def test_it_stops_where_it_should_and_says_why(engine: Engine, row: list[int]) -> None:
    """At a stop id, which is not part of the answer; at max_new_tokens; at the model's last position."""
    whole = alone(engine, ask(row[:8]))
    assert (len(whole.ids), whole.finish) == (16, "length")
    stop = whole.ids[3]
    cut = alone(engine, ask(row[:8], stop_ids=frozenset((500, stop))))
    assert (cut.ids, cut.finish) == (whole.ids[: whole.ids.index(stop)], "stop")
    prompt = (row * 6)[:120]
    assert engine.limit == engine.decoder.config.max_position_embeddings == 128
    full = alone(engine, ask(prompt))
    assert (len(full.ids), full.finish) == (8, "context")
    assert alone(engine, ask(prompt[:112])).finish == "length"


def test_what_can_never_be_answered_is_refused(tiny: Decoder, engine: Engine, row: list[int]) -> None:
    for request, said in (
        (ask((row * 6)[:128]), "has 128 tokens, the model reads fewer than 128; shorten it"),
        (ask([1, 512]), "token 512 .*another model's tokenizer"),
        (ask([]), "the prompt is empty"),
        (ask(row[:8], adapter="x"), "no adapter is called 'x' .there are: none"),
        (ask(row[:8], stop=("a", "")), "a stop text is empty"),
    ):
        with pytest.raises(UserError, match=said):
            engine.submit(request)
    assert len(answer(engine, ask((row * 6)[:127]))[0]) == 1
    small = Engine(tiny, engine.tokenizer, slots=2, cache_tokens=PAGE)
    with pytest.raises(UserError, match="has 64 tokens, the cache holds 64"):
        small.submit(ask((row * 6)[:64]))
    full = alone(small, ask((row * 6)[:60], 99))
    assert (len(full.ids), full.finish) == (4, "context")  # the cache is full
    assert all_free(small)


def test_one_that_does_not_fit_waits_and_keeps_its_turn(tiny: Decoder, engine: Engine, row: list[int]) -> None:
    """Two pages: a long prompt waits for them, and a short one that came after it does not slip past."""
    small = Engine(tiny, engine.tokenizer, slots=4, cache_tokens=2 * PAGE)
    first, long, short = (small.submit(ask((row * 6)[:n], 6)) for n in (30, 100, 5))
    small.step()
    assert (small.stats.running, small.stats.waiting) == (1, 2)
    small.run_until_idle()
    assert [h.finish for h in (first, long, short)] == ["length"] * 3 and all_free(small)


def test_cancelling_frees_the_slot_at_the_next_step(engine: Engine, row: list[int]) -> None:
    """Running, waiting, while its prompt is read, before it was seen, when it is over; twice."""
    engine._chunk = 4
    pieces: list[Any] = []
    running, reading = engine.submit(ask(row[:3], 99)), engine.submit(ask(row[:20], 99), pieces.append)
    fillers = [engine.submit(ask([9, i], 99)) for i in range(3, 9)]
    waiting, unseen = engine.submit(ask(row[:5])), None
    engine.step()
    assert engine.stats.running == 8 and running.ids and not reading.ids and not waiting.ids
    for handle in (running, reading, waiting, running):
        handle.cancel()
    unseen = engine.submit(ask(row[:5]))
    unseen.cancel()
    engine.step()
    assert engine.stats.running == 6 and engine.stats.cancelled == 4
    assert [h.finish for h in (running, reading, waiting, unseen)] == ["cancelled"] * 4 and pieces == [None]
    for handle in fillers:
        handle.cancel()
    engine.run_until_idle()
    fillers[0].cancel()
    assert all_free(engine) and engine.stats.cancelled == 10
    read = engine.submit(ask(row[:8], 99))
    for piece in read:
        assert piece.ids
        break
    engine.run_until_idle()
    assert read.finish == "cancelled" and len(read.ids) <= 2 and all_free(engine)


def test_a_later_turn_computes_only_what_is_new(
    tiny: Decoder, engine: Engine, row: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tokens as from scratch, while the beginning in common comes from the cache, to the very token."""
    lengths: list[int] = []
    hidden = tiny.hidden
    monkeypatch.setattr(tiny, "hidden", lambda ids, *rest: lengths.append(ids.numel()) or hidden(ids, *rest))
    long = (row * 5)[: PAGE + 20]
    (said,) = answer(engine, ask(long, 6))
    kept = long + said
    fresh = Engine(tiny, engine.tokenizer, slots=1)
    cases = [
        ([*kept, 77, 78, 79], 1 + 3),  # goes on: the answer's last token was drawn, not run
        ([*long[:-5], 9, 9, 9], 3),  # differs inside its second page
        ([*long[:40], 9, 9], 2),  # inside its first
        (long[:PAGE], 1),  # a page to its end: its last token gives the scores
        ([*long[:5], 9, 9], 7),  # too little in common to be worth a copy
    ]
    for prompt, new in cases:
        expected = greedy(tiny, prompt, 3)
        lengths.clear()
        handle = alone(engine, ask(prompt, 3))
        assert handle.ids == expected
        assert lengths == [new, 1, 1] and handle.reused_tokens == len(prompt) - new
    assert alone(fresh, ask(long[:8], 2)).reused_tokens == 0
    assert all_free(engine) and engine.stats.cache_tokens_kept > 0


def test_prompts_that_begin_alike_and_come_together_are_read_once(engine: Engine, row: list[int]) -> None:
    """The others wait until the first has read the whole pages that they have in common, as n choices do."""
    long = (row * 5)[:100]
    handles = answer_all(engine, [ask(long, 4, temperature=1, seed=n) for n in range(4)])
    assert [h.reused_tokens for h in handles] == [0, PAGE, PAGE, PAGE]
    fresh = Engine(engine.decoder, engine.tokenizer, slots=1)
    assert [h.ids for h in handles] == answer(fresh, *(ask(long, 4, temperature=1, seed=n) for n in range(4)))


def test_long_prompts_do_not_stall_what_runs(engine: Engine, row: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream gets its token each step while two others' prompts are read, a chunk in all between two tokens."""
    engine._chunk = 10
    lengths: list[int] = []
    hidden = engine.decoder.hidden
    monkeypatch.setattr(engine.decoder, "hidden", lambda ids, *rest: lengths.append(ids.numel()) or hidden(ids, *rest))
    stream = engine.submit(ask(row[:3], 60))
    engine.step()
    longs = [engine.submit(ask([n, *(row * 5)[:69]], 4)) for n in (7, 8)]
    for step in range(14):
        assert not longs[1].ids and not (longs[0].ids and step < 7)
        before = len(stream.ids)
        engine.step()
        assert len(stream.ids) == before + 1, step
    assert longs[0].finish and longs[1].ids and max(lengths) == 10
    engine.run_until_idle()
    assert stream.ids == greedy(engine.decoder, row[:3], 60)


def test_the_penalty_knows_the_prompt_and_the_answer(engine: Engine, row: list[int]) -> None:
    """A penalty that rules repeats out: every new token differs from the prompt's and from each other; a
    neighbour in the same slot afterwards is not penalised."""
    assert scores(engine.decoder, row[:8])[-1].max() > 0
    strict, free = answer(engine, ask(row[:8], 40, repetition_penalty=1e6), ask(row[:9], 40))
    assert len({*strict, *row[:8]}) == 48
    assert free == greedy(engine.decoder, row[:9], 40)
    assert answer(engine, *(ask(row[n:9], 9) for n in range(8))) == [
        greedy(engine.decoder, row[n:9], 9) for n in range(8)
    ]


@pytest.mark.parametrize("bias", [Bias(presence=1.5), Bias(frequency=0.7), Bias(-0.5, 1.0, ((7, 100.0), (9, -100.0)))])
def test_a_bias_is_added_to_the_scores(engine: Engine, row: list[int], bias: Bias) -> None:
    """Greedy tokens are those of OpenAI's formula over scores without a cache, which counts the answer and not the
    prompt; told log-probabilities stay the model's own, and a neighbour's answer its own."""
    fixed, ids, said = dict(bias.tokens), list(row[:8]), []
    raw: list[float] = []
    for _ in range(24):
        line = scores(engine.decoder, ids)[-1]
        by_hand = [
            score + fixed.get(token, 0) - bias.presence * (token in said) - bias.frequency * said.count(token)
            for token, score in enumerate(line.tolist())
        ]
        said.append(max(range(len(by_hand)), key=by_hand.__getitem__))
        raw.append(float(line.log_softmax(-1)[said[-1]]))
        ids.append(said[-1])
    (got, free) = told(engine, [ask(row[:8], 24, bias=bias, logprobs=0), ask(row[:8], 24, logprobs=0)])
    assert [token for token, _ in got] == said
    assert [logprob for _, logprob in got] == pytest.approx(raw, abs=2e-5)
    assert [token for token, _ in free] == greedy(engine.decoder, row[:8], 24) != said


def test_scores_that_are_not_finite_end_their_request_alone(
    engine: Engine, row: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    head = engine.decoder.head
    broken: list[int] = []

    def poisoned(h: torch.Tensor) -> torch.Tensor:
        out = head(h)
        for i in broken:
            out[i, 3] = float("nan")
        return out

    monkeypatch.setattr(engine.decoder, "head", poisoned)
    good, bad = engine.submit(ask(row[:8], 9)), engine.submit(ask(row[:9], 9))
    engine.step()
    broken.append(1)
    engine.step()
    broken.clear()
    engine.run_until_idle()
    assert bad.finish == "error" and "not finite" in str(bad.error) and len(bad.ids) == 2
    assert good.ids == greedy(engine.decoder, row[:8], 9)
    with pytest.raises(UserError, match="not finite"):
        list(bad)
    assert all_free(engine)


def test_an_answer_after_a_broken_step(engine: Engine, row: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C or a bug amid a step: what ran has ended, pages are free, and the next request is answered right."""
    for where, error, finish in (
        ("hidden", KeyboardInterrupt(), "cancelled"),
        ("hidden", RuntimeError("out of memory\nmore"), "error"),
        ("grow", KeyboardInterrupt(), "cancelled"),
    ):
        one, two = engine.submit(ask((row * 5)[:70], 30)), engine.submit(ask(row[:9], 30))
        for _ in range(3):
            engine.step()

        def fail(*_: object, error: BaseException = error) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(*((engine.decoder, where) if where == "hidden" else (engine._schedule, where)), fail)
            with pytest.raises(type(error)):
                engine.step()
        assert one.finish == two.finish == finish and all_free(engine)
        if finish == "error":
            assert str(one.error) == "the answer was broken off: RuntimeError: out of memory"
        after = alone(engine, ask((row * 5)[:70], 5))
        assert after.ids == greedy(engine.decoder, (row * 5)[:70], 5)
        assert (after.reused_tokens > 0) == (where == "hidden")  # the cache is kept where its books are right


def test_the_caller_is_not_in_inference_mode(engine: Engine, row: list[int]) -> None:
    for _ in engine.submit(ask(row[:8], 3)):
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


def test_a_decoder_that_learns_is_left_as_it_is(
    golden: Golden, tokenizer: PreTrainedTokenizerBase, row: list[int]
) -> None:
    """Sample answers during training: a gradient before and after, the layers' own forward in use again."""
    decoder = load_model(golden("tiny-2b"), golden("tiny-2b-lora"), device="cpu", dtype="float32").train()

    def loss() -> torch.Tensor:
        return decoder.logits(torch.tensor([row])).float().logsumexp(-1).sum()

    def forbidden(*_: object) -> None:
        raise AssertionError("the training step's layers are not for answering")

    loss().backward()
    before = [p.grad.clone() for p in decoder.parameters() if p.grad is not None]
    plain, decoder.layer_forward = decoder.layer_forward, forbidden  # type: ignore[assignment]
    expected = load_file(golden("tiny-2b-lora") / "expected.safetensors")["greedy_ids"][0].tolist()
    assert answer(Engine(decoder, tokenizer, slots=1), ask(row[:8]))[0] == expected
    assert decoder.layer_forward is forbidden and decoder.head_packed is None and decoder.training
    decoder.layer_forward = plain
    decoder.zero_grad()
    loss().backward()
    after = [p.grad for p in decoder.parameters() if p.grad is not None]
    assert before and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_rope_that_depends_on_the_length(
    tokenizer: PreTrainedTokenizerBase, small_pages: int, tmp_path: Path
) -> None:
    """LongRoPE turns longer texts by other angles: their pages are not those of a shorter text that begins the same,
    and a prompt read in chunks is turned by its whole length."""
    hub_twin(tmp_path, rope="longrope")
    decoder = load_model(tmp_path, device="cpu", dtype="float32")
    assert decoder.rope.original_max == 32
    engine = Engine(decoder, tokenizer, slots=4)
    engine._chunk = 7
    ids = [3 + i * i % 90 for i in range(60)]
    reused = []
    for length in (20, 28, 40, 50, 30):
        request = ask(ids[:length], 10, logprobs=0)
        handle = engine.submit(request)
        first, *_ = [named for piece in handle for named in piece.logprobs]
        expected = scores(decoder, ids[:length])[-1].log_softmax(-1)
        assert abs(first.logprob - float(expected[first.token])) < 1e-4 and first.token == int(expected.argmax())
        assert handle.ids == alone(Engine(decoder, tokenizer, slots=1), request).ids
        reused.append(handle.reused_tokens)
    assert reused == [0, 16, 0, 40, 24]  # whole pages of 8: nothing from the short texts for the long ones
