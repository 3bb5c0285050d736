"""`response_format` through llguidance: which tokens keep the answer valid JSON, of a schema or of any object.

Chosen over xgrammar: no dependencies (xgrammar 0.2 brings a tensor library of its own), one wheel of 3 MB for every
Python, and vocabularies of byte fallback or byte level alike. 0.2 ms a token on average at MiniCPM's 122,753.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from minitune.checkpoint.stream import token_bytes
from minitune.config import UserError

if TYPE_CHECKING:
    from torch import Tensor

# A small model may write blanks without end: between tokens of JSON one, or a line break and an indentation.
BLANKS = r"( ?|\n {0,24})"
OPTIONS: Any = {"whitespace_flexible": True, "whitespace_pattern": BLANKS}


class Pieces:
    """A tokenizer.model's tokens as bytes, in the form that llguidance asks of a tokenizer that it can't read."""

    def __init__(self, tokenizer: Any, vocab: int, eos_id: int):
        spell = token_bytes(tokenizer)
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= {*range(len(tokenizer), vocab)}  # some models score more tokens than there are
        self.eos_token_id, self.bos_token_id = eos_id, None
        self.special_token_ids = sorted(special)
        self.tokens = [f"<|special_{i}|>".encode() if i in special else spell(i) for i in range(vocab)]
        self._ids = {data: i for i, data in enumerate(self.tokens) if i not in special}
        self._longest = max(map(len, self._ids))

    def __call__(self, data: bytes | str) -> list[int]:
        """The longest token first: sentencepiece itself would change blanks, and llguidance counts bytes."""
        data = data.encode() if isinstance(data, str) else data
        ids, at = [], 0
        while at < len(data):
            ends = range(min(len(data), at + self._longest), at, -1)
            end = next((end for end in ends if data[at:end] in self._ids), None)
            if end is None:
                at += 1
                continue
            ids.append(self._ids[data[at:end]])
            at = end
        return ids


class Grammars:
    """Grammars over one vocabulary. vocab: the model's scores; stop_ids: what may follow a whole text.

    Raises UserError where llguidance is not installed.
    """

    def __init__(self, tokenizer: Any, vocab: int, stop_ids: Sequence[int]):
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ImportError:
            raise UserError("response_format needs llguidance; pip install 'minitune[serve]'") from None
        backend = getattr(tokenizer, "backend_tokenizer", None)
        source = backend.to_str() if backend else TokenizerWrapper(Pieces(tokenizer, vocab, stop_ids[0]))
        self._tokenizer = LLTokenizer(source, n_vocab=vocab, eos_token=list(stop_ids))

    def json(self, schema: dict[str, Any] | bool | None = None) -> JsonGrammar:
        """A fresh grammar: of `schema`, or of any JSON object. Raises UserError for a schema that it can't be."""
        from llguidance import LLMatcher

        wanted = {"type": "object"} if schema is None else schema
        if not isinstance(wanted, dict):
            raise UserError("the JSON schema must be an object")
        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(wanted), overrides=OPTIONS)
        except ValueError as error:
            raise bad_schema(str(error)) from None
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise bad_schema(matcher.get_error())
        return JsonGrammar(matcher)


def bad_schema(reason: str) -> UserError:
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    return UserError(f"the JSON schema can't be followed: {lines[0] if lines else 'it is empty'}")


class JsonGrammar:
    """One answer's place in its grammar (`request.Grammar`)."""

    def __init__(self, matcher: Any):
        self._matcher = matcher

    def mask(self, bits: Tensor) -> None:
        """bits: int32 [ceil(V/32)] on the CPU, written over."""
        if not bits.is_contiguous() or bits.device.type != "cpu":
            raise ValueError("the bits must be contiguous and on the CPU")
        self._matcher.unsafe_compute_mask_ptr(bits.data_ptr(), bits.numel() * bits.element_size())
        self._raise_fault()

    def accept(self, token: int) -> bool:
        """Takes a drawn token; True: nothing can follow."""
        self._matcher.consume_token(token)
        self._raise_fault()
        return bool(self._matcher.is_stopped())

    def _raise_fault(self) -> None:
        if self._matcher.is_error():
            raise UserError(f"the JSON schema is too hard to follow: {self._matcher.get_error().splitlines()[0]}")
