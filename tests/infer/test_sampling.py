"""Sampling against transformers' own logits processors, in the order in which it applies them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from minitune.config import UserError, build
from minitune.infer.sampling import NEAR, Sampling, candidates


def theirs(logits_V: Tensor, history: list[int], s: Sampling) -> Tensor:
    """transformers' probabilities [V]."""
    from transformers.generation import logits_process as hf

    steps = [
        hf.RepetitionPenaltyLogitsProcessor(s.repetition_penalty),
        hf.TemperatureLogitsWarper(s.temperature),
    ]
    if s.top_k:
        steps.append(hf.TopKLogitsWarper(s.top_k))
    if s.top_p < 1:
        steps.append(hf.TopPLogitsWarper(s.top_p))
    if s.min_p:
        steps.append(hf.MinPLogitsWarper(s.min_p))
    scores = logits_V[None].clone()
    for step in steps:
        scores = step(torch.tensor([history]), scores)
    return scores[0].softmax(0)


def ours(logits_V: Tensor, history: list[int], s: Sampling) -> Tensor:
    scores, ids = candidates(logits_V, history, s)
    return torch.zeros(logits_V.numel()).index_copy(0, ids, scores.softmax(0))


def test_every_combination_gives_the_probabilities_of_transformers() -> None:
    """Each filter, alone and with every other, at several strengths; history with repeats, scores of both signs."""
    torch.manual_seed(0)
    values = itertools.product((0.3, 1.0, 1.7), (0.05, 0.5, 0.8, 1.0), (0, 1, 7, 900), (0.0, 0.1), (1.0, 1.3, 0.7))
    for temperature, top_p, top_k, min_p, penalty in values:
        sampling = Sampling(temperature, top_p, top_k, min_p, penalty)
        logits_V = torch.randn(300) * 2
        history = torch.randint(300, (40,)).tolist() * 2
        torch.testing.assert_close(
            ours(logits_V, history, sampling), theirs(logits_V, history, sampling), rtol=1e-4, atol=1e-6
        )


def test_a_nucleus_wider_than_the_sorted_part_is_still_whole() -> None:
    """Flat scores need more than NEAR tokens to reach top_p."""
    torch.manual_seed(1)
    logits_V, sampling = torch.randn(5 * NEAR) * 0.3, Sampling(temperature=1.0, top_p=0.9)
    got, expected = ours(logits_V, [], sampling), theirs(logits_V, [0], sampling)
    assert int((got > 0).sum()) > 2 * NEAR
    assert abs(int((got > 0).sum()) - int((expected > 0).sum())) <= 2  # the border differs by rounding alone
    assert (got - expected).abs().sum() < 2e-3


def test_temperature_zero_is_the_likeliest_after_the_penalty() -> None:
    """Greedy ignores the filters but not the repetition penalty, as transformers' do_sample=False."""
    logits_V = torch.tensor([1.0, 3.0, 2.9, -1.0])

    def only(scores: Tensor, history: list[int], sampling: Sampling) -> int:
        (token,) = candidates(scores, history, sampling)[1].tolist()
        return token

    assert only(logits_V, [1], Sampling(temperature=0, top_k=3)) == 1
    assert only(logits_V, [1], Sampling(temperature=0, repetition_penalty=1.1)) == 2
    assert only(logits_V, [], Sampling(temperature=1e-50)) == 1


@pytest.mark.parametrize(
    "name, value",
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("max_new_tokens", 0),
        ("seed", -1),
        ("seed", 2**63),
    ],
)
def test_values_out_of_range_are_refused_in_one_line(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"^{name} is .*it takes [^\n]*$"):
        Sampling(**{name: value})


def test_settings_are_read_like_all_others() -> None:
    """Text from flags or /set, hyphens, and a did-you-mean come from config.build."""
    assert build(Sampling, {"top-p": "0.5", "seed": "none"}) == Sampling(top_p=0.5)
    with pytest.raises(UserError, match="did you mean temperature"):
        build(Sampling, {"temprature": "1"})
