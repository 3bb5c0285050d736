"""The next token of every row at once: rows with different settings in one computation on the device.

A draw is a race (Gumbel-max): each token that the filters leave gets its score plus noise, and the highest wins, which
is a draw from softmax. The noise is a hash of (seed, position, token), so a row's draw depends on nothing but its own
scores, settings, seed and position: not on the batch, nor on how many draws came before, nor on the way in which the
filters were computed.

Legend: B rows, V vocabulary, C candidates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minitune.infer.sampling import GREEDY, Sampling, candidates
from minitune.model.lora import mix32

NEAR = 256  # candidates looked at first: a nucleus is rarely wider, and sorting 122753 scores takes 12 ms on a CPU


@dataclass(frozen=True)
class Settings:
    """Each [B]. key int32: `key_of(seed)`. position int64: the drawn token's place in its sequence."""

    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    min_p: Tensor
    key: Tensor
    position: Tensor


def kind_of(sampling: Sampling) -> str:
    """Which part of `draw` a row needs: greedy, near (its likeliest tokens) or whole (no filter but min_p)."""
    if sampling.temperature < GREEDY:
        return "greedy"
    return "near" if sampling.top_p < 1 or sampling.top_k else "whole"


def key_of(seed: int) -> int:
    """int32 of a 63-bit seed."""
    low, high = (torch.tensor(part, dtype=torch.int64).to(torch.int32) for part in (seed & 0xFFFFFFFF, seed >> 32))
    return int(mix32(low ^ mix32(high ^ 0x5EED)))


def noise(key_B: Tensor, position_B: Tensor, id_BC: Tensor) -> Tensor:
    """Gumbel noise [B, C] in float32 of tokens [B, C] (or [C])."""
    row_B1 = mix32(key_B ^ mix32(position_B.to(torch.int32)))[:, None]
    bits_BC = mix32(row_B1 ^ mix32(id_BC.to(torch.int32))) & 0x7FFFFFFF
    # an exponential variable by -log(1 - u): u has its finest steps near 0, where the race is decided
    u_BC = ((bits_BC.float() + 0.5) * 2.0**-31).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-u_BC))


def draw(scores_BV: Tensor, at: Settings, kinds: frozenset[str]) -> tuple[Tensor, Tensor, Tensor]:
    """(token int64 [B], settled bool [B], best score [B]). `kinds`: the `kind_of` of all rows.

    Float32 scores after penalty and grammar. A row that is not settled has more candidates than were looked at: draw
    it by itself (`draw_one`). No value is looked at on the host. The best score is not finite where the row is broken.
    """
    top_B, token_B = scores_BV.max(-1)
    settled_B = torch.ones_like(token_B, dtype=torch.bool)
    if kinds == {"greedy"}:
        return token_B, settled_B, top_B
    greedy_B = at.temperature < GREEDY
    heated_BV = (scores_BV - top_B[:, None]) / at.temperature.clamp(min=GREEDY)[:, None]
    whole_B = (at.top_p >= 1) & (at.top_k == 0)
    if "whole" in kinds:
        drawn_B = _race(heated_BV, at, torch.arange(heated_BV.shape[1], device=heated_BV.device))
        token_B = torch.where(whole_B & ~greedy_B, drawn_B, token_B)
    if "near" in kinds:
        drawn_B, near_B = _draw_near(heated_BV, at)
        token_B = torch.where(whole_B | greedy_B, token_B, drawn_B)
        settled_B = near_B | whole_B | greedy_B
    return token_B, settled_B, top_B


def biased(scores_BV: Tensor, added: Sequence[Mapping[int, float]]) -> Tensor:
    """A copy with what is added to some tokens of each row."""
    places = [(row, token) for row, one in enumerate(added) for token in one]
    if not places:
        return scores_BV
    row_N, token_N = torch.tensor(places, device=scores_BV.device).unbind(1)
    value_N = torch.tensor([value for one in added for value in one.values()], device=scores_BV.device)
    return scores_BV.index_put((row_N, token_N), value_N, accumulate=True)


def draw_one(scores_V: Tensor, sampling: Sampling, key: int, position: int) -> int:
    """One row's token however many candidates it has; what `draw` would give if it looked at all of them."""
    scores_C, id_C = candidates(scores_V, (), sampling)
    at = (torch.tensor([n], device=scores_C.device) for n in (key, position))
    key_1, position_1 = at
    race_C = scores_C + noise(key_1.to(torch.int32), position_1, id_C[None])[0]
    return int(id_C[race_C.argmax()])


def _race(scores_BC: Tensor, at: Settings, id_BC: Tensor) -> Tensor:
    """The place of the winner in each row; min_p applied (the likeliest has score 0)."""
    kept_BC = scores_BC >= at.min_p.log()[:, None]
    race_BC = torch.where(kept_BC, scores_BC + noise(at.key, at.position, id_BC), -math.inf)
    return race_BC.argmax(-1)


def _draw_near(heated_BV: Tensor, at: Settings) -> tuple[Tensor, Tensor]:
    """(token, settled) of rows that filter by top_k or top_p: among the NEAR likeliest."""
    vocabulary = heated_BV.shape[1]
    near = min(NEAR, vocabulary)
    score_BC, id_BC = heated_BV.topk(near)
    limited_B = (at.top_k > 0) & (at.top_k < vocabulary)
    kth_B = score_BC.gather(1, (at.top_k.clamp(1, near) - 1)[:, None])
    score_BC = torch.where(limited_B[:, None] & (score_BC < kth_B), -math.inf, score_BC)
    mass_B = torch.where(limited_B, score_BC.logsumexp(-1), heated_BV.logsumexp(-1))
    reached_BC = (score_BC - mass_B[:, None]).exp().cumsum(-1)
    nucleus_B = at.top_p < 1
    # a token is left out where those before it already reach top_p
    out_BC = nucleus_B[:, None] & (reached_BC[:, :-1] >= at.top_p[:, None])
    kept_BC = torch.cat((score_BC[:, :1], torch.where(out_BC, -math.inf, score_BC[:, 1:])), dim=1)
    token_B = id_BC.gather(1, _race(kept_BC, at, id_BC)[:, None])[:, 0]
    if near == vocabulary:
        return token_B, torch.ones_like(limited_B)
    beyond_B = (at.top_k > near) | (kth_B[:, 0] <= score_BC[:, -1])  # ties with the last may go on behind it
    return token_B, torch.where(limited_B, ~beyond_B, reached_BC[:, -1] >= at.top_p)
