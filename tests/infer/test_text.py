"""Stop texts: what is given out, wherever tokens and characters are cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitune.checkpoint.tokenizer import load_tokenizer
from minitune.infer import text as room
from minitune.infer.text import AnswerText


class Slices:
    """A stream whose token n is the n-th slice of a text."""

    def __init__(self, slices: list[str]):
        self.slices = slices

    def push(self, token: int) -> str:
        return self.slices[token]


def run(slices: list[str], stop: tuple[str, ...]) -> tuple[list[str], bool]:
    """What each push gave, and the flush; whether a stop text came."""
    answer = AnswerText.__new__(AnswerText)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "TextStream", lambda _: Slices(slices))
        answer.__init__(None, stop)  # type: ignore[misc,arg-type]
    out: list[str] = []
    for token in range(len(slices)):
        out.append(answer.push(token))
        if answer.stopped:
            return out, True
    return [*out, answer.flush()], answer.stopped


def expected(text: str, stop: tuple[str, ...]) -> str:
    """Character by character: the first stop text to be complete, of those the one that began first."""
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return text


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_cuts_change_nothing(data: Any) -> None:
    """Any text of three letters, any stop texts, any slices: the text up to the stop, and no more at any time."""
    text = data.draw(st.text("abい", max_size=24))
    stop = tuple(data.draw(st.lists(st.text("abい", min_size=1, max_size=5), max_size=3)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    slices = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    out, stopped = run(slices, stop)
    want = expected(text, stop)
    assert "".join(out) == want
    assert stopped == (want != text)


def test_only_what_may_become_a_stop_text_is_held_back() -> None:
    assert run(["a", "b", "c", "d", "\n", "U", "x", "\n", "User:", "y"], ("\nUser:",)) == (
        ["a", "b", "c", "d", "", "", "\nUx", "", ""],
        True,
    )
    assert run(["a\n"], ("\nUser:",)) == (["a", "\n"], False)
    assert run(["ab", "c"], ()) == (["ab", "c", ""], False)


def test_minicpm_characters_split_across_byte_tokens(golden: Callable[[str], Path]) -> None:
    """MiniCPM's own vocabulary: rare characters are three or four byte tokens; each comes whole, once, in order."""
    tokenizer = load_tokenizer(golden("tokenizer-minicpm"))
    text = "皇后𠮷野家的𨋢,🧑‍🚀 ok 龘"
    ids = tokenizer.encode(text, add_special_tokens=False)
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert sum(token.startswith("<0x") for token in tokens) >= 4  # some character is spread
    answer = AnswerText(tokenizer)
    pieces = [answer.push(i) for i in ids] + [answer.flush()]
    assert sum(map(bool, pieces)) > 5 and "" in pieces[:-1] and "\ufffd" not in "".join(pieces)
    assert "".join(pieces).strip() == text
    torn = ids[: 1 + next(i for i, token in enumerate(tokens) if token.startswith("<0x"))]  # cut inside a character
    answer = AnswerText(tokenizer)
    said = "".join([*map(answer.push, torn), answer.flush()])
    whole = tokenizer.decode(torn).rstrip("\ufffd")
    assert said == whole != tokenizer.decode(torn)


def test_a_stop_text_of_split_characters(golden: Callable[[str], Path]) -> None:
    """It ends in the middle of a token, and its own characters are spread over byte tokens."""
    tokenizer = load_tokenizer(golden("tokenizer-minicpm"))
    ids = tokenizer.encode("今天的天气𠮷野家不错", add_special_tokens=False)
    for stop, want in (("𠮷", "今天的天气"), ("气𠮷野", "今天的天"), ("的", "今天"), ("家不", "今天的天气𠮷野")):
        answer = AnswerText(tokenizer, (stop,))
        said = ""
        for token in ids:
            said += answer.push(token)
            if answer.stopped:
                break
        assert answer.stopped and said.strip() == want
