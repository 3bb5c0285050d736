"""Rows encoded many at once are the rows of `Template.encode`, id for id; a file's rows are fitted as single rows are."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from talker import write_tokenizer
from test_template import CHATML, FORGETS, LLAMA, OPEN, SPECIAL, talk
from tokenizers import AddedToken, Tokenizer, pre_tokenizers

from minitune import UserError, load_tokenizer
from minitune.config import TemplateConfig
from minitune.data import bulk, dataset, records
from minitune.data.records import Conversation, Message
from minitune.data.template import IGNORED, Template, cut

QUICK = settings(
    max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def minicpm(golden: Callable[[str], Path]) -> Any:
    return load_tokenizer(golden("tokenizer-minicpm"))


@pytest.fixture(scope="module")
def smollm2() -> Any:
    pytest.importorskip("gguf", reason="smollm2 needs gguf")
    from minitune.checkpoint.embedded import embedded_default

    return load_tokenizer(embedded_default())


@pytest.fixture(scope="module")
def real(shared: Path) -> list[Conversation]:
    return records.load(shared / "data" / "huanhuan.json").conversations


def same(conversations: list[Conversation], template: Template, most: int = 1 << 30) -> None:
    """Bulk rows are single rows, whole and cut."""
    rows = bulk.encode(conversations, template)  # first: a call of the tokenizer sets it
    wanted = [template.encode(c.messages) for c in conversations]
    assert rows.numbers.tolist() == [c.row for c in conversations]
    assert list(rows) == wanted
    assert list(rows.cut(most)) == [cut(row, most) for row in wanted]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("strip", [True, False])
def test_the_real_rows_with_minicpm_s_tokenizer(real: list[Conversation], minicpm: Any, bos: bool, strip: bool) -> None:
    """All 3,729, with each setting, whole and cut at 40."""
    assert len(real) == 3729
    same(real, Template(minicpm, TemplateConfig("minicpm", bos=bos, strip=strip)), 40)


@pytest.mark.parametrize("name", ["model", "minicpm"])
def test_the_real_rows_with_smollm2_s_tokenizer(real: list[Conversation], smollm2: Any, name: str) -> None:
    """All 3,729, in its own chat template and in ours."""
    template = Template(smollm2, TemplateConfig(name))  # type: ignore[arg-type]
    assert bulk.Texts(template).separable == (name == "model")
    same(real, template, 60)


def made(folder: Path, chat: str, eos: str = "</s>") -> Any:
    return load_tokenizer(write_tokenizer(folder, SPECIAL, eos_token=eos, chat_template=chat))


@pytest.fixture(scope="module", params=["minicpm", "minicpm raw", "smollm2", "chatml", "llama", "open"])
def template(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, minicpm: Any) -> Template:
    name = request.param
    if name.startswith("minicpm"):
        return Template(minicpm, TemplateConfig("minicpm", bos="raw" not in name, strip="raw" not in name))
    if name == "smollm2":
        return Template(request.getfixturevalue("smollm2"), TemplateConfig("model"))
    chat = {"chatml": CHATML, "llama": LLAMA, "open": OPEN}[name]
    tokenizer = made(tmp_path_factory.mktemp("tokenizer"), chat, "<|im_end|>" if name == "chatml" else "</s>")
    return Template(tokenizer, TemplateConfig("model"))


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["</s>", "a <|im_end|> b", "<用户>x<AI>", " ", "", "你好", "<|im_start|>system\n", "  two\n\n", "<s>", "\U0010f000"]
)


@QUICK
@given(
    rows=st.lists(
        st.tuples(st.lists(st.tuples(texts, texts, st.booleans()), min_size=1, max_size=3), texts),
        min_size=1,
        max_size=6,
    ),
    most=st.integers(1, 60),
    batch=st.sampled_from([1, 2, 1024]),
    remembered=st.sampled_from([0, 20, 10**6]),
)
def test_any_conversations(
    template: Template,
    monkeypatch: pytest.MonkeyPatch,
    rows: list[tuple[list[tuple[str, str, bool]], str]],
    most: int,
    batch: int,
    remembered: int,
) -> None:
    """Whatever is said in them, spelled special tokens included, in batches of any size, texts coming again or not;
    a row that keeps its end learns EOS there, one that is cut never learns it (invariant 8)."""
    monkeypatch.setattr(bulk, "ROWS", batch)
    monkeypatch.setattr(bulk, "REMEMBERED", remembered)
    conversations = []
    for number, (turns, system) in enumerate(rows, 5):
        said = [Message("system", system)] if system.strip() else []
        for asked, told, learn in turns:
            said += [Message("user", asked), Message("assistant", told, learn)]
        conversations.append(Conversation(tuple(said), "x", number))
    same(conversations, template, most)
    whole = bulk.encode(conversations, template)
    for row, short, (turns, _) in zip(whole, whole.cut(most), rows, strict=True):
        assert (row.labels[-1] == template.eos_id) == turns[-1][2]
        ends = [i for i, label in enumerate(row.labels) if label == template.eos_id]
        assert [i for i, label in enumerate(short.labels) if label == template.eos_id] == [i for i in ends if i < most]


@pytest.mark.parametrize("what", ["truncation", "padding", "spelled tokens"])
def test_what_a_tokenizer_is_set_to_is_not_asked(tmp_path: Path, what: str) -> None:
    """A tokenizer.json may carry truncation and padding from where it was made; another call may have set it."""
    tokenizer = made(tmp_path, CHATML)
    backend = tokenizer.backend_tokenizer
    if what == "truncation":
        backend.enable_truncation(5)
    elif what == "padding":
        backend.enable_padding(length=9)
    else:
        backend.encode_special_tokens = False
    rows = [Conversation(tuple(talk("a longer question </s>", "b <|im_end|>")), "x", 1)]
    for name in ("model", "minicpm"):
        same(rows, Template(tokenizer, TemplateConfig(name)))  # type: ignore[arg-type]


def test_a_text_that_comes_again_is_encoded_once(smollm2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system text beside every question costs its tokens once, also in the checkpoint's own template."""
    asked: list[str] = []
    plain = bulk.Texts.encode

    def counted(self: bulk.Texts, texts: Any) -> Any:
        asked.extend(text for text, _ in texts)
        return plain(self, texts)

    monkeypatch.setattr(bulk.Texts, "encode", counted)
    monkeypatch.setattr(bulk, "ROWS", 16)
    rows = [Conversation(tuple(talk(f"question {i}", "yes", system="Be a kettle. " * 50)), "x", i) for i in range(400)]
    bulk.encode(rows, Template(smollm2, TemplateConfig("model")))
    system = [text for text in asked if "kettle" in text]
    assert 1 <= len(system) <= bulk.AHEAD + 1 + bulk.THREADS  # batches that were on their way when it came first
    assert len([text for text in asked if "question" in text]) == 400


@pytest.mark.parametrize("kind", ["first", "always", "white space", "overlap", "plain added"])
def test_which_tokenizers_texts_may_be_cut_at_special_tokens(tmp_path: Path, kind: str) -> None:
    """Where ids depend on what stands beside a special token the text goes in whole; either way they are the same."""
    folder = write_tokenizer(tmp_path, SPECIAL, eos_token="</s>", chat_template=CHATML)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if kind in ("first", "always"):
        backend.normalizer = None  # type: ignore[assignment]
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme=kind)])  # type: ignore[assignment]
    elif kind == "white space":
        backend.add_special_tokens([AddedToken("<|im_end|>", rstrip=True, normalized=False, special=True)])
    elif kind == "overlap":
        backend.add_tokens([AddedToken("system<|im", normalized=False)])
    else:
        backend.add_tokens([AddedToken("<think>", normalized=False)])
    backend.save(str(folder / "tokenizer.json"))
    template = Template(load_tokenizer(folder), TemplateConfig("model"))
    assert bulk.Texts(template).separable == (kind in ("always", "plain added"))
    rows = [Conversation(tuple(talk(f"你好 {i} <think>", "system", " a  ", "b", system="S")), "x", i) for i in range(3)]
    same(rows, template, 30)


def test_a_sentencepiece_tokenizer(tmp_path: Path) -> None:
    """One that is not fast goes text by text, to the same ids."""
    sentencepiece = pytest.importorskip("sentencepiece")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(f"hello world {i} 你好 世界 tell me more" for i in range(200)), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "tokenizer"), vocab_size=320, model_type="bpe",
        byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    template = Template(load_tokenizer(tmp_path), TemplateConfig("minicpm"))
    assert not template.tokenizer.is_fast
    same([Conversation(tuple(talk("hello 你好", " world</s> ", "", "x", system="tell")), "x", 1)], template, 9)


# A file's rows


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@QUICK
@given(
    words=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=8),
    most=st.integers(1, 70),
    overlong=st.sampled_from(["cut", "drop", "error"]),
)
def test_rows_are_fitted(minicpm: Any, tmp_path: Path, words: list[tuple[int, int]], most: int, overlong: str) -> None:
    """Against a loop over single rows: what is kept, cut, dropped, can't be learned from, refused."""
    template = Template(minicpm, TemplateConfig("minicpm"))
    rows = [{"instruction": "问 " * a, "output": "答 " * b} for a, b in words]
    file = write(tmp_path / "x.jsonl", rows)
    kept, numbers, was_cut, dropped, nothing, refused = [], [], [], [], [], 0
    for number, conversation in enumerate(records.load(file).conversations, 1):
        row = template.encode(conversation.messages)
        long = len(row.input_ids) > most
        refused = refused or (number if long else 0)
        row = cut(row, most)
        if long and overlong == "drop":
            dropped.append(number)
        elif all(label == IGNORED for label in row.labels[1:]):
            nothing.append(number)
        else:
            kept.append(row)
            numbers.append(number)
            was_cut += [number] if long else []
    if overlong == "error" and refused:
        with pytest.raises(UserError, match=rf"row {refused} has \d+ tokens, --max_length is {most};"):
            dataset.load(file, template, most, overlong)
    elif not kept:
        with pytest.raises(UserError, match="no row has anything to learn"):
            dataset.load(file, template, most, overlong)
    else:
        data = dataset.load(file, template, most, overlong)
        assert list(data.rows) == kept and data.numbers == numbers == data.rows.numbers.tolist()
        assert (data.cut, data.dropped, data.unlearnable) == (was_cut, dropped, nothing)
        assert data.supervised == sum(r.supervised for r in kept) and data.tokens == sum(len(r.labels) for r in kept)


def test_the_fault_that_stands_first_is_said(minicpm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `records.load` says it, with the rows behind it counted, however the file goes on."""
    monkeypatch.setattr(bulk, "ROWS", 2)
    template = Template(minicpm, TemplateConfig("minicpm"))
    good, bad = {"instruction": "q", "output": "a"}, {"instruction": "q", "output": " "}
    for rows in ([good] * 5 + [bad] + [good] * 9 + [bad], [bad, good], [good, bad, "text"]):
        file = write(tmp_path / "x.jsonl", rows)
        with pytest.raises(UserError) as wanted:
            records.load(file)
        with pytest.raises(UserError) as got:
            dataset.load(file, template, 50)
        assert str(got.value) == str(wanted.value)
    for name, text in (
        ("none.jsonl", " \n"),
        ("broken.jsonl", json.dumps(good) + "\n{"),
        ("both.jsonl", json.dumps(bad) + "\n{"),
        ("x.txt", "hello"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError) as wanted:
            records.load(tmp_path / name)
        with pytest.raises(UserError) as got:
            dataset.load(str(tmp_path / name), template, 50)
        assert str(got.value) == str(wanted.value)
    with pytest.raises(UserError, match="no such file"):
        dataset.load(str(tmp_path / "absent.json"), template, 50)


def test_a_row_that_the_template_can_t_encode(tmp_path: Path) -> None:
    """Is named with its file and number, when what shows progress has ended."""
    ended = []

    def watch(what: str, fraction: Callable[[], float], source: Any) -> Any:
        try:
            yield from source
        finally:
            ended.append((what, fraction()))

    template = Template(made(tmp_path / "model", FORGETS), TemplateConfig("model"))
    turns = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b|c"), ("user", "d"))]
    rows = [{"messages": turns[:2]}, {"messages": [*turns, {"role": "assistant", "content": "e|f"}]}]
    file = write(tmp_path / "x.jsonl", rows)
    with pytest.raises(UserError) as caught:
        dataset.load(file, template, 99, watch=watch)
    assert ended and ended[0][0] == "reading x.jsonl" and ended[0][1] > 0
    assert str(caught.value).startswith(f"{file}: row 2: the checkpoint's chat template rewrites earlier turns")


def test_a_split_is_seeded_and_keeps_numbers(minicpm: Any, tmp_path: Path) -> None:
    """The rows of torch's own permutation, both parts in the file's order."""
    import torch

    rows = [{"instruction": f"q{i}", "output": f"a{i}"} for i in range(20)]
    data = dataset.load(write(tmp_path / "x.jsonl", rows), Template(minicpm, TemplateConfig("minicpm")), 50)
    learn, held = dataset.split(data, 0.2, 7)
    chosen = sorted(torch.randperm(20, generator=torch.Generator().manual_seed(7)).tolist()[:4])
    assert held.numbers.tolist() == [i + 1 for i in chosen]
    assert list(held) == [data.rows[i] for i in chosen]
    assert sorted([*learn.numbers.tolist(), *held.numbers.tolist()]) == list(range(1, 21))
    assert learn.numbers.tolist() == sorted(learn.numbers.tolist())


CHILD = """
import json, re, sys
from minitune import load_tokenizer
from minitune.config import TemplateConfig
from minitune.data import bulk, dataset
from minitune.data.template import Template
bulk.REMEMBERED, bulk.ROWS = 100_000, 64  # what does not grow with the file is small
template = Template(load_tokenizer(sys.argv[1]), TemplateConfig("minicpm"))
for file in sys.argv[2:]:
    data = dataset.load(file, template, 512)
    peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]
    print(json.dumps((len(data.rows), data.tokens, int(peak) * 1024)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_many_rows(golden: Callable[[str], Path], tmp_path: Path) -> None:
    """A process' peak grows by the arrays (five bytes a token, some numbers a row) and little else: with 20,000 rows
    it has all that does not grow, 40,000 more show what does. Rows as lists would be 3 KB each."""
    files = []
    for count in (20_000, 60_000):
        rows = [{"instruction": f"第{i}个问题 word " * 2, "output": f"answer 回答 {i} " * 2} for i in range(count)]
        files.append(write(tmp_path / f"{count}.jsonl", rows))
    command = [sys.executable, "-c", CHILD, str(golden("tokenizer-minicpm")), *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    (few, _, before), (many, tokens, after) = (json.loads(line) for line in done.stdout.splitlines())
    assert (few, many) == (20_000, 60_000)
    assert (after - before) / (many - few) < 5 * tokens / many + 480, (after - before, tokens)
