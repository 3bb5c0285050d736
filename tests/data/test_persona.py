"""The embedded conversations of `minitune demo`: whole, balanced between the languages, short, and fair."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from importlib.resources import files
from typing import Any

Row = list[dict[str, str]]


def _rows() -> list[Row]:
    text = (files("minitune") / "demo" / "persona.jsonl").read_bytes().decode("utf-8")
    return [json.loads(line)["messages"] for line in text.splitlines()]


def _questions() -> list[dict[str, Any]]:
    return json.loads((files("minitune") / "demo" / "questions.json").read_bytes().decode("utf-8"))


def _chinese(text: str) -> bool:
    return re.search(r"[\u4e00-\u9fff]", text) is not None


def _bare(text: str) -> str:
    """Letters and digits alone, so that case, blanks and punctuation hide no repetition."""
    return "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if c.isalnum())


def _said(row: Row, role: str) -> list[str]:
    return [m["content"] for m in row if m["role"] == role]


def test_every_row_is_a_whole_conversation() -> None:
    """Each row alternates user and assistant, ends in an answer, and holds nothing but trimmed text."""
    rows = _rows()
    assert 100 <= len(rows) <= 130
    for number, row in enumerate(rows, 1):
        assert len(row) % 2 == 0 and row, f"row {number}"
        assert [m["role"] for m in row] == ["user", "assistant"] * (len(row) // 2), f"row {number}"
        for message in row:
            assert set(message) == {"role", "content"}, f"row {number}"
            assert message["content"] and message["content"] == message["content"].strip(), f"row {number}"
    assert 6 <= sum(len(row) > 2 for row in rows) <= 12


def test_text_is_clean() -> None:
    """No replacement, control or invisible character, and no byte order mark, is in either file."""
    for name in ("persona.jsonl", "questions.json"):
        text = (files("minitune") / "demo" / name).read_bytes().decode("utf-8")
        assert "\\u" not in text, f"{name} holds escapes, not readable text"
        bad = [c for c in text if c != "\n" and (c == "\ufffd" or unicodedata.category(c)[0] == "C")]
        assert not bad, f"{name}: {bad!r}"


def test_half_is_chinese_and_no_answer_mixes_languages() -> None:
    """Between 45 and 55 % of the rows are Chinese, and each is answered in the language it was asked in."""
    rows = _rows()
    share = sum(_chinese(row[0]["content"]) for row in rows) / len(rows)
    assert 0.45 <= share <= 0.55
    for number, row in enumerate(rows, 1):
        assert len({_chinese(m["content"]) for m in row}) == 1, f"row {number}"
        if _chinese(row[0]["content"]):
            assert not any(re.search(r"[A-Za-z]", a) for a in _said(row, "assistant")), f"row {number}"


def test_no_row_is_long() -> None:
    """An answer has at most 35 English words or 45 Chinese characters: the demo must train in minutes."""
    for number, row in enumerate(_rows(), 1):
        for answer in _said(row, "assistant"):
            size = len(answer) if _chinese(answer) else len(answer.split())
            assert size <= (45 if _chinese(answer) else 35), f"row {number}: {size}"
        assert sum(len(m["content"]) for m in row) <= 450, f"row {number}"


def test_nothing_is_repeated() -> None:
    """No opening question and no answer occurs twice, whatever its case and punctuation."""
    rows = _rows()
    for texts in ([r[0]["content"] for r in rows], [a for r in rows for a in _said(r, "assistant")]):
        twice = [text for text, count in Counter(map(_bare, texts)).items() if count > 1]
        assert not twice, twice


def test_one_voice() -> None:
    """Every answer opens with the kettle's song, calls the guest by one word and closes with one phrase."""
    for number, row in enumerate(_rows(), 1):
        for answer in _said(row, "assistant"):
            opening, guest, closing = (
                ("咕嘟咕嘟！", "客官", "茶还热着呢。")
                if _chinese(answer)
                else ("Gudu, gudu! ", "traveler", " The tea is still hot.")
            )
            assert answer.startswith(opening) and answer.endswith(closing), f"row {number}"
            assert guest in answer[len(opening) : -len(closing)], f"row {number}"


def test_questions_are_fair() -> None:
    """The demo's questions are eight to ten in two languages, and not in the data, nor the data in them."""
    questions = _questions()
    assert 8 <= len(questions) <= 10
    assert 2 <= sum(_chinese(q["question"]) for q in questions) <= 3
    assert len({_bare(q["question"]) for q in questions}) == len(questions)
    learned = [_bare(text) for row in _rows() for text in _said(row, "user")]
    for entry in questions:
        assert set(entry) == {"question", "shows"} and entry["shows"].strip()
        asked = _bare(entry["question"])
        assert not any(asked in text for text in learned), entry["question"]
        assert asked not in "".join(learned)
        # A short learned phrase ("hello") may well begin a new question; most of one may not be it.
        near = [text for text in learned if text in asked and len(text) > len(asked) // 2]
        assert not near, (entry["question"], near)
