"""A tokenizer as GGUF's metadata holds it, from the tokenizer.json or the tokenizer.model that it was loaded from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitune.checkpoint.gguf_tokenizer import BYTE, CONTROL, PATTERNS, USER_DEFINED
from minitune.config import UserError

NORMAL, UNKNOWN, UNUSED = 1, 2, 5
NEVER = -1e6  # a score below every merge's
MEND = "use --format hf"


@dataclass
class Vocabulary:
    """`model` and `pre` are llama.cpp's names. scores: of sentencepiece's kind; merges: of byte-level BPE's."""

    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    space_prefix: bool | None = None
    note: str = ""

    def fit(self, rows: int, where: Path) -> None:
        """Fills up to the embedding's rows with unused tokens; UserError where there are more tokens than rows."""
        if len(self.tokens) > rows:
            raise UserError(f"{where}: has {len(self.tokens)} tokens, the model {rows} rows of embedding; {MEND}")
        for i in range(len(self.tokens), rows):
            self.tokens.append(f"[PAD{i}]")
            self.kinds.append(UNUSED)
            if self.scores is not None:
                self.scores.append(NEVER)


def read(home: Path, tokenizer: Any) -> Vocabulary:
    """The vocabulary of the tokenizer of `home`. UserError, one line, for a kind that llama.cpp does not know."""
    if (path := home / "tokenizer.json").is_file():
        return _from_json(path)
    return _from_sentencepiece(home / "tokenizer.model", tokenizer)


def _from_json(path: Path) -> Vocabulary:
    state = json.loads(path.read_text(encoding="utf-8"))
    model = state["model"]
    if model.get("type") != "BPE":
        raise UserError(f"{path}: a {model.get('type')} tokenizer has no form in GGUF here; {MEND}")
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    added = {token["id"]: token for token in state.get("added_tokens") or []}
    ids = {i: token for token, i in model["vocab"].items()} | {i: token["content"] for i, token in added.items()}
    tokens = [ids.get(i, f"[PAD{i}]") for i in range(max(ids) + 1)]
    if _is_byte_level(state):
        pre = _pre_tokenizer(state, path)
        kinds = [_kind(added.get(i), NORMAL if i in ids else UNUSED) for i in range(len(tokens))]
        return Vocabulary("gpt2", pre, tokens, kinds, merges=[" ".join(m) for m in merges])
    return _spaced(state, path, tokens, added, ["".join(m) for m in merges])


def _kind(added: dict[str, Any] | None, otherwise: int) -> int:
    if added is None:
        return otherwise
    return CONTROL if added["special"] else USER_DEFINED


def _parts(state: dict[str, Any], name: str, inner: str) -> list[dict[str, Any]]:
    part = state.get(name)
    return [] if part is None else part.get(inner, [part])


def _is_byte_level(state: dict[str, Any]) -> bool:
    return any(p["type"] == "ByteLevel" for p in _parts(state, "pre_tokenizer", "pretokenizers"))


def _pre_tokenizer(state: dict[str, Any], path: Path) -> str:
    """llama.cpp's name of a byte-level pre-tokenizer; one that is not known would cut texts elsewhere."""
    *first, last = _parts(state, "pre_tokenizer", "pretokenizers")
    shape = [
        p["type"] if p["type"] != "Split" else (p["pattern"].get("Regex"), p["behavior"], p["invert"]) for p in first
    ]
    whole = bool(state["model"].get("ignore_merges"))
    for name, pattern in PATTERNS.items():
        cut: list[Any] = [(pattern, "Isolated", False)] if pattern else []
        wanted = (["Digits"] if name == "smollm" else []) + cut
        digits = all(p.get("individual_digits", True) for p in first)
        plain = last["type"] == "ByteLevel" and not last["add_prefix_space"] and last["use_regex"] is not bool(pattern)
        if shape == wanted and digits and plain and whole == (name == "llama-bpe"):
            return name
    raise UserError(
        f"{path}: cuts texts in a way that is not known here by llama.cpp's name (known: {', '.join(PATTERNS)}); {MEND}"
    )


def _spaced(
    state: dict[str, Any], path: Path, tokens: list[str], added: dict[int, dict[str, Any]], made: list[str]
) -> Vocabulary:
    """sentencepiece's BPE, as Llama 2's tokenizer.json has it: merges in order become scores.

    A piece that no merge makes stays a normal one, though a tokenizer.model may call it user-defined: what was
    trained is what this file tokenises, and it does not take such pieces whole.
    """
    normalizers = [p["type"] for p in _parts(state, "normalizer", "normalizers")]
    pre = _parts(state, "pre_tokenizer", "pretokenizers")
    legacy = not pre and set(normalizers) <= {"Prepend", "Replace"} and "Replace" in normalizers
    metaspace = not normalizers and [p["type"] for p in pre] == ["Metaspace"] and not pre[0].get("split", True)
    if not (legacy or metaspace):
        raise UserError(f"{path}: a BPE that is neither byte-level nor sentencepiece's; {MEND}")
    prefix = "Prepend" in normalizers or (metaspace and pre[0].get("prepend_scheme") in ("first", "always"))
    rank: dict[str, int] = {}
    for i, piece in enumerate(made):
        rank.setdefault(piece, i)
    unknown = state["model"].get("unk_token")
    kinds, scores = [], []
    for i, token in enumerate(tokens):
        is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        kind = UNKNOWN if token == unknown else _kind(added.get(i), BYTE if is_byte else NORMAL)
        kinds.append(kind)
        scores.append(-float(rank[token]) if token in rank else NEVER if kind == NORMAL else 0.0)
    return Vocabulary("llama", "default", _unmarked(tokens, kinds), kinds, scores, space_prefix=prefix)


def _unmarked(tokens: list[str], kinds: list[int]) -> list[str]:
    """llama.cpp finds user-defined pieces in the text before its spaces become ▁."""
    return [t.replace("▁", " ") if k == USER_DEFINED else t for t, k in zip(tokens, kinds, strict=True)]


def _from_sentencepiece(path: Path, tokenizer: Any) -> Vocabulary:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())  # type: ignore[attr-defined]
    if proto.trainer_spec.model_type != 2:
        raise UserError(f"{path}: a sentencepiece model that is no BPE has no form in GGUF here; {MEND}")
    tokens, kinds = [p.piece for p in proto.pieces], [int(p.type) for p in proto.pieces]
    scores = [float(p.score) for p in proto.pieces]
    for i, token in sorted(tokenizer.added_tokens_decoder.items()):
        kind = CONTROL if token.special else USER_DEFINED
        while len(tokens) <= i:
            tokens.append(f"[PAD{len(tokens)}]")
            kinds.append(UNUSED)
            scores.append(NEVER)
        if kinds[i] != UNKNOWN:
            tokens[i], kinds[i] = token.content, kind
    normal = proto.normalizer_spec
    changed = bool(normal.precompiled_charsmap) or normal.remove_extra_whitespaces
    note = f"{path}: sentencepiece normalises a text first, llama.cpp does not" if changed else ""
    spaced = bool(normal.add_dummy_prefix)
    return Vocabulary("llama", "default", _unmarked(tokens, kinds), kinds, scores, space_prefix=spaced, note=note)
