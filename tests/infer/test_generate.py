"""The decoding loop against the official code's tokens and against computing every token anew."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minitune.checkpoint.weights import load_model
from minitune.config import UserError
from minitune.infer import generate as room
from minitune.infer.generate import GrowingCache, generate
from minitune.infer.sampling import Sampling
from minitune.model.decoder import Decoder

GREEDY = Sampling(temperature=0, max_new_tokens=16)
Golden = Callable[[str], Path]


@pytest.fixture(scope="module")
def tiny(golden: Golden) -> Decoder:
    return load_model(golden("tiny-2b"), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def row(golden: Golden) -> list[int]:
    return load_file(golden("tiny-2b") / "expected.safetensors")["input_ids"][0].tolist()


def exhaust(run: Generator[int, None, str]) -> tuple[list[int], str]:
    """The tokens, and why it ended."""
    ids = []
    while True:
        try:
            ids.append(next(run))
        except StopIteration as end:
            return ids, end.value


def count_tokens(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of all runs of the graph from here on."""
    lengths: list[int] = []
    hidden = decoder.hidden

    def counted(ids_T: torch.Tensor, *rest: Any) -> torch.Tensor:
        lengths.append(ids_T.numel())
        return hidden(ids_T, *rest)

    monkeypatch.setattr(decoder, "hidden", counted)
    return lengths


@pytest.mark.parametrize("base, adapter", [("tiny-2b", None), ("tiny-1b", None), ("tiny-2b", "tiny-2b-lora")])
def test_greedy_tokens_are_the_official_codes(golden: Golden, base: str, adapter: str | None) -> None:
    """MHA, GQA, and an attached adapter: 16 tokens after 8, EOS not stopping."""
    decoder = load_model(golden(base), golden(adapter) if adapter else None, device="cpu", dtype="float32")
    expected = load_file(golden(adapter or base) / "expected.safetensors")
    for prompt, answer in zip(expected["input_ids"].tolist(), expected["greedy_ids"].tolist(), strict=True):
        assert list(generate(decoder, prompt[:8], (), GREEDY)) == answer


def test_cached_scores_equal_uncached_ones(
    tiny: Decoder, row: list[int], golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompt at once, in two parts, token by token, with the cache growing in between: the official logits."""
    expected = load_file(golden("tiny-2b") / "expected.safetensors")["logits"][0]
    monkeypatch.setattr(room, "BLOCK", 4)
    for cuts in ([8], [3, 8], [1, 2, 3, 8]):
        cache, parts = GrowingCache(tiny), [*cuts, *range(9, len(row) + 1)]
        with torch.inference_mode():
            for start, stop in zip([0, *parts], parts, strict=False):
                got = room._advance(tiny, cache, row[start:stop])
                assert (got - expected[stop - 1]).abs().max() <= 3e-5 * expected.abs().max()
        assert cache.ids == row


def test_it_stops_where_it_should_and_says_why(tiny: Decoder, row: list[int]) -> None:
    """At a stop id, which is not part of the answer; at max_new_tokens; at the model's last position."""
    answer, why = exhaust(generate(tiny, row[:8], (), GREEDY))
    assert (len(answer), why) == (16, "length")
    stop = answer[3]
    assert exhaust(generate(tiny, row[:8], (500, stop), GREEDY)) == (answer[: answer.index(stop)], "stop")
    prompt = (row * 6)[:120]
    assert tiny.config.max_position_embeddings == 128
    answer, why = exhaust(generate(tiny, prompt, (), GREEDY))
    assert (len(answer), why) == (8, "context")
    answer, why = exhaust(generate(tiny, prompt[:112], (), GREEDY))
    assert (len(answer), why) == (16, "length")


def test_a_prompt_that_cannot_be_read_is_said(tiny: Decoder, row: list[int]) -> None:
    with pytest.raises(UserError, match="has 128 tokens, the model reads fewer than 128"):
        next(generate(tiny, (row * 6)[:128], (), GREEDY))
    assert len(list(generate(tiny, (row * 6)[:127], (), GREEDY))) == 1
    with pytest.raises(UserError, match="token 512 .*another model's tokenizer"):
        next(generate(tiny, [1, 512], (), GREEDY))


def test_a_seed_repeats_an_answer(tiny: Decoder, row: list[int]) -> None:
    def answer(seed: int | None) -> list[int]:
        return list(generate(tiny, row[:8], (), Sampling(2.0, 1.0, max_new_tokens=12, seed=seed)))

    assert answer(3) == answer(3) != answer(4)
    assert answer(None) != answer(None)


def test_the_penalty_knows_the_prompt_and_the_answer(tiny: Decoder, row: list[int]) -> None:
    """A penalty that rules repeats out: every new token differs from the prompt's and from each other."""
    sampling = Sampling(temperature=0, repetition_penalty=1e6, max_new_tokens=40)
    answer = list(generate(tiny, row[:8], (), sampling))
    scores = tiny.logits(torch.tensor([row[:8]]))[0, -1]
    assert scores.max() > 0
    assert len({*answer, *row[:8]}) == 48


def test_a_later_turn_reuses_the_common_prefix(tiny: Decoder, row: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens as from scratch, while only what is new is computed; also after another answer or a break."""
    cache, few = GrowingCache(tiny), Sampling(temperature=0, max_new_tokens=5)
    kept = row[:8] + list(generate(tiny, row[:8], (), few, cache=cache))
    lengths = count_tokens(tiny, monkeypatch)
    cases = [
        (kept + row[8:12], 1 + 4),  # goes on: the answer's last token was yielded, not run
        (row[:5] + [7, 9, 11], 3),  # differs inside
        (row[:4], 1),  # is a prefix: its last token gives the scores
        ([77, *row[:6]], 7),  # shares nothing
    ]
    for prompt, new in cases:
        expected = list(generate(tiny, prompt, (), few))
        list(generate(tiny, kept[:-1], (), Sampling(temperature=0, max_new_tokens=1), cache=cache))
        lengths.clear()
        assert list(generate(tiny, prompt, (), few, cache=cache)) == expected
        assert lengths == [new, 1, 1, 1, 1]
    run = generate(tiny, kept, (), GREEDY, cache=cache)
    broken = [next(run) for _ in range(3)]
    run.close()
    assert cache.ids == kept + broken[:2]
    assert list(generate(tiny, kept, (), few, cache=cache)) == list(generate(tiny, kept, (), few))


def test_the_cache_grows_in_blocks_up_to_the_models_end(
    tiny: Decoder, row: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never the whole length at once, never beyond it; what is held survives growth (tokens equal)."""
    prompt, some = (row * 5)[:100], Sampling(temperature=0, max_new_tokens=20)
    expected = list(generate(tiny, prompt, (), some))
    monkeypatch.setattr(room, "BLOCK", 60)
    cache = GrowingCache(tiny)
    sizes = []
    for length in (50, 61, 100):
        list(generate(tiny, prompt[:length], (), Sampling(max_new_tokens=1), cache=cache))
        sizes.append(cache.capacity)
    answer = list(generate(tiny, prompt, (), some, cache=cache))
    assert [*sizes, cache.capacity] == [60, 120, 120, 120]
    assert answer == expected
    list(generate(tiny, prompt + answer, (), some, cache=cache))
    assert cache.capacity == cache.keys.shape[3] == cache.values.shape[3] == 128


def test_the_caller_is_not_in_inference_mode(tiny: Decoder, row: list[int]) -> None:
    """No graph is recorded inside, and whoever reads the tokens can go on training."""
    for parameter in tiny.parameters():
        parameter.requires_grad_(True)
    cache = GrowingCache(tiny)
    for _ in generate(tiny, row[:8], (), GREEDY, cache=cache):
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    assert not cache.keys.requires_grad
    tiny.requires_grad_(False)
