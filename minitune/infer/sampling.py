"""From a model's scores to the next token. Names, semantics and order are those of Hugging Face's generation.

Order: repetition_penalty, temperature, top_k, top_p, min_p, one draw. Legend: V vocabulary. `candidates` is the plain
form for one row; `draw.py` does all rows of a batch at once, and falls back on it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minitune.config import UserError, setting

if TYPE_CHECKING:
    from torch import Tensor

NEAR = 1024  # candidates sorted before all are: a nucleus is rarely wider
GREEDY = 1e-6  # temperatures below are 0: nothing in float32 lies between


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. temperature and top_p default to those of MiniCPM's own `chat()` function."""

    temperature: float = setting(0.3, "0: always the likeliest token; higher: more varied")
    top_p: float = setting(0.8, "draw from the likeliest tokens that together reach this probability (1: all)")
    top_k: int = setting(0, "draw from this many of the likeliest tokens (0: all)")
    min_p: float = setting(0.0, "leave out tokens below this part of the likeliest one's probability (0: none)")
    repetition_penalty: float = setting(1.0, "above 1: tokens that are already there become less likely")
    max_new_tokens: int = setting(512, "an answer's tokens at most")
    seed: int | None = setting(None, "the same seed, prompt and settings give the same answer (none: a new one)")

    def __post_init__(self) -> None:
        """Raises UserError for a value outside its range."""
        for name, fine, range_ in (
            ("temperature", 0 <= self.temperature < math.inf, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0 (1: none)"),
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "0 or more, less than 2**63"),
        ):
            if not fine:
                raise UserError(f"{name} is {getattr(self, name)}; it takes {range_}")


@dataclass(frozen=True)
class Bias:
    """What is added to scores before all else, as OpenAI's API has it: -presence for each token that the answer holds
    (the prompt does not count), -frequency for each time that it does, and fixed numbers for some tokens."""

    presence: float = 0.0
    frequency: float = 0.0
    tokens: tuple[tuple[int, float], ...] = ()

    def after(self, said: Sequence[int]) -> dict[int, float]:
        """Token -> what is added to its score behind the answer `said`."""
        out = dict(self.tokens)
        if self.presence or self.frequency:
            for token, count in Counter(said).items():
                out[token] = out.get(token, 0.0) - self.presence - self.frequency * count
        return out


def candidates(logits_V: Tensor, history_ids: Sequence[int], sampling: Sampling) -> tuple[Tensor, Tensor]:
    """(float32 scores [C], token ids [C]) of what may be drawn, a token with probability softmax(scores).

    history_ids: the prompt and the answer so far, for the repetition penalty.
    """
    import torch

    scores = logits_V.float()
    if sampling.repetition_penalty != 1 and history_ids:
        seen = torch.tensor(sorted(set(history_ids)), device=scores.device)
        score = scores[seen]
        weaker = torch.where(score < 0, score * sampling.repetition_penalty, score / sampling.repetition_penalty)
        scores = scores.index_copy(0, seen, weaker)
    if sampling.temperature < GREEDY:
        return scores.max(0, keepdim=True)
    scores, ids = (
        (scores - scores.max()) / sampling.temperature,
        torch.arange(scores.numel(), device=scores.device),
    )
    if 0 < sampling.top_k < scores.numel():
        keep = scores >= scores.topk(sampling.top_k).values[-1]
        scores, ids = scores[keep], ids[keep]
    if sampling.top_p < 1:
        scores, order = _nucleus(scores, sampling.top_p)
        ids = ids[order]
    if sampling.min_p > 0:
        keep = scores >= scores.max() + math.log(sampling.min_p)
        scores, ids = scores[keep], ids[keep]
    return scores, ids


def _nucleus(scores: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The likeliest tokens, as few as reach `top_p` together: their scores, falling, and their places."""
    near, mass = min(NEAR, scores.numel()), scores.logsumexp(0)
    while True:
        best, order = scores.topk(near)
        reached = (best - mass).exp().cumsum(0)
        if near == scores.numel() or reached[-1] >= top_p:
            break
        near = scores.numel()
    count = 1 + int((reached[:-1] < top_p).sum())
    return best[:count], order[:count]
