"""Prompts and rows: the tutorial's ids, the official strings, trained = served, and where it learns to stop."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from talker import write_tokenizer
from tokenizers import Tokenizer

from minitune import UserError, load_tokenizer
from minitune.config import TemplateConfig
from minitune.data import dataset, records
from minitune.data.records import Message
from minitune.data.template import IGNORED, Encoded, Template, cut, is_minicpm

MINICPM = TemplateConfig("minicpm")
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[I] ' + m['content'] | trim + ' [/I]' }}"
    "{% elif m['role'] == 'system' %}{{ '[S] ' + m['content'] + ' [/S]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
OPEN = (  # closes no answer
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
FORGETS = (  # shows its newest answer's thoughts and no earlier one's
    "{% for m in messages %}{% if m['role'] == 'assistant' and not loop.last %}"
    "{{ m['content'].split('|')[-1] + eos_token }}{% else %}{{ '<' + m['role'] + '>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
SPECIAL = ("<|im_start|>", "<|im_end|>")


def talk(*texts: str, system: str = "") -> list[Message]:
    """Turns that alternate, a user's first."""
    turns = [Message("assistant" if i % 2 else "user", text, bool(i % 2)) for i, text in enumerate(texts)]
    return [*([Message("system", system)] if system else []), *turns]


CASES = [
    talk("hello", "hi"),
    talk("hello", "hi", system="You are a kettle."),
    talk("a", "b", "c", "d", "e", "f"),
    talk("a", "b", "c", "d", "e", "f", system=" 你是谁 "),
    talk("  a\n", " b ", "\tc ", "d\n\n", system="\nS "),
    talk("你好吗", "我是谁。", "今天?", "好!"),
    talk("<AI> in <用户>", "<用户> in <AI>", "x<AI>y", "z"),
    talk("1", "2", "3", "4", "5", "6", "7", "8", "9", "0"),
    talk("q" * 90, "w" * 70, "e", "r"),
    talk("", "an answer to nothing", "", "again"),
    talk("\U0001f375 é", "ü \U0001f600", "naïve", "日本"),
    talk("one\n\ntwo", "three\n\nfour", "five", "six", system="line\nline"),
    talk("<s></s><unk>", "a</s>b", "c</s>", "</s>"),
]


@pytest.fixture(scope="module")
def minicpm(golden: Callable[[str], Path]) -> Any:
    return load_tokenizer(golden("tokenizer-minicpm"))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The tiny tokenizer with chat templates of several kinds."""
    made = {}
    for name, jinja, eos in (
        ("chatml", CHATML, "<|im_end|>"),
        ("chatml, another eos", CHATML, "</s>"),
        ("llama", LLAMA, "</s>"),
        ("open", OPEN, "</s>"),
        ("forgets", FORGETS, "</s>"),
        ("none", None, "</s>"),
    ):
        extra = {"chat_template": jinja} if jinja else {}
        folder = tmp_path_factory.mktemp("tokenizer")
        made[name] = load_tokenizer(write_tokenizer(folder, SPECIAL, eos_token=eos, **extra))
    return made


@pytest.fixture(scope="module", params=["minicpm", "minicpm raw", "chatml", "chatml, another eos", "llama", "open"])
def template(request: pytest.FixtureRequest, tokenizers: dict[str, Any], minicpm: Any) -> Template:
    if request.param.startswith("minicpm"):
        plain = "raw" in request.param
        return Template(minicpm, TemplateConfig("minicpm", bos=not plain, strip=not plain))
    return Template(tokenizers[request.param], TemplateConfig("model"))


def test_the_tutorial_s_ids(golden: Callable[[str], Path], shared: Path, minicpm: Any) -> None:
    """`bos: false, strip: false` gives the tutorial's input_ids and labels on all 3,729 rows; ours differ as said."""
    path = shared / "data" / "huanhuan.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert len(rows) == 3729
    plain = Tokenizer.from_file(str(golden("tokenizer-minicpm") / "tokenizer.json"))
    prompts = plain.encode_batch([f"<用户>{r['instruction'] + r['input']}<AI>" for r in rows], add_special_tokens=False)
    answers = plain.encode_batch([r["output"] for r in rows], add_special_tokens=False)
    template = Template(minicpm, TemplateConfig("minicpm", bos=False, strip=False))
    loaded = records.load(path).conversations
    for prompt, answer, conversation in zip(prompts, answers, loaded, strict=True):
        row = template.encode(conversation.messages)
        assert row.input_ids == [*prompt.ids, *answer.ids, 2][:512]
        assert row.labels == [*[-100] * len(prompt.ids), *answer.ids, 2][:512]
    ours = Template(minicpm, MINICPM)
    encoded = [ours.encode(c.messages) for c in loaded]
    assert all(row.input_ids[0] == 1 and row.labels[0] == IGNORED for row in encoded)
    stripped = sum(r["instruction"] != r["instruction"].strip() or r["output"] != r["output"].strip() for r in rows)
    different = sum(
        row.input_ids[1:] != template.encode(c.messages).input_ids for row, c in zip(encoded, loaded, strict=True)
    )
    assert different == stripped == 1


def test_official_strings(golden: Callable[[str], Path], minicpm: Any) -> None:
    """An untuned MiniCPM is prompted with the strings caught from the official chat(), BOS before them."""
    plain = Tokenizer.from_file(str(golden("tokenizer-minicpm") / "tokenizer.json"))
    untuned = Template.recorded(minicpm, {"architectures": ["MiniCPMForCausalLM"]}, None)
    for case in json.loads(golden("chat-template.json").read_text(encoding="utf-8")):
        messages = [Message(m["role"], m["content"]) for m in case["messages"]]
        assert untuned.official_text(messages) == case["expected_prompt_string"]
        expected = plain.encode(case["expected_prompt_string"], add_special_tokens=False).ids
        assert untuned.prompt_ids(messages) == [1, *expected]
        # the tuned form has the same text, an EOS behind each answer
        jinja = Template(minicpm, MINICPM).chat_template()
        rendered = minicpm.apply_chat_template(case["messages"], chat_template=jinja, tokenize=False)
        assert rendered.replace("</s>", "") == "<s>" + case["expected_prompt_string"]
        assert rendered.count("</s>") == sum(m["role"] == "assistant" for m in case["messages"])


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_served_is_the_prefix_of_trained(template: Template, case: list[Message]) -> None:
    """Invariants 7 and 8: each prompt is a prefix of the row; what follows it is the answer, learned, closed by EOS."""
    row = template.encode(case)
    assert len(row.input_ids) == len(row.labels)
    assert all(label in (IGNORED, token) for token, label in zip(row.input_ids, row.labels, strict=True))
    learned = [False] * len(row.input_ids)
    for k, message in enumerate(case):
        if message.role != "user":
            continue
        prompt = template.prompt_ids(case[: k + 1])
        assert row.input_ids[: len(prompt)] == prompt
        with_answer = template.encode(case[: k + 2]).input_ids
        assert row.input_ids[: len(with_answer)] == with_answer
        assert with_answer[-1] in template.stop_ids
        assert with_answer.index(template.eos_id, len(prompt)) == len(with_answer) - 1 or "</s>" in case[k + 1].content
        learned[len(prompt) : len(with_answer)] = [True] * (len(with_answer) - len(prompt))
    assert [label != IGNORED for label in row.labels] == learned
    assert row.labels[-1] == template.eos_id


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(max_size=12), min_size=2, max_size=6), system=st.text(max_size=6))
def test_any_text(minicpm: Any, texts: list[str], system: str) -> None:
    """The same for text that nobody would write; each answer is learned from its first token to its EOS and no further."""
    texts = [t for t in texts if not any(0xD800 <= ord(c) < 0xE000 for c in t)]
    case = talk(*texts[: len(texts) // 2 * 2], system=system)
    if not any(m.role == "user" for m in case):
        return
    template = Template(minicpm, MINICPM)
    row = template.encode(case)
    for k, message in enumerate(case):
        if message.role == "user":
            prompt = template.prompt_ids(case[: k + 1])
            assert row.input_ids[: len(prompt)] == prompt and prompt.count(2) == sum(
                m.role == "assistant" for m in case[:k]
            )
    ends = [i for i, token in enumerate(row.input_ids) if token == 2]
    assert len(ends) == sum(m.role == "assistant" for m in case)
    assert all(row.labels[i] == 2 and row.labels[i + 1 : i + 2] in ([], [IGNORED]) for i in ends)


def test_a_cut_row_does_not_stop(minicpm: Any, tmp_path: Path) -> None:
    """A row that keeps its answer ends in a learned EOS; one that is cut, at any length, learns none, and is counted."""
    template = Template(minicpm, MINICPM)
    row = template.encode(talk("你是谁?", "我是一把铜壶。"))
    assert row.input_ids[-1] == row.labels[-1] == 2
    for length in range(1, len(row.input_ids)):
        part = cut(row, length)
        assert part == Encoded(row.input_ids[:length], row.labels[:length]) and 2 not in part.labels
    file = tmp_path / "rows.jsonl"
    answers = ["short", "long " * 40, "short too"]
    lines = [json.dumps({"instruction": "tell me", "output": a}) for a in answers]
    file.write_text("\n".join(lines), encoding="utf-8")
    data = dataset.load(str(file), template, 30)
    assert (data.cut, data.numbers, [r.labels[-1] == 2 for r in data.rows]) == ([2], [1, 2, 3], [True, False, True])
    assert dataset.load(str(file), template, 30, "drop").dropped == [2]
    with pytest.raises(UserError, match="row 2 has"):
        dataset.load(str(file), template, 30, "error")


@pytest.mark.parametrize("name", ["minicpm", "chatml", "llama", "open"])
def test_spelled_special_tokens_stay_text(tokenizers: dict[str, Any], minicpm: Any, name: str) -> None:
    """`</s>` and its like, typed by a user, end nothing: only the template itself writes special tokens."""
    own = name != "minicpm"
    template = Template(tokenizers[name] if own else minicpm, TemplateConfig("model" if own else "minicpm"))
    special = set(template.tokenizer.added_tokens_decoder) | {template.eos_id}
    typed = talk("a </s><s> b <|im_end|><|im_start|>c", "d </s><|im_end|> e", "f", system="g </s><|im_end|>")
    clean = talk("a b c", "d e", "f", system="g")
    count = {i: template.prompt_ids(clean).count(i) for i in special}
    assert {i: template.prompt_ids(typed).count(i) for i in special} == count
    text = template.tokenizer.decode(template.prompt_ids(typed))
    assert "a </s><s> b <|im_end|><|im_start|>c" in text and "d </s><|im_end|> e" in text


def test_a_template_that_rewrites_is_refused(tokenizers: dict[str, Any]) -> None:
    """One that shows an earlier answer otherwise than it was trained, once a conversation has such an answer."""
    template = Template(tokenizers["forgets"], TemplateConfig("model"))
    single = talk("a", "thought|b")
    assert template.encode(single).input_ids[-1] == template.eos_id
    with pytest.raises(UserError, match="rewrites earlier turns"):
        template.encode([*single, *talk("c", "thought|d")])
    with pytest.raises(UserError, match="rewrites earlier turns"):
        template.prompt_ids([*single, Message("user", "c")])


@pytest.mark.parametrize("name", ["chatml", "chatml, another eos", "llama"])
def test_the_model_s_own_template_is_its_own_rendering(tokenizers: dict[str, Any], name: str) -> None:
    """Rows are what `transformers` renders and tokenises, up to what stands behind the last end of turn."""
    tokenizer = tokenizers[name]
    template = Template(tokenizer, TemplateConfig("model"))
    for case in CASES[:-1]:
        plain = [{"role": m.role, "content": m.content} for m in case]
        text = tokenizer.apply_chat_template(plain, tokenize=False)
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = template.encode(case).input_ids
        assert whole[: len(ids)] == ids and len(whole) - len(ids) <= 1
        prompt = tokenizer.apply_chat_template(plain[:-1], tokenize=False, add_generation_prompt=True)
        assert tokenizer(prompt, add_special_tokens=False)["input_ids"] == template.prompt_ids(case[:-1])
    end = "</s>" if name == "llama" else "<|im_end|>"
    assert template.eos_id == tokenizer.convert_tokens_to_ids(end) and template.eos_id in template.stop_ids
    assert tokenizer.eos_token_id in template.stop_ids


def test_only_what_is_to_be_learned(template: Template) -> None:
    """An assistant turn that the data marks as not learned is context; the others keep their labels."""
    case = talk("a", "b", "c", "d")
    marked = [replace(m, learn=False) if m.content == "b" else m for m in case]
    whole, part = template.encode(case), template.encode(marked)
    assert part.input_ids == whole.input_ids
    start = len(template.prompt_ids(case[:3]))
    assert part.labels == [IGNORED] * start + whole.labels[start:] and whole.supervised > part.supervised > 0


def test_recorded(tokenizers: dict[str, Any], minicpm: Any, tmp_path: Path) -> None:
    """The first folder with a run.yaml decides; its template counts as tuned, whatever the checkpoint says."""
    run, base = tmp_path / "run", tmp_path / "base"
    run.mkdir()
    base.mkdir()
    hub = {"architectures": ["MiniCPMForCausalLM"]}
    assert not Template.recorded(minicpm, hub, run, base).tuned
    text = "model: x\nlora_r: 8\ntemplate:\n  name: minicpm\n  bos: false\n  strip: false\n  join: ' '\n"
    (base / "run.yaml").write_text(text, encoding="utf-8")
    found = Template.recorded(minicpm, hub, None, run, base)
    assert found.tuned and found.config == TemplateConfig("minicpm", bos=False, strip=False, join=" ")
    (run / "run.yaml").write_text("template:\n  name: model\n", encoding="utf-8")
    assert Template.recorded(tokenizers["chatml"], hub, run, base).config.name == "model"
    untuned = Template.recorded(tokenizers["chatml"], hub, None)
    assert untuned.config.name == "model" and untuned.prompt_ids(talk("a")) == found_prompt(tokenizers["chatml"])


def found_prompt(tokenizer: Any) -> list[int]:
    text = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def test_which_template(tokenizers: dict[str, Any]) -> None:
    """By the checkpoint's own chat template; where it has none, by its architecture; a model without either is told."""
    assert is_minicpm({"architectures": ["LlamaForCausalLM"]}, "{{ '<用户>' }}")
    assert is_minicpm({"architectures": ["MiniCPMForCausalLM"]}, None)
    assert not is_minicpm({"architectures": ["MiniCPMForCausalLM"]}, CHATML)
    assert not is_minicpm({"architectures": ["LlamaForCausalLM"]}, None) and not is_minicpm({}, None)
    with pytest.raises(UserError, match="no chat template of its own; give --template.name minicpm"):
        Template.choose(tokenizers["none"], TemplateConfig(), {"architectures": ["LlamaForCausalLM"]})


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("strip", [True, False])
def test_the_exported_jinja(minicpm: Any, golden: Callable[[str], Path], bos: bool, strip: bool) -> None:
    """Contract (c): rendered by another engine, the text of a row is the same and a first turn has equal ids."""
    template = Template(minicpm, TemplateConfig("minicpm", bos=bos, strip=strip))
    plain = Tokenizer.from_file(str(golden("tokenizer-minicpm") / "tokenizer.json"))
    jinja = template.chat_template()
    for case in CASES[:-1]:
        turns = [{"role": m.role, "content": m.content} for m in case]
        first = next(i for i, m in enumerate(case) if m.role == "user") + 1
        rendered = minicpm.apply_chat_template(turns[:first], chat_template=jinja, tokenize=False)
        assert plain.encode(rendered, add_special_tokens=False).ids == template.prompt_ids(case[:first])
        text = (lambda m: m.content.strip()) if strip else (lambda m: m.content)
        expected = "".join(
            f"<用户>{text(m)}<AI>" if m.role == "user" else text(m) + "</s>" * (m.role == "assistant") for m in case
        )
        assert minicpm.apply_chat_template(turns, chat_template=jinja, tokenize=False) == "<s>" * bos + expected


def test_a_prompt_ends_in_a_question(template: Template) -> None:
    """Anything else is refused in one line."""
    bad: Sequence[list[Message]] = ([], talk("a", "b"))
    for messages in bad:
        with pytest.raises(UserError, match="ends in a user's turn"):
            template.prompt_ids(messages)
