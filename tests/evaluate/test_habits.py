"""Repetition, loops and recitals against definitions written out again."""

from __future__ import annotations

from difflib import SequenceMatcher

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitune.evaluate.habits import STRETCH, Recital, loops, recitals, repetition, squeezed


@pytest.mark.parametrize(
    ("ids", "share"),
    [([], 0), ([1, 2, 3], 0), ([1, 2, 3, 4, 5], 0), ([7] * 8, 4 / 5), ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5)],
)
def test_repetition(ids: list[int], share: float) -> None:
    """seq-rep-4 of Welleck et al.: 1 - unique 4-grams / 4-grams."""
    assert repetition(ids) == pytest.approx(share)


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([], False),
        (list(range(100)), False),
        ([5] * 11, False),
        ([5] * 12, True),
        ([1, 2, 3, *[5, 6] * 6], True),
        ([*[5, 6] * 6, 1], False),
        ([9, *[1, 2, 3, 4, 5, 6, 7]] * 3, True),
        ([9, *[1, 2, 3, 4, 5, 6, 7]] * 2, False),
        ([0, *[1, 2, 3, 4, 5] * 3, 1, 2], True),  # broken off inside a round
    ],
)
def test_loops(ids: list[int], said: bool) -> None:
    assert loops(ids) is said


def longest_by_definition(answer: str, known: str) -> int:
    found = SequenceMatcher(None, answer, known, autojunk=False).find_longest_match()
    return found.size if found.size >= STRETCH else 0


words = st.text("甲乙丙 ", max_size=40)


@given(st.lists(words, min_size=1, max_size=4), st.lists(words, max_size=6))
def test_longest_stretch_by_another_program(answers: list[str], learned: list[str]) -> None:
    """difflib finds stretches of the same length, and the same answers whole."""
    found = recitals(answers, [None] * len(answers), [(("f", i), a) for i, a in enumerate(learned, 1)])
    for answer, one in zip(answers, found, strict=True):
        text, known = squeezed(answer), [squeezed(a) for a in learned]
        assert one.equal == (text != "" and text in known)
        if not one.equal:
            longest = max((longest_by_definition(text, k) for k in known), default=0)
            assert one.common == longest
            if longest:
                assert one.part == pytest.approx(longest / len(text))
                assert longest_by_definition(text, known[one.row - 1]) == longest


def test_what_counts_as_recited() -> None:
    """Half of the answer in one stretch of at least twelve characters, or the whole of a short one."""
    known = "嘘都说许愿说破是不灵的可是我偏要说出来"
    learned = [(("f", 1), "是。"), (("f", 2), known), (("g", 2), "别的")]

    def one(answer: str, own: tuple[str, int] | None = None) -> Recital:
        return recitals([answer], [own], learned)[0]

    assert one("是。") == Recital("f", 1, True, 2, 1.0) and one("是。").recited
    assert one(known + "嗯").recited and one(known + "嗯").row == 2
    assert one(f"前面的话说得很长很长{known[:12]}后面也还有许多许多别的话要说呢").recited is False
    assert one(f"前面{known[:12]}后面").recited
    assert not one(known[:11]).recited, "eleven characters are no stretch"
    assert one(known[:6] + "\n " + known[6:]).equal, "white space hides nothing"
    assert one(known, own=("f", 2)) == Recital() and one(known, own=("g", 2)).equal, "its own row is not counted"
    assert one("").recited is False


def test_the_longest_is_kept() -> None:
    """Of several stretches, in one training answer or another, the longest counts."""
    a, b = "天地玄黄宇宙洪荒日月盈昃", "辰宿列张寒来暑往秋收冬藏闰余"
    (found,) = recitals([f"{a}，{b}"], [None], [(("f", 1), a), (("f", 2), f"{a}。{b}"), (("f", 3), b)])
    assert (found.row, found.common) == (2, 14)


def test_each_answer_has_its_own() -> None:
    """Answers are looked for together, found by themselves."""
    found = recitals(
        ["甲" * 30, "乙" * 14 + "丙丁", "什么"], [None, None, None], [(("f", 8), "甲" * 20), (("f", 9), "乙" * 14)]
    )
    assert [(r.row, r.common) for r in found] == [(8, 20), (9, 14), (0, 0)]
