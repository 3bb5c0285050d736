"""All rows at once against one row at a time, and the noise against the statistics that it claims."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from minitune.infer import draw as room
from minitune.infer.draw import Settings, draw, draw_one, key_of, kind_of, noise
from minitune.infer.sampling import Sampling, candidates


def settings_of(samplings: list[Sampling], seeds: list[int], positions: list[int]) -> Settings:
    def column(name: str, dtype: torch.dtype) -> Tensor:
        return torch.tensor([getattr(s, name) for s in samplings], dtype=dtype)

    return Settings(
        temperature=column("temperature", torch.float32),
        top_p=column("top_p", torch.float32),
        top_k=column("top_k", torch.int64),
        min_p=column("min_p", torch.float32),
        key=torch.tensor([key_of(s) for s in seeds], dtype=torch.int32),
        position=torch.tensor(positions),
    )


def kinds(samplings: list[Sampling]) -> frozenset[str]:
    return frozenset(map(kind_of, samplings))


EVERY = [
    Sampling(t, p, k, m)
    for t, p, k, m in itertools.product((0, 0.3, 1.0, 1.7), (0.05, 0.8, 0.97, 1.0), (0, 1, 7, 250, 900), (0.0, 0.1))
]


@pytest.mark.parametrize("vocabulary, spread", [(300, 2.0), (2000, 2.0), (2000, 0.2)])
def test_a_row_in_a_batch_is_drawn_as_it_is_alone(vocabulary: int, spread: float) -> None:
    """Every combination of settings in one batch; `candidates` (tested against transformers) is the plain twin.

    A row that is settled has the plain twin's token; one that is not has more candidates than were looked at.
    """
    chance = random.Random(0)
    torch.manual_seed(0)
    unsettled = 0
    for _ in range(4):
        samplings = list(EVERY)
        chance.shuffle(samplings)
        scores = torch.randn(len(samplings), vocabulary) * spread
        seeds = [chance.randrange(2**63) for _ in samplings]
        positions = [chance.randrange(5000) for _ in samplings]
        token, settled, best = draw(scores, settings_of(samplings, seeds, positions), kinds(samplings))
        assert torch.equal(best, scores.amax(-1))
        for row, sampling in enumerate(samplings):
            plain = draw_one(scores[row], sampling, key_of(seeds[row]), positions[row])
            if settled[row]:
                assert int(token[row]) == plain, sampling
            else:
                unsettled += 1
                left = candidates(scores[row], (), replace(sampling, min_p=0.0))[1].numel()
                assert left > room.NEAR or sampling.top_k > room.NEAR, sampling
    assert (unsettled > 0) == (vocabulary > room.NEAR)


def test_ties_at_the_border_of_top_k_are_all_kept() -> None:
    """Sixteen-bit scores have many: they may go on behind what was looked at, and then the row is not settled."""
    scores = torch.zeros(1, 1000)
    scores[0, :4] = 1
    for count, sure in ((4, True), (5, False)):
        sampling = Sampling(1.0, 1.0, count)
        _, settled, _ = draw(scores, settings_of([sampling], [1], [1]), kinds([sampling]))
        assert bool(settled) == sure
        drawn = {draw_one(scores[0], sampling, 7, position) for position in range(600)}
        assert (len(drawn) == 4) == sure


def test_draws_come_in_proportion() -> None:
    """5,000 positions of one seed, and 5,000 seeds at one position: frequencies are softmax of the candidates."""
    torch.manual_seed(2)
    scores = torch.randn(50) * 1.5
    count = 5_000
    for sampling in (Sampling(0.9, 1.0), Sampling(0.9, 0.85), Sampling(1.2, 1.0, 9, 0.05)):
        kept, ids = candidates(scores, (), sampling)
        expected = torch.zeros(50).index_copy(0, ids, kept.softmax(0))
        steady = settings_of([sampling], [11], [0])
        many = {"temperature": None, "top_p": None, "top_k": None, "min_p": None}
        columns = {name: getattr(steady, name).expand(count) for name in many}
        positions = Settings(**columns, key=steady.key.expand(count), position=torch.arange(count))
        seeds = Settings(
            **columns,
            key=torch.tensor([key_of(s << 13) for s in range(count)], dtype=torch.int32),
            position=torch.full((count,), 9),
        )
        for at in (positions, seeds):
            token, _, _ = draw(scores.expand(count, -1), at, kinds([sampling]))
            seen = torch.bincount(token, minlength=50) / count
            assert seen[expected == 0].sum() == 0
            allowed = 5 * (expected * (1 - expected) / count).sqrt() + 1e-9
            assert ((seen - expected).abs() <= allowed).all()


def test_noise_is_gumbels() -> None:
    """Mean, variance, and the tails of a million; no row, position or token repeats another's."""
    key = torch.tensor([key_of(s) for s in range(10)], dtype=torch.int32)
    x = noise(key, torch.arange(10), torch.arange(100_000))
    assert abs(float(x.mean()) - 0.57722) < 0.005 and abs(float(x.var()) - math.pi**2 / 6) < 0.01
    for cut in (-1.5, 0.0, 3.0, 9.0):
        expected = math.exp(-math.exp(-cut))
        assert abs(float((x <= cut).double().mean()) - expected) < 5 * math.sqrt(expected * (1 - expected) / 1e6)
    assert x.isfinite().all() and float(x.max()) > 11
    rows = torch.corrcoef(x)
    assert (rows - torch.eye(10)).abs().max() < 0.02
    steps = noise(key[:1].expand(10), torch.arange(10), torch.arange(100_000))
    assert (torch.corrcoef(steps) - torch.eye(10)).abs().max() < 0.02
    assert len({key_of(s) for s in (0, 1, 2**31, 2**32, 2**32 + 1, 2**62, 2**63 - 1)}) == 7


def test_the_wide_path_is_the_same_race() -> None:
    """A row that only its temperature filters, drawn with and without a `top_k` that keeps all."""
    torch.manual_seed(3)
    scores = torch.randn(40, 700)
    seeds, positions = list(range(40)), list(range(40))
    whole, near = [Sampling(1.3, 1.0)] * 40, [Sampling(1.3, 1.0, 700)] * 40
    one, _, _ = draw(scores, settings_of(whole, seeds, positions), kinds(whole))
    for row in range(40):
        assert int(one[row]) == draw_one(scores[row], near[row], key_of(row), row)
