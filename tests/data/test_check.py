"""data check: the real set's counts, each kind of finding on rows made for it, and none on clean rows that look odd."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from talker import write_tokenizer

from minitune import cli, load_tokenizer
from minitune.config import TemplateConfig, TrainConfig, UserError
from minitune.data import languages, records
from minitune.data.check import check
from minitune.data.findings import FIX_ALSO, KINDS, Finding
from minitune.data.report import Lengths, Report
from minitune.data.template import IGNORED, Template

MINICPM = TemplateConfig("minicpm")
GOOD = {"instruction": "今天天气怎么样，适合出门散步吗？", "output": "天气很好，出门走走吧。"}
CHATTER = "今天明天天气花草树木山水读书写字喝茶吃饭散步听雨看云做梦说话走路"


def sentence(rng: random.Random, least: int = 8, most: int = 30) -> str:
    return "".join(rng.choices(CHATTER, k=rng.randint(least, most))) + "。"


def plain_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    rng = random.Random(seed)
    return [{"instruction": sentence(rng), "output": sentence(rng)} for _ in range(count)]


def write(path: Path, rows: Sequence[Any]) -> Path:
    if path.suffix == ".jsonl":
        text = "".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in rows)
    else:
        text = json.dumps(rows, ensure_ascii=False)
    path.write_text(text, encoding="utf-8", newline="")
    return path


def checked(path: Path, **more: Any) -> Report:
    near = more.pop("near", "false")
    return check(TrainConfig(data=str(path), **more), near_duplicates=near)


def by_kind(report: Report) -> dict[str, Finding]:
    return {f.kind: f for f in report.findings}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    return load_tokenizer(write_tokenizer(tmp_path / "tokenizer", special=("<|im_start|>", "<|im_end|>")))


def test_the_real_data_set(shared: Path) -> None:
    """What shared/data/README.md counts, and the same counted here from the file itself."""
    path = shared / "data" / "huanhuan.json"
    report = checked(path, near="true")
    found = by_kind(report)
    assert not report.hurts and report.readable == 3729
    assert found["duplicates"].count == len(found["duplicates"].rows) == 112
    assert report.counts["different questions"] == 3491
    assert found["conflicts"].count == 50 and "“是。” has 30" in found["conflicts"].what()
    rows, answers = (each.summary() for each in report.lengths)
    assert rows["longest"] == 304 and round(answers["mean"]) == 27
    assert found["edges"].count == 1 and len(found["empty_field"].rows) == 3729
    assert found["empty_field"].what() == "`input` is empty in all 3,729 rows"
    assert set(found) == {"duplicates", "conflicts", "edges", "empty_field", "near"}

    data = json.loads(path.read_text(encoding="utf-8"))
    first: dict[tuple[str, str], int] = {}
    again = {}
    by_question: dict[str, set[str]] = defaultdict(set)
    for number, row in enumerate(data, 1):
        key = (row["instruction"].strip(), row["output"].strip())
        if first.setdefault(key, number) != number:
            again[number] = first[key]
        by_question[key[0]].add(key[1])
    assert dict(zip(found["duplicates"].rows, found["duplicates"].of, strict=True)) == again
    several = {q for q, said in by_question.items() if len(said) > 1}
    assert found["conflicts"].rows == [n for n, row in enumerate(data, 1) if row["instruction"].strip() in several]
    assert found["edges"].rows == [n for n, r in enumerate(data, 1) if any(v != v.strip() for v in r.values())]


def test_the_real_data_set_in_tokens(golden: Callable[[str], Path], shared: Path) -> None:
    """With MiniCPM's tokenizer: the rows of the template, one by one, as DESIGN.md counts them (its tokenizer.model)."""
    tokenizer = load_tokenizer(golden("tokenizer-minicpm"))
    path = shared / "data" / "huanhuan.json"
    config = TrainConfig(data=str(path), template=MINICPM)
    rows, answers = check(config, tokenizer, {}, "false").lengths
    assert rows.unit == answers.unit == "tokens"
    template = Template(tokenizer, MINICPM)
    encoded = [template.encode(c.messages) for c in records.load(path).conversations]
    assert rows.values.tolist() == [len(e.input_ids) for e in encoded]
    assert answers.values.tolist() == [e.supervised for e in encoded]
    assert abs(rows.summary()["total"] - 184335) < 5 and rows.summary()["longest"] == 224


# A change of a good row, the kind that it must be found as, and words that the finding or its example must have.
ODD_ROWS: list[tuple[dict[str, str], str, str]] = [
    ({"output": "今天天\ufffd很好"}, "lost_text", "U+FFFD"),
    ({"instruction": "锟斤拷锟斤拷锟斤拷是谁"}, "mojibake", "锟斤拷"),
    ({"output": "你好，世界".encode().decode("cp1252", "replace").replace("\ufffd", "\x81")}, "mojibake", "ä½"),
    ({"output": "你好，世界".encode().decode("latin-1")}, "mojibake", "ä½"),
    ({"output": "有个\x00字符"}, "control", "⟨U+0000⟩"),
    ({"output": "\x1b[31m红\x1b[0m"}, "control", "⟨U+001B⟩"),
    ({"instruction": "单独的\r回车"}, "control", "⟨U+000D⟩"),
    ({"instruction": "零宽\u200b空格"}, "invisible", "⟨U+200B⟩"),
    ({"output": "翻转\u202e过来"}, "invisible", "⟨U+202E⟩"),
    ({"output": "中\u200d文"}, "invisible", "⟨U+200D⟩"),
    ({"output": "藏\U000e0041着"}, "invisible", "⟨U+E0041⟩"),
    ({"output": "\ufeff开头"}, "invisible", "⟨U+FEFF⟩"),
    ({"instruction": "好的。<AI>可以<用户>你是谁"}, "markers", "<AI>: 1"),
    ({"output": "说完了</s>"}, "markers", "</s>"),
    ({"output": "说完了。<|im_end|>"}, "markers", "<|im_end|>"),
    ({"output": "[INST]好[/INST]"}, "markers", "[INST]"),
    ({"instruction": "什么是<|endoftext|>标记"}, "marker_text", "<|endoftext|>"),
    ({"output": "请用<｜end▁of▁sentence｜>来结束它"}, "marker_text", "end▁of"),
    ({"output": "This is an English answer to a question, oddly enough."}, "languages", "Chinese → Latin"),
    ({"output": "今日はとてもいい天気ですから、散歩に行きましょう。"}, "languages", "Chinese → Japanese"),
    ({"output": "오늘은 날씨가 아주 좋습니다. 산책을 갑시다."}, "languages", "Chinese → Korean"),
    ({"output": "這個問題我們還沒有答案，請過幾天再來問。"}, "traditional", "這個"),
    ({"output": GOOD["instruction"]}, "echo", "天气"),
    ({"output": GOOD["instruction"] + "很适合。"}, "echo", "天气"),
    ({"output": "一行\r\n两行"}, "line_ends", "一行"),
    ({"output": "  前后有空格 "}, "edges", "前后"),
    ({"output": "请打13987654320。"}, "personal", "mobile number: 1"),
    ({"instruction": "写信到 zhang.san@qq.com 可以吗"}, "personal", "e-mail address: 1"),
]


@pytest.mark.parametrize(
    ("change", "kind", "words"), ODD_ROWS, ids=[f"{k}-{i}" for i, (_, k, _) in enumerate(ODD_ROWS)]
)
def test_each_kind_is_found(tmp_path: Path, change: dict[str, str], kind: str, words: str) -> None:
    """Among good rows, the one that was changed is named, as this and nothing else, with its text and a mend."""
    rows: list[dict[str, str]] = [*plain_rows(20), GOOD | change]
    report = checked(write(tmp_path / "x.json", rows))
    found = by_kind(report)
    assert list(found) == [kind]
    finding = found[kind]
    assert list(finding.rows) == [21] and finding.examples[0][0] == 21 and finding.mend()
    assert words in finding.what() + finding.examples[0][1]
    assert report.hurts == (KINDS[kind].severity == "error")


CLEAN = [
    "👨‍👩‍👧‍👦 和 🏴󠁧󠁢󠁥󠁮󠁧󠁿 都是表情，❤️ 也是。",
    "مرحبا\u200f بك (١٢٣)",
    "क्\u200dष",
    "Ça a été créé à l'été: «é», naïve, façade, Ä Ö Ü ß.",
    "<b>粗体</b>，<a href='x'>链接</a>，a < b，[1] 参考，arr[i] = [0]",
    "时间戳1700000000000，订单号139876543201，圆周率3.14159265358979323846",
    "13912345678 是例子，user@example.com 也是，4111 1111 1111 1111 也是，git@github.com 也是",
    "身份证号 110105194912310021 的校验码是错的，卡号 6222021234567890123 也是",
    "什么是锟斤拷？",
    "line one\nline two\twith a tab",
    "```python\nprint('hello world, this is a test')\n```",
    "SELECT * FROM t WHERE id = 3;",
    "GPT-4、Llama 和 MiniCPM 都是大模型。",
]


@pytest.mark.parametrize("text", CLEAN)
def test_what_only_looks_odd_is_left_alone(tmp_path: Path, text: str) -> None:
    """Neither as a question nor as an answer is anything found in it, but that two of them are not Chinese."""
    rows = [*plain_rows(20), GOOD | {"output": text}, GOOD | {"instruction": text}]
    found = set(by_kind(checked(write(tmp_path / "x.json", rows))))
    assert found == ({"languages"} if text[0] in "مl" else set())


def test_languages_follow_the_norm(tmp_path: Path) -> None:
    """A file of translations is no finding; neither is one in English, in traditional Chinese, or of short answers."""
    english = "Please translate this sentence into the other language."
    for questions, answers in (
        ("请把这句话翻译成英文：", english),
        (english, "请把这句话翻译成英文，谢谢你。"),
        (english, english[7:]),
        ("請問這個問題應該怎麼回答？", "這個問題我們還沒有答案。"),
        ("你喜欢哪一个？选一个吧。", "OK"),
    ):
        rows = [{"instruction": f"{questions}{i}", "output": f"{answers} {i}"} for i in range(30)]
        assert checked(write(tmp_path / "x.json", rows)).findings == []
        assert checked(write(tmp_path / "x.json", [*rows, *plain_rows(60)])).findings == []


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("今天天气真好啊", "Chinese"),
        ("這個時候還沒有人來", "traditional Chinese"),
        ("我用 PyTorch 训练了一个 LoRA 模型", "Chinese"),
        ("The weather is very nice today", "Latin letters"),
        ("Il fait très beau aujourd'hui, n'est-ce pas", "Latin letters"),
        ("今日はいい天気ですね", "Japanese"),
        ("오늘은 날씨가 좋네요", "Korean"),
        ("Сегодня хорошая погода", "Cyrillic"),
        ("الطقس جميل اليوم", "Arabic"),
        ("x = [f(i) for i in range(10)]", ""),
        ("42", ""),
        ("嗯", ""),
        ("", ""),
    ],
)
def test_writing(text: str, name: str) -> None:
    assert languages.NAMES[languages.writing(text)] == name


WORDS = st.sampled_from(["甲", "乙", " 甲", "丙丙"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=14))
def test_copies_and_conflicts(tmp_path: Path, pairs: list[tuple[str, str]]) -> None:
    """Against dictionaries of stripped texts."""
    path = write(tmp_path / "x.json", [{"instruction": q, "output": a} for q, a in pairs])
    found = by_kind(checked(path))
    stripped = [(q.strip(), a.strip()) for q, a in pairs]
    again = [(i + 1, stripped.index(pair) + 1) for i, pair in enumerate(stripped) if stripped.index(pair) < i]
    finding = found.get("duplicates", Finding("duplicates", []))
    assert list(zip(finding.rows, finding.of, strict=True)) == again
    several = {q for q, n in Counter(q for q, _ in set(stripped)).items() if n > 1}
    conflict = found.get("conflicts", Finding("conflicts", []))
    assert conflict.count == len(several)
    assert list(conflict.rows) == [i + 1 for i, (q, _) in enumerate(stripped) if q in several]


def test_a_conversation_counts_up_to_its_last_answer(tmp_path: Path) -> None:
    """The same last question after other turns, or another system text, is another question."""

    def row(*texts: str, system: str = "") -> dict[str, Any]:
        turns = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]
        return {"messages": [*([{"role": "system", "content": system}] if system else []), *turns]}

    rows = [row("甲", "一", "乙", "二"), row("丙", "一", "乙", "三"), row("甲", "一", "乙", "四"), row("乙", "五"),
            row("乙", "六", system="说"), row("甲", "一", "乙", "二")]  # fmt: skip
    report = checked(write(tmp_path / "x.jsonl", rows))
    found = by_kind(report)
    assert found["conflicts"].count == 1 and list(found["conflicts"].rows) == [1, 3, 6]
    assert (list(found["duplicates"].rows), list(found["duplicates"].of)) == ([6], [1])
    assert report.counts["rows of several turns"] == 4 and report.counts["rows with a system text"] == 1
    assert report.counts["answers"] == 10 and report.unit == "line"


def test_too_long(tmp_path: Path, tokenizer: Any) -> None:
    """The tokens lost, the tail's text and the rows with nothing left, by the template's own rows."""
    rows = [*plain_rows(5), {"instruction": "短", "output": "很长的回答" * 30 + "尾巴"},
            {"instruction": "很长的问题" * 40, "output": "短"}, {"instruction": "短", "output": "很长" * 45}]  # fmt: skip
    path = write(tmp_path / "x.json", rows)
    template = Template(tokenizer, MINICPM)
    encoded = [template.encode(c.messages) for c in records.load(path).conversations]
    lengths = [len(e.input_ids) for e in encoded]
    most = 200
    for overlong, kind, hurts in (("cut", "cut", True), ("drop", "dropped", False), ("error", "refused", True)):
        config = TrainConfig(data=str(path), template=MINICPM, max_length=most, overlong=overlong)
        report = check(config, tokenizer, {}, "false")
        found = by_kind(report)
        over = [
            i + 1 for i, n in enumerate(lengths) if n > most and any(x != IGNORED for x in encoded[i].labels[1:most])
        ]
        assert list(found[kind].rows) == over and 6 in over and 7 not in over
        assert list(found["unlearnable"].rows) == [7]
        assert found[kind].examples[0][1].startswith(f"{lengths[5] - most:,} tokens lost: ")
        tail = tokenizer.decode(encoded[5].input_ids[most:], skip_special_tokens=True).lstrip("\ufffd")
        assert tail.endswith("尾巴") and found[kind].examples[0][1].split(": ")[1].rstrip("…") == tail[:60]
        if kind != "refused":
            assert f"{sum(lengths[i - 1] - most for i in over):,} tokens" in found[kind].what()
        assert f"--max_length {max(lengths)}" in found[kind].mend()
        assert KINDS[kind].severity == ("error" if hurts else "warning")
    whole = check(TrainConfig(data=str(path), template=MINICPM, max_length=max(lengths)), tokenizer, {}, "false")
    assert not {"cut", "unlearnable"} & set(by_kind(whole)) and not whole.hurts
    assert report.lengths[0].values.tolist() == lengths
    assert report.lengths[1].values.tolist() == [sum(x != IGNORED for x in e.labels) for e in encoded]


def test_answers_of_several_turns_are_counted_apart(tmp_path: Path, tokenizer: Any) -> None:
    """Each learned answer with its end; one that is not learned is none."""
    turns = [
        ("user", "一"),
        ("assistant", "二二"),
        ("user", "三"),
        ("assistant", "四四四四"),
        ("user", "五"),
        ("assistant", "六"),
    ]
    row = {"messages": [{"role": r, "content": c} | ({"weight": 0} if c == "四四四四" else {}) for r, c in turns]}
    path = write(tmp_path / "x.json", [row, row])
    report = check(TrainConfig(data=str(path), template=MINICPM), tokenizer, {}, "false")
    said = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in ("二二", "六")]
    assert report.lengths[1].values.tolist() == said * 2


def test_marks_of_another_template(tmp_path: Path, tokenizer: Any) -> None:
    """Under a model's own template <AI> opens no turn; the model's special tokens do hurt in an answer."""
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + m['content'] + '<|im_end|>' }}{% endfor %}"
    )
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
    rows = [*plain_rows(3), GOOD | {"instruction": "标记<AI>是什么"}, GOOD | {"output": "用<|im_end|>结束一轮对话"},
            GOOD | {"instruction": "用<|im_end|>吗"}]  # fmt: skip
    path = write(tmp_path / "x.json", rows)
    found = by_kind(check(TrainConfig(data=str(path)), tokenizer, {}, "false"))
    assert (list(found["markers"].rows), list(found["marker_text"].rows)) == ([5], [4, 6])
    found = by_kind(check(TrainConfig(data=str(path), template=MINICPM), tokenizer, {}, "false"))
    assert (list(found["markers"].rows), list(found["marker_text"].rows)) == ([4, 5], [6])


def test_leaked_rows(tmp_path: Path) -> None:
    """Held-out rows that are learned from: word for word, nearly, or only their question."""
    rows = plain_rows(40)
    rows[7]["output"] = "这是一个足够长的回答，" + rows[7]["output"] * 3
    apart = {"instruction": "别处的问题", "output": "别处的回答，和学的都不一样。" + sentence(random.Random(7), 60, 60)}
    held = [*plain_rows(3, seed=9), rows[4], rows[7] | {"output": rows[7]["output"][:-1] + "呀。"},
            rows[9] | {"output": "完全不同的另一种说法"}, apart, apart | {"output": apart["output"] + "啊"}]  # fmt: skip
    path, other = write(tmp_path / "x.json", rows), write(tmp_path / "held.jsonl", held)
    report = checked(path, eval_data=str(other), near="auto")
    found = by_kind(report)
    assert (list(found["leaked"].rows), list(found["leaked"].of)) == ([4], [5])
    assert (list(found["near_leaked"].rows), list(found["near_leaked"].of)) == ([5], [8])
    assert list(found["same_question"].rows) == [5, 6]
    assert report.hurts and found["leaked"].what("line").startswith("1 row of the held-out file is also learned from")
    assert "near" not in found and report.held and report.near == {8}


def test_rows_that_cannot_be_read(tmp_path: Path) -> None:
    """All of them, by what is wrong; the good ones are still looked at."""
    rows: list[Any] = [GOOD, {"instruction": "a", "outptu": "b"}, {"instruction": "a", "output": " "}, '{"instruction": "a',
                       {"instruction": "a", "output": 3}, {"messages": []}, {"instruction": "b", "outptu": "b"}, "[1]",
                       GOOD, "", {"instruction": "", "output": "b"}]  # fmt: skip
    report = checked(write(tmp_path / "x.jsonl", rows))
    faults = {(f.kind, f.words["problem"]): list(f.rows) for f in report.findings if f.kind in ("blank", "unreadable")}
    assert faults == {
        ("unreadable", "unknown key `outptu`"): [2, 7],
        ("blank", "`output` is empty"): [3],
        ("unreadable", "is not JSON: unterminated string"): [4],
        ("unreadable", "`output` is a number, not text"): [5],
        ("unreadable", "is written with `messages`, but line 1 with `instruction`, `output`"): [6],
        ("unreadable", "is a list, not an object"): [8],
        ("blank", "`instruction` (and `input`) is empty"): [11],
    }
    assert report.hurts and report.readable == 2 and list(by_kind(report)["duplicates"].rows) == [9]
    with pytest.raises(UserError, match="line 1: .*`output` is empty"):
        checked(write(tmp_path / "y.jsonl", [{"instruction": "a", "output": ""}]))


def test_kept_rows(tmp_path: Path, tokenizer: Any) -> None:
    """A second check takes the tokens of the first; rows of a file that training refuses are never kept."""
    kept = tmp_path / "kept"

    def run(path: Path) -> Report:
        return check(TrainConfig(data=str(path), template=MINICPM), tokenizer, {}, "false", kept=kept)

    path = write(tmp_path / "x.json", plain_rows(8))
    first, second = run(path).as_json(), run(path).as_json()
    assert first == second and len([p for p in kept.iterdir() if p.is_dir()]) == 1
    report = run(write(tmp_path / "y.json", [*plain_rows(8), {"instruction": "a", "output": ""}]))
    assert report.hurts and report.lengths[0].unit == "tokens" and len(report.lengths[0].values) == 8
    assert len([p for p in kept.iterdir() if p.is_dir()]) == 1


def test_memory_a_row(tmp_path: Path) -> None:
    """Some hundred bytes, whatever the texts' length."""
    peaks = []
    for count in (1000, 5000):
        path = write(tmp_path / "x.jsonl", [{**r, "output": r["output"] * 10} for r in plain_rows(count)])
        tracemalloc.start()
        checked(path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / 4000 < 250


@given(st.lists(st.integers(0, 3000), max_size=200), st.integers(1, 50))
def test_histogram(values: list[int], most: int) -> None:
    """Every length is in a bin, and in its own: only the last one takes what is longer."""
    import numpy as np

    edges, counts = Lengths("a row", "tokens", np.array(values, np.uint32)).histogram(most)
    assert sum(counts) == len(values) and len(edges) == len(counts) + 1 <= most + 1
    for low, high, count in list(zip(edges, edges[1:], counts, strict=False))[:-1]:
        assert count == sum(low <= v < high for v in values)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit codes 0, 1, 2; --json is one object that holds every row number; bad flags are one line."""

    def run(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(["data", "check", *map(str, argv)])
        said = capsys.readouterr()
        return code, said.out, said.err

    good = write(tmp_path / "good.json", plain_rows(10))
    code, out, err = run(good)
    assert (code, err) == (0, "") and out.rstrip().endswith("✓ nothing here would hurt")
    bad = write(tmp_path / "bad.json", [*plain_rows(10), *[GOOD | {"output": f"{i}\ufffd"} for i in range(40)]])
    code, out, err = run(bad, "--json")
    report = json.loads(out)
    assert (code, err) == (1, "") and report["hurts"] and report["rows"] == 50
    (lost,) = (f for f in report["findings"] if f["kind"] == "lost_text")
    assert lost["rows"] == list(range(11, 51)) and lost["severity"] == "error" and len(lost["examples"]) == 3
    assert sum(report["lengths"]["a row"]["histogram"]["counts"]) == 50
    for argv, words in (
        ([tmp_path / "none.json"], "no such file"),
        ([good, "--near", "maybe"], "auto, true or false"),
        ([good, "--fix_also", "near"], "--fix OUT"),
        ([good, "--fix_also", "nera", "--fix", tmp_path / "o.json"], "unknown 'nera'"),
        ([good, "--eval_data", tmp_path / "none.json"], "no such file"),
        ([good, "--html", tmp_path / "no" / "x.html"], "there is no folder"),
    ):
        code, out, err = run(*argv)
        assert (code, out) == (2, "") and words in err and err.count("\n") == 1
    assert set(FIX_ALSO) == {"near", "conflicts", "personal", "markers", "unreadable"}
