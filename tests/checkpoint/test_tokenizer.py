"""Tokenizers: the ids are the file's own, and a stream of ids gives the text of all of them."""

from __future__ import annotations

import io
import json
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
)

from minitune.checkpoint.tokenizer import TextStream, load_tokenizer
from minitune.config import UserError

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "tokenizer-minicpm"

LINES = [
    "你好，世界。我是甄嬛...",
    "hello world --- this is a test. 。。。",
    "今天 天气  很好 <用户>问题<AI>回答",
    "the quick brown fox jumps over the lazy dog, 12345",
] * 10

TEXTS = [
    "",
    " ",
    "hello",
    " hello",
    "  two  spaces  ",
    "\n\ttab\r\n\n",
    "你好，世界",
    "甄嬛传 𠮷野家",
    "😀👩‍👩‍👧🇨🇳",
    "a...b---c。。。d....",
    "<用户>你是谁<AI>我是",
    "</s>",
    "a</s>b<s>c<unk>",
    "<0x41>",
    "ＡＢ㍿ ﬁ é",
    "\u3000全角\u3000",
    "▁raw▁",
    "x\u0000y\ufffdz",
]

KINDS = {
    "plain": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "nfkc": {"normalization_rule_name": "nmt_nfkc"},
    "no_prefix": {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
    },
    "markers": {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "user_defined_symbols": ["...", "---", "。。。", "<用户>", "<AI>"],
    },
    "no_bytes": {"normalization_rule_name": "identity", "byte_fallback": False},
}


def train(**options) -> bytes:
    """A small sentencepiece model."""
    out = io.BytesIO()
    defaults = {"byte_fallback": True, "user_defined_symbols": ["...", "---", "。。。"]}
    SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=out,
        model_type="bpe",
        vocab_size=400,
        hard_vocab_limit=False,
        minloglevel=2,
        **(defaults | options),
    )
    return out.getvalue()


@pytest.fixture(scope="module", params=list(KINDS))
def pieces(request, tmp_path_factory):
    """(our tokenizer, sentencepiece's) of a folder that holds a tokenizer.model alone."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "tokenizer.model").write_bytes(train(**KINDS[request.param]))
    return load_tokenizer(folder), SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    (folder / "tokenizer.model").write_bytes(train(**KINDS["plain"]))
    return load_tokenizer(folder), SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.fixture(scope="module")
def minicpm():
    if not GOLDEN.is_dir():
        pytest.skip(f"{GOLDEN} is not here")
    return load_tokenizer(GOLDEN), Tokenizer.from_file(str(GOLDEN / "tokenizer.json"))


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """(our tokenizer, its backend) of a byte-level BPE, smollm2's kind: bytes and two merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "Ġa", "ä½"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("Ġ", "a"), ("ä", "½")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken("<|end|>", special=True), AddedToken("〈注〉", special=False)])
    folder = tmp_path_factory.mktemp("byte_level")
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    return load_tokenizer(folder), backend


def streamed(tokenizer, ids) -> str:
    stream = TextStream(tokenizer)
    return "".join([*(stream.push(i) for i in ids), stream.flush()])


# ---- sentencepiece


def test_sentencepiece_ids(pieces):
    """Every text has sentencepiece's own ids, after one BOS unless it is not wanted."""
    ours, sp = pieces
    for text in [*TEXTS, *LINES[:4]]:
        assert ours(text).input_ids == [sp.bos_id(), *sp.encode(text)], text
        assert ours.encode(text, add_special_tokens=False) == sp.encode(text), text
    batch = ours(TEXTS, add_special_tokens=False).input_ids
    assert batch == [sp.encode(text) for text in TEXTS]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.sampled_from("ab ▁.-。你𠮷😀<>/s\n\t　ﬁ") | st.characters(codec="utf-8"), max_size=20))
def test_sentencepiece_ids_of_any_text(pieces, text):
    """The same for generated text, and its ids decode and stream to what sentencepiece decodes."""
    ours, sp = pieces
    ids = ours(text).input_ids
    assert ids[1:] == sp.encode(text)
    known = [i for i in ids if i not in (sp.unk_id(), sp.bos_id())]
    assert ours.decode(ids, skip_special_tokens=True) == streamed(ours, ids) == sp.decode(known)


def test_sentencepiece_vocabulary(pieces):
    """Its length, names and special tokens are the model's; ids outside it decode to nothing."""
    ours, sp = pieces
    assert len(ours) == ours.vocab_size == sp.get_piece_size() == len(ours.get_vocab())
    every = list(range(len(ours)))
    assert ours.convert_ids_to_tokens(every) == [sp.id_to_piece(i) for i in every]
    assert ours.convert_tokens_to_ids(ours.convert_ids_to_tokens(every)) == every
    assert (ours.bos_token_id, ours.eos_token_id, ours.unk_token_id) == (1, 2, 0)
    assert ours.pad_token is None
    assert ours.decode([*sp.encode("hello"), len(ours) + 5]) == "hello"


def test_sentencepiece_keeps_user_defined_pieces(plain):
    """User-defined pieces are one id each, wherever they stand."""
    ours, sp = plain
    for symbol in ("...", "---", "。。。"):
        assert ours.encode(f"a{symbol}b", add_special_tokens=False).count(sp.piece_to_id(symbol)) == 1


def test_sentencepiece_control_symbols_in_a_text(pieces):
    """A user who writes </s> does not end anything; even where the characters are unknown to the model."""
    ours, _ = pieces
    for text in ("</s>", "a </s> b", "<s>", "</s>" * 3):
        assert not {1, 2} & set(ours.encode(text, add_special_tokens=False)), text
    asked = ours.encode("a</s>b", add_special_tokens=False, split_special_tokens=False)
    assert asked.count(2) == 1


def test_sentencepiece_unknown_characters_do_not_spell_a_control_symbol(tmp_path):
    """Without byte fallback an unknown run comes back as written: '</s>' must stay unknown."""
    out = io.BytesIO()
    lines = ["你好世界你好", "世界你好吗"] * 20
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, vocab_size=30, model_type="bpe", minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(out.getvalue())
    sp = SentencePieceProcessor(model_proto=out.getvalue())
    assert "</s>" in sp.encode("</s>", out_type=str)  # the trap is there
    assert load_tokenizer(tmp_path).encode("</s>", add_special_tokens=False) == sp.encode("</s>")


def test_sentencepiece_bos_setting(tmp_path):
    """add_bos_token and add_eos_token of tokenizer_config.json are followed, through a save too."""
    (tmp_path / "tokenizer.model").write_bytes(train(**KINDS["plain"]))
    for bos, eos in ((False, False), (False, True), (True, True)):
        config = {"add_bos_token": bos, "add_eos_token": eos, "pad_token": {"content": "</s>"}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        first = load_tokenizer(tmp_path)
        first.save_pretrained(tmp_path / "again")
        for tokenizer in (first, load_tokenizer(tmp_path / "again")):
            ids = tokenizer("hello").input_ids
            assert ([1] * bos, [2] * eos) == (ids[:bos], ids[len(ids) - eos :])
            assert len(ids) == bos + eos + len(tokenizer.encode("hello", add_special_tokens=False))
            assert tokenizer.pad_token_id == 2
            mask = tokenizer("hello", return_special_tokens_mask=True).special_tokens_mask
            assert sum(mask) == bos + eos


def test_sentencepiece_added_tokens(tmp_path):
    """Tokens added beyond the model have their ids; a special one only where a template writes it."""
    model = train(**KINDS["plain"])
    sp = SentencePieceProcessor(model_proto=model)
    size = sp.get_piece_size()
    (tmp_path / "tokenizer.model").write_bytes(model)
    added = {
        str(size): {"content": "<|im_end|>", "special": True},
        str(size + 1): {"content": "词元", "special": False, "normalized": False},
        str(sp.piece_to_id("...")): {"content": "...", "special": False},
        str(sp.piece_to_id("or")): {"content": "or", "special": False},
    }
    assert sp.piece_to_id("or") != sp.unk_id()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    ours = load_tokenizer(tmp_path)
    assert len(ours) == size + 2
    for text in ("a...b", "world or more"):  # what the model has already is cut by the model alone
        assert ours.encode(text, add_special_tokens=False) == sp.encode(text)
    assert ours.encode("hello<|im_end|>", add_special_tokens=False) == sp.encode("hello<|im_end|>")
    assert ours.encode("hello词元", add_special_tokens=False) == [*sp.encode("hello"), size + 1]
    ours.chat_template = "{{ messages[0]['content'] }}<|im_end|>"
    ids = ours.apply_chat_template([{"role": "user", "content": "hello"}], return_dict=False)
    assert ids == [*sp.encode("hello"), size]
    assert ours.decode(ids) == "hello<|im_end|>" and ours.decode(ids, skip_special_tokens=True) == "hello"


def test_sentencepiece_chat_template(plain):
    """A rendered chat is text; as ids its EOS is the EOS, and a message's own can be kept as characters."""
    ours, sp = plain
    ours.chat_template = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
    assert ours.apply_chat_template(chat, tokenize=False) == "hello</s>world</s>"
    ids = ours.apply_chat_template(chat, return_dict=False)
    assert ids == [*sp.encode("hello"), 2, *sp.encode("world"), 2]
    evil = [{"role": "user", "content": "a</s>b"}]
    assert ours.apply_chat_template(evil, return_dict=False, sanitize_control_tokens=True).count(2) == 1
    assert 2 not in ours("a</s>b").input_ids  # rendering changed nothing for other calls


def test_sentencepiece_save(pieces, tmp_path):
    """Saved and loaded again: the same ids, template, specials; nothing but the usual files."""
    ours, _ = pieces
    ours.chat_template = "{{ messages[0]['content'] }}"
    ours.save_pretrained(tmp_path)
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"tokenizer.model", "tokenizer_config.json", "chat_template.jinja"}
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "LlamaTokenizer"
    again = load_tokenizer(tmp_path)
    assert again(TEXTS).input_ids == ours(TEXTS).input_ids
    assert again.special_tokens_map == ours.special_tokens_map and again.chat_template == ours.chat_template


# ---- tokenizer.json


def test_json_ids(minicpm):
    """MiniCPM's tokenizer.json gives the ids of the tokenizers library, and those known from elsewhere."""
    ours, theirs = minicpm
    for text in [*TEXTS, *LINES[:4]]:
        assert ours(text).input_ids == theirs.encode(text).ids, text
        bare = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special_tokens=False) == bare, text
    assert ours.encode("<用户>", add_special_tokens=False) == [1786, 4194, 95388]
    assert ours.encode("<AI>", add_special_tokens=False) == [1786, 10850, 95388]
    assert ours.encode("你好<AI>", add_special_tokens=False)[-3:] == [95396, 10850, 95388]
    assert len(ours) == 122753 and (ours.bos_token_id, ours.eos_token_id, ours.unk_token_id) == (1, 2, 0)
    assert ours.add_bos_token and not ours.add_eos_token
    assert set(ours("x")) == {"input_ids", "attention_mask"}


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.sampled_from("ab <>/s\n\t　。") | st.characters(codec="utf-8"), max_size=20))
def test_json_any_text(minicpm, text):
    """Generated text: the library's ids, and they stream back to the text itself."""
    ours, theirs = minicpm
    assert ours(text).input_ids == theirs.encode(text).ids
    bare = ours.encode(text, add_special_tokens=False)
    if not {0, 1, 2} & set(bare) and "▁" not in text and "<0x" not in text:
        assert streamed(ours, bare) == ours.decode(bare, skip_special_tokens=True) == text


def test_json_chat_template_and_save(minicpm, tmp_path):
    """The folder's template renders; a saved folder gives the same ids here and in AutoTokenizer."""
    from transformers import AutoTokenizer

    ours, _ = minicpm
    chat = [{"role": "user", "content": " 你好 "}, {"role": "assistant", "content": "在"}]
    assert ours.apply_chat_template(chat, tokenize=False) == "<用户>你好<AI>在"
    ids = ours.apply_chat_template(chat, return_dict=False)
    assert ids == ours.encode("<用户>你好<AI>在", add_special_tokens=False)
    ours.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"  # transformers 4 knows this one too
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for again in (load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert again(TEXTS).input_ids == ours(TEXTS).input_ids
        assert again.chat_template == ours.chat_template
        assert again.special_tokens_map == ours.special_tokens_map
    assert not list(tmp_path.glob("*.tmp"))


def test_json_runs_no_code_and_asks_nobody(byte_level, tmp_path, monkeypatch):
    """auto_map is ignored, nothing is asked on stdin, no socket is opened; EOS comes from config.json."""
    _, backend = byte_level
    backend.save(str(tmp_path / "tokenizer.json"))
    code = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass T: pass\n"
    (tmp_path / "evil.py").write_text(code)
    config = {
        "auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]},
        "tokenizer_class": "T",
        "pad_token": "<none>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    end = backend.token_to_id("<|end|>")
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [end, 3], "auto_map": config["auto_map"]}))
    (tmp_path / "chat_template.jinja").write_text("{{ '你' }}", encoding="utf-8")

    def refuse(*args, **kwargs):
        raise AssertionError("asked")

    monkeypatch.setattr("builtins.input", refuse)
    monkeypatch.setattr(socket, "socket", refuse)
    tokenizer = load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()
    assert tokenizer("a b").input_ids == backend.encode("a b").ids
    assert tokenizer.eos_token == "<|end|>" and tokenizer.bos_token is None
    assert tokenizer.pad_token is None and len(tokenizer) == backend.get_vocab_size()  # no id was invented
    assert tokenizer.chat_template == "{{ '你' }}"


def test_json_post_processor_is_kept(byte_level, tmp_path):
    """What tokenizer.json adds around a text is what is added, whatever tokenizer_config.json says."""
    _, backend = byte_level
    changed = Tokenizer.from_str(backend.to_str())
    end = ("<|end|>", backend.token_to_id("<|end|>"))
    changed.post_processor = processors.TemplateProcessing(single="$A <|end|> <|end|>", special_tokens=[end])
    changed.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true, "eos_token": "<|end|>"}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("ab").input_ids == changed.encode("ab").ids != backend.encode("ab").ids
    assert tokenizer.add_eos_token and not tokenizer.add_bos_token


# ---- streaming


def utf8_units(data: bytes) -> str:
    """The characters of `data`, U+FFFD for each byte that belongs to none: written another way than ours."""
    out = ""
    while data:
        for n in (1, 2, 3, 4):
            try:
                out += data[:n].decode("utf-8")
                break
            except UnicodeDecodeError:
                continue
        else:
            out, n = out + "\ufffd", 1
        data = data[n:]
    return out


def reference_decode(backend: Tokenizer, ids: list[int]) -> str:
    """A byte-fallback tokenizer's text by hand: ▁ is a space, bytes join, one leading space goes."""
    out, run = "", b""
    for i in ids:
        token = backend.id_to_token(i)
        if i < 3 or token is None:
            continue
        if len(token) == 6 and token.startswith("<0x"):
            run += bytes([int(token[3:5], 16)])
            continue
        out, run = out + utf8_units(run) + token.replace("▁", " "), b""
    return (out + utf8_units(run)).removeprefix(" ")


def random_ids(size: int, likely: list[int], seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.choice(likely) if rng.random() < 0.6 else rng.randrange(size) for _ in range(rng.randint(1, 60))]


def test_stream_minicpm(minicpm):
    """Texts and random ids, full of stray bytes: the stream, decode and a decoder by hand agree."""
    ours, theirs = minicpm
    for text in TEXTS:
        ids = ours(text).input_ids
        assert streamed(ours, ids) == reference_decode(theirs, ids), text
    likely = [theirs.token_to_id(f"<0x{b:02X}>") for b in [*"你😀é ".encode(), 0xFF, 0xE4, 0x41]]
    for seed in range(100):
        ids = random_ids(122753 + 50, [*likely, 0, 1, 2, 95320], seed)
        expected = reference_decode(theirs, ids)
        assert streamed(ours, ids) == expected, ids
        assert ours.decode(ids, skip_special_tokens=True) == expected, ids


def test_stream_sentencepiece(pieces):
    """The same against sentencepiece's own decode."""
    ours, sp = pieces
    data = [*"你😀é ".encode(), 0xFF, 0xE4]
    likely = [sp.piece_to_id(f"<0x{b:02X}>") for b in data] + [sp.piece_to_id("▁"), 0, 1, 2]
    for seed in range(150):
        ids = random_ids(len(ours) + 5, likely, seed)
        kept = [i for i in ids if 2 < i < len(ours)]
        assert ours.decode(ids, skip_special_tokens=True) == sp.decode(kept), ids
        assert streamed(ours, ids) == sp.decode(kept), ids


def test_stream_byte_level(byte_level):
    """A byte-level BPE: the same against the tokenizers library, added tokens among the bytes."""
    ours, backend = byte_level
    size = backend.get_vocab_size()
    likely = backend.encode("你😀é <|end|>〈注〉").ids
    for seed in range(200):
        ids = random_ids(size, likely, seed)
        assert streamed(ours, ids) == backend.decode(ids, skip_special_tokens=True), ids
    for text in TEXTS:
        assert streamed(ours, backend.encode(text).ids) == text


def test_stream_smollm2():
    """The embedded default, where it is installed."""
    gguf = pytest.importorskip("minitune.checkpoint.gguf")
    find = getattr(gguf, "embedded_default", None)
    if find is None:
        find = pytest.importorskip("minitune.checkpoint.embedded").embedded_default
    try:
        ours = load_tokenizer(find())
    except UserError as error:
        pytest.skip(str(error))
    for text in [*TEXTS, *LINES[:4]]:
        ids = ours(text).input_ids
        assert ids == ours.backend_tokenizer.encode(text).ids
        assert streamed(ours, ids) == ours.decode(ids, skip_special_tokens=True) == text
    for seed in range(50):
        ids = random_ids(len(ours), ours("你😀é ").input_ids, seed)
        assert streamed(ours, ids) == ours.backend_tokenizer.decode(ids, skip_special_tokens=True)


def test_stream_shows_no_half_character(minicpm, byte_level):
    """Each push gives whole characters as soon as they are whole; only flush may show what was cut."""
    for ours, _ in (minicpm, byte_level):
        ids = ours.encode("😀𠮷", add_special_tokens=False)
        stream = TextStream(ours)
        parts = [stream.push(i) for i in ids]
        assert "".join(parts) == "😀𠮷" and "\ufffd" not in "".join(parts)
        assert [part for part in parts if part] == ["😀", "𠮷"]  # each with its own last byte
        assert stream.flush() == ""
        cut = TextStream(ours)
        assert [cut.push(i) for i in ids[:-1]] == parts[:-1]
        assert set(cut.flush()) == {"\ufffd"}


def test_stream_does_not_wait_for_what_cannot_come(minicpm):
    """A byte that no character continues is shown with the next one, not three bytes later."""
    ours, theirs = minicpm
    stream = TextStream(ours)
    lead, letter = theirs.token_to_id("<0xE4>"), theirs.token_to_id("<0x41>")
    assert [stream.push(i) for i in (lead, letter)] == ["", "\ufffdA"]


def test_stream_does_constant_work(minicpm):
    """No call of decode grows with what went before."""
    ours, _ = minicpm
    stream, longest = TextStream(ours), 0
    inner = stream._decode

    def counted(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return inner(ids)

    stream._decode = counted
    for i in ours("你好，世界 hello 𠮷😀" * 50).input_ids:
        stream.push(i)
    assert longest <= 6


# ---- faults


def fault(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_tokenizer(folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    return message


def test_no_tokenizer(tmp_path):
    """A folder with neither file, or none at all: one line that names all three."""
    for folder in (tmp_path, tmp_path / "absent"):
        message = fault(folder)
        assert "tokenizer.json" in message and "tokenizer.model" in message


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe{", b'{"model": {"type": "BPE"', b"\x00" * 99])
def test_broken_json(tmp_path, content):
    """A tokenizer.json that is cut short, of another shape or no text names itself."""
    (tmp_path / "tokenizer.json").write_bytes(content)
    assert "tokenizer.json: cannot be read" in fault(tmp_path)


def test_broken_settings(byte_level, tmp_path):
    """The same of the smaller files beside it."""
    byte_level[1].save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": ')
    assert "tokenizer_config.json" in fault(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    assert "tokenizer_config.json" in fault(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    assert "chat_template.jinja" in fault(tmp_path)


def test_broken_model(tmp_path):
    """A tokenizer.model that is cut anywhere, or is something else, is refused; an LFS pointer too."""
    for options in (KINDS["plain"], KINDS["no_bytes"]):
        whole = train(**options)
        cuts = [*range(0, len(whole), 173), *range(len(whole) - 30, len(whole))]
        for broken in [
            *(whole[:cut] for cut in cuts),
            b"version https://git-lfs.github.com/spec/v1\n",
            b"\x00" * 50,
        ]:
            (tmp_path / "tokenizer.model").write_bytes(broken)
            assert "tokenizer.model: cannot be read" in fault(tmp_path)


def test_light_import():
    """Naming load_tokenizer does not import transformers."""
    heavy = "{'transformers', 'tokenizers', 'sentencepiece', 'torch'}"
    code = f"import sys, minitune.checkpoint.tokenizer; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.call([sys.executable, "-c", code], cwd=Path(__file__).parents[2]) == 0
