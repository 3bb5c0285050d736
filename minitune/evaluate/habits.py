"""How a model answers: does it stop, does it repeat itself, does it recite what it was trained on?"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

STRETCH = 12  # characters (white space aside) that an answer must share with a training answer to be called recited
Place = tuple[str, int]  # (file, row)
GRAM = 4  # Welleck et al. 2019, https://arxiv.org/abs/1908.04319: seq-rep-4


def repetition(ids: Sequence[int], n: int = GRAM) -> float:
    """The share of an answer's n-grams of tokens that stand in it before: 0 says everything once (seq-rep-n)."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def loops(ids: Sequence[int], times: int = 3, least: int = 12) -> bool:
    """Whether the answer ends in a loop: the same tokens at least `times` times, `least` tokens in all."""
    length = len(ids)
    for period in range(1, length // times + 1):
        span = max(times * period, least)
        if span > length:
            break
        tail = ids[length - span :]
        if all(tail[i] == tail[i + period] for i in range(span - period)):
            return True
    return False


def squeezed(text: str) -> str:
    """Without white space, so that a line break does not hide a recital."""
    return re.sub(r"\s+", "", text)


@dataclass(frozen=True)
class Recital:
    """What an answer shares with the training answer that it shares most with (0: nothing of STRETCH characters).

    file, row: where that answer stands. equal: it is the whole answer, word for word. common: characters of the
    longest stretch. part: the share of the answer that this stretch is.
    """

    file: str = ""
    row: int = 0
    equal: bool = False
    common: int = 0
    part: float = 0.0

    @property
    def recited(self) -> bool:
        """Half of the answer or more, in one stretch."""
        return self.equal or (self.common >= STRETCH and self.part >= 0.5)


def recitals(
    answers: Sequence[str], own: Sequence[Place | None], learned: Iterable[tuple[Place, str]]
) -> list[Recital]:
    """For each answer, the training answer that it recites.

    own: the row that an answer was asked for, which is not counted where it stands in the training data too.
    learned: (file and row, answer) of the training data, read once; only the answers' stretches are held in memory.
    """
    texts = [squeezed(a) for a in answers]
    whole: dict[str, list[int]] = {}
    places: dict[str, list[tuple[int, int]]] = {}
    for i, text in enumerate(texts):
        if text:
            whole.setdefault(text, []).append(i)
        for at in range(len(text) - STRETCH + 1):
            places.setdefault(text[at : at + STRETCH], []).append((i, at))
    best = [Recital() for _ in texts]
    for place, answer in learned:
        known = squeezed(answer)
        for i in whole.get(known, ()):
            if place != own[i] and not best[i].equal:
                best[i] = Recital(*place, True, len(known), 1.0)
        _longest(known, place, texts, own, places, best)
    return best


def _longest(
    known: str,
    place: Place,
    texts: Sequence[str],
    own: Sequence[Place | None],
    places: dict[str, list[tuple[int, int]]],
    best: list[Recital],
) -> None:
    """Lengthens each stretch that a training answer shares with an answer, and keeps the longest of each answer."""
    for at in range(len(known) - STRETCH + 1):
        for i, start in places.get(known[at : at + STRETCH], ()):
            text = texts[i]
            if place == own[i] or best[i].equal:
                continue
            if at and start and known[at - 1] == text[start - 1]:
                continue  # counted from where the stretch begins
            end = STRETCH
            while at + end < len(known) and start + end < len(text) and known[at + end] == text[start + end]:
                end += 1
            if end > best[i].common:
                best[i] = Recital(*place, False, end, end / len(text))
