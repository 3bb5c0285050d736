"""Text from a stream of token ids, each character as soon as it is whole."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextStream:
    """Text from ids as they come: `push(id)` returns what is certain by now, `flush()` the rest.

    All that is returned, joined, equals `tokenizer.decode(ids, skip_special_tokens=True)` of a tokenizer that
    `load_tokenizer` made. A character whose bytes are spread over several tokens waits for its last one, so
    that `push` returns U+FFFD only for bytes that no later token can mend; bytes still incomplete at the end
    become U+FFFD in `flush`, as they do in `decode`. Constant time a token; at most three bytes wait.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # A tokenizer of ours whose decode is mended by this class offers the one beneath.
        plain: Any = getattr(tokenizer, "plain_decode", None)
        stock: Any = partial(tokenizer.decode, skip_special_tokens=True)
        self._decode: Callable[[list[int]], str] = plain or stock
        self._skipped = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._waiting: list[tuple[int, int]] = []  # (id, byte) of a character that is not whole yet
        self._head: list[int] = []  # the ids so far while there is no text: the start strips a space
        self._started = False
        self._texts: dict[tuple[int, ...], str] = {}
        self._utf8: Any = None
        kinds = _decoder_kinds(tokenizer)
        self._strips_once = bool(kinds)
        if kinds == ["ByteLevel"]:
            self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        else:
            self._anchor = self._find_anchor()
            self._anchor_length = len(self._decode(self._anchor))

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; often the token's own, "" while a character is incomplete."""
        token_id = int(token_id)
        if token_id in self._skipped or not 0 <= token_id < len(self._tokenizer):
            return ""
        if self._utf8 is not None:
            return self._utf8.decode(_byte_level(self._token(token_id)))
        byte = self._byte(token_id)
        if byte is not None:
            self._waiting.append((token_id, byte))
            return self._drain(last=False)
        return self._drain(last=True) + self._text([token_id])

    def flush(self) -> str:
        """What still waits; call it once, after the last `push`."""
        return self._utf8.decode(b"", True) if self._utf8 is not None else self._drain(last=True)

    def _token(self, token_id: int) -> str:
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        return token if isinstance(token, str) else ""

    def _byte(self, token_id: int) -> int | None:
        token = self._token(token_id)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return int(token[3:5], 16)
        return None

    def _drain(self, last: bool) -> str:
        """Characters out of the waiting bytes; a byte that belongs to none is decoded by itself (U+FFFD)."""
        out = []
        while self._waiting:
            data = bytes(byte for _, byte in self._waiting)
            need = _sequence_length(data[0])
            if len(data) < need and not last and all(0x80 <= byte < 0xC0 for byte in data[1:]):
                break
            take = need if _is_character(data[:need]) else 1
            out.append(self._text([i for i, _ in self._waiting[:take]]))
            del self._waiting[:take]
        return "".join(out)

    def _text(self, unit: list[int]) -> str:
        """The text of one token or one character's bytes; the first in a text loses its leading space."""
        after = self._after(unit)
        if self._started:
            return after
        self._head += unit
        text = self._decode(self._head)
        # sentencepiece may strip several pieces, until there is text; a tokenizer.json only the first.
        self._started = bool(text or (after and self._strips_once))
        return text

    def _after(self, unit: list[int]) -> str:
        key = tuple(unit)
        if key not in self._texts:
            self._texts[key] = self._decode(self._anchor + unit)[self._anchor_length :]
        return self._texts[key]

    def _find_anchor(self) -> list[int]:
        """A token to decode after, so that what follows is not taken for the start of the text."""
        for i in reversed(range(len(self._tokenizer))):
            if i not in self._skipped and self._byte(i) is None:
                text = self._decode([i])
                if text.strip() == text != "" and "\ufffd" not in text:
                    return [i]
        return []


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], bytes]:
    """id -> the bytes that the token stands for, inside a text; a special token's are its name's."""
    byte_level = _decoder_kinds(tokenizer) == ["ByteLevel"]

    def spell(token_id: int) -> bytes:
        token = tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(token, str):
            return b""
        if byte_level:
            return _byte_level(token)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode("utf-8", "replace")

    return spell


def _decoder_kinds(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The decoders of a tokenizer.json by name; [] of a tokenizer that has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return []
    state = json.loads(backend.decoder.__getstate__())
    return [part["type"] for part in state.get("decoders", [state])]


def _sequence_length(lead: int) -> int:
    """The bytes of a UTF-8 character that begins with `lead`; 1 where none does."""
    if 0xC2 <= lead <= 0xDF:
        return 2
    if 0xE0 <= lead <= 0xEF:
        return 3
    return 4 if 0xF0 <= lead <= 0xF4 else 1


def _is_character(data: bytes) -> bool:
    try:
        return len(data.decode("utf-8")) == 1
    except UnicodeDecodeError:
        return False


@cache
def _byte_of() -> dict[str, int]:
    """GPT-2's alphabet: a printable byte is its own character, the others follow from U+0100 in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


def _byte_level(token: str) -> bytes:
    """The bytes of a byte-level token; an added token that is not written in the alphabet is its own text."""
    table = _byte_of()
    if all(char in table for char in token):
        return bytes(table[char] for char in token)
    return token.encode("utf-8")
