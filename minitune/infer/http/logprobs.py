"""Log-probabilities in OpenAI's two forms, for the tokens of the text that was given out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from minitune.infer.request import Piece, TokenLogprob

LOWEST = -9999.0  # JSON has no infinity; other servers write this


class Aligned:
    """Hands a token's log-probability over with the text it belongs to.

    The engine tells a token at once and its text when no stop text can begin in it; what then turns out to be the
    stop text is no part of the answer, and neither are its tokens.
    """

    def __init__(self, spell: Callable[[int], bytes], stops: bool):
        self._spell, self._stops = spell, stops
        self._given = self._told = 0  # bytes of the text, bytes of the tokens
        self._waiting: list[TokenLogprob] = []
        self._begun = False

    def take(self, pieces: Sequence[Piece], last: bool = False, stopped: bool = False) -> list[TokenLogprob]:
        """The tokens to tell by now; last: nothing follows, stopped: it ended by a stop text or token."""
        for piece in pieces:
            self._waiting += piece.logprobs
            self._given += len(piece.text.encode())
            if piece.text and not self._begun:  # sentencepiece drops the first token's space
                self._begun = True
                first = self._spell(self._waiting[0].token) if self._waiting else b""
                if first.startswith(b" ") and not piece.text.startswith(" "):
                    self._given += 1
        if not self._stops or (last and not stopped):
            out, self._waiting = self._waiting, []
            return out
        count = 0
        for entry in self._waiting:
            if self._told >= self._given:
                break
            self._told += len(self._spell(entry.token))
            count += 1
        out, self._waiting = self._waiting[:count], self._waiting[count:]
        return out


def token_text(data: bytes) -> str:
    """A token as a string; one that is only part of a character is spelled as OpenAI does: bytes:\\xe7."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def finite(logprob: float) -> float:
    return max(float(logprob), LOWEST)  # also of -inf


def chat_form(entries: Sequence[TokenLogprob], spell: Callable[[int], bytes]) -> dict[str, Any]:
    def one(token: int, logprob: float) -> dict[str, Any]:
        data = spell(token)
        return {"token": token_text(data), "logprob": finite(logprob), "bytes": list(data)}

    content = [
        {**one(e.token, e.logprob), "top_logprobs": [one(token, value) for token, value in e.top]} for e in entries
    ]
    return {"content": content, "refusal": None}


def completion_form(entries: Sequence[TokenLogprob], spell: Callable[[int], bytes], offset: int) -> dict[str, Any]:
    """offset: characters of the answer before these tokens."""
    tokens = [spell(e.token) for e in entries]
    offsets, done = [], b""
    for data in tokens:
        offsets.append(offset + len(done.decode("utf-8", "ignore")))
        done += data
    return {
        "tokens": [token_text(data) for data in tokens],
        "token_logprobs": [finite(e.logprob) for e in entries],
        "top_logprobs": [{token_text(spell(t)): finite(v) for t, v in e.top} for e in entries],
        "text_offset": offsets,
    }
