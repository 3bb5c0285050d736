"""From an answer's tokens to its text, up to the first stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from minitune.checkpoint.tokenizer import TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class AnswerText:
    """`push(token)` returns the text that is certain by now, `flush()` the rest.

    Bytes of a character that never became whole, since the length limit cut the answer there, are left out.
    A text that a stop text may begin with is held back until it is decided. The first stop text to be complete ends
    the answer (`stopped`), of several that end together the longest, wherever the borders of tokens lie.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()):
        self.stopped = False
        self._stream = TextStream(tokenizer)
        self._stop = tuple(stop)
        self._longest = max(map(len, stop), default=0)
        self._held = ""

    def push(self, token: int) -> str:
        return self._pass(self._stream.push(token))

    def flush(self) -> str:
        """Call it once, where no stop text ended the answer."""
        text, self._held = self._held, ""
        return text

    def _pass(self, text: str) -> str:
        if not self._stop or not text:
            return text
        held = self._held + text
        found = [(at + len(stop), at) for stop in self._stop if (at := held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return held[: min(found)[1]]
        keep = next((n for n in range(min(self._longest - 1, len(held)), 0, -1) if self._may_stop(held[-n:])), 0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def _may_stop(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self._stop)
