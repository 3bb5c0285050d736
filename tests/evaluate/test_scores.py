"""BLEU and ROUGE against the formulas written out, on Chinese split into characters."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from minitune.evaluate import scores

pytest.importorskip("sacrebleu", reason="BLEU needs sacrebleu (extra eval)")
pytest.importorskip("rouge_score", reason="ROUGE needs rouge-score (extra eval)")

ANSWERS = ["本宫今日身子不适，你先退下吧", "皇上驾到", "这孩子是本宫的，这孩子是本宫的", "x"]
WANTED = ["本宫今日身子不大舒服，你退下吧", "皇上驾到了", "这孩子不是本宫的", "娘娘吉祥"]


def grams(units: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(units[i : i + n]) for i in range(len(units) - n + 1))


def bleu(answers: list[list[str]], wanted: list[list[str]]) -> float:
    """Papineni et al. 2002 over a corpus, one reference."""
    logs = []
    for n in range(1, 5):
        right = total = 0
        for answer, reference in zip(answers, wanted, strict=True):
            have, known = grams(answer, n), grams(reference, n)
            right += sum(min(count, known[gram]) for gram, count in have.items())
            total += sum(have.values())
        logs.append(math.log(right / total))
    said, needed = sum(map(len, answers)), sum(map(len, wanted))
    brevity = 1.0 if said > needed else math.exp(1 - needed / said)
    return 100 * brevity * math.exp(sum(logs) / 4)


def f1(right: int, said: int, needed: int) -> float:
    return 200 * right / (said + needed) if right else 0.0


def rouge_n(answer: list[str], reference: list[str], n: int) -> float:
    have, known = grams(answer, n), grams(reference, n)
    return f1(sum((have & known).values()), sum(have.values()), sum(known.values()))


def rouge_l(answer: list[str], reference: list[str]) -> float:
    table = [[0] * (len(reference) + 1) for _ in range(len(answer) + 1)]
    for i, one in enumerate(answer):
        for j, other in enumerate(reference):
            table[i + 1][j + 1] = table[i][j] + 1 if one == other else max(table[i][j + 1], table[i + 1][j])
    return f1(table[-1][-1], len(answer), len(reference))


def test_chinese_by_the_formulas() -> None:
    found = scores.score(ANSWERS, WANTED)
    answers, wanted = [list(a) for a in ANSWERS], [list(w) for w in WANTED]
    pairs = list(zip(answers, wanted, strict=True))
    assert found.tokenizer == "zh" and "tok:zh" in found.signature
    assert found.bleu == pytest.approx(bleu(answers, wanted), abs=1e-6)
    assert found.rouge1 == pytest.approx(sum(rouge_n(*p, 1) for p in pairs) / 4)
    assert found.rouge2 == pytest.approx(sum(rouge_n(*p, 2) for p in pairs) / 4)
    assert found.rougeL == pytest.approx(sum(rouge_l(*p) for p in pairs) / 4)


def test_english_by_words() -> None:
    answers, wanted = ["The cat sat on the mat today"], ["the cat sat on a mat today"]
    found = scores.score(answers, wanted)
    words = [text.lower().split() for text in (answers[0], wanted[0])]
    assert found.tokenizer == "13a" and found.rougeL == pytest.approx(rouge_l(*words))
    assert scores.score(wanted, wanted).bleu == pytest.approx(100)


def test_mixed_text_keeps_latin_words() -> None:
    """A Latin word among Chinese characters is one unit: one of eight is wrong, not one of eleven."""
    found = scores.score(["我喜欢用Python写代码"], ["我喜欢用Rust写代码"])
    assert found.tokenizer == "zh" and found.rouge1 == pytest.approx(f1(7, 8, 8))


def test_what_is_chinese() -> None:
    assert scores.is_chinese(["你好 ok"]) and scores.is_chinese(["𠮷"])
    assert not scores.is_chinese(["hello 好"]) and not scores.is_chinese([""])
