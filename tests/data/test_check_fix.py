"""data check --fix: what is safe is mended and checks clean, the rest is as it was, and the log tells the difference."""

from __future__ import annotations

import csv
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minitune import cli
from minitune.config import TrainConfig, UserError
from minitune.data import mend
from minitune.data.check import check
from minitune.data.findings import KINDS
from minitune.data.records import load

CHATTER = "今天明天气花草树木山水读书写字喝茶吃饭散步听雨看云做梦说话走路"
SAFE = {"blank", "lost_text", "control", "invisible", "duplicates", "leaked", "line_ends", "edges"}


def good(count: int = 12) -> list[tuple[str, str]]:
    rng = random.Random(1)
    return [
        ("".join(rng.choices(CHATTER, k=12)) + "？", "".join(rng.choices(CHATTER, k=20)) + "。") for _ in range(count)
    ]


# (question, answer, the answer as it is mended; None: the row is dropped)
BROKEN: list[tuple[str, str, str | None]] = [
    ("问一", "有个\x00字\x07符", "有个字符"),
    ("问二", "\x1b[31m红\x1b[0m色", "红色"),
    ("问三", "一行\r\n两行\r三行\x0b四行", "一行\n两行\n三行\n四行"),
    ("问四", "零\u200b宽\u202e字\ufeff符", "零宽字符"),
    ("问五", "  两边有空 \n\n", "两边有空"),
    ("问六", "丢了\ufffd的字", None),
    ("问七", " \n ", None),
    ("问八", "\u200b", None),
    ("问九", "重复的\u200b回答", "重复的回答"),
    ("问九", "重复的回答", None),
]


def row_of(form: str, question: str, answer: str) -> dict[str, Any]:
    extra = {"id": 7, "tags": ["a", None]}
    if form == "alpaca":
        return {"instruction": question, "input": "", "output": answer} | extra
    if form == "history":
        return {"instruction": question, "output": answer, "history": [["你\u200b好", "好"]]} | extra
    if form == "messages":
        turns = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        return extra | {"messages": turns}
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]} | extra


def write(path: Path, rows: list[dict[str, Any]], layout: str) -> Path:
    """`rows` as `layout` says: json (an indent, one line or a row a line), jsonl, csv (separator, mark)."""
    if layout == "jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    elif layout.startswith("csv"):
        out = io.StringIO(newline="")
        writer = csv.writer(out, delimiter=layout[3])
        writer.writerow(rows[0])
        for row in rows:
            writer.writerow([v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in row.values()])
        text = "\ufeff" + out.getvalue()
    else:
        text = json.dumps(rows, ensure_ascii=False, indent={"flat": None, "2": 2, "tab": "\t"}[layout[5:]])
    path.write_text(text, encoding="utf-8", newline="")
    return path


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(["data", "check", *map(str, argv)])
    said = capsys.readouterr()
    return code, said.out, said.err


def log_of(path: Path) -> list[dict[str, Any]]:
    text = Path(f"{path}.log.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("layout", ["json-2", "json-tab", "json-flat", "jsonl", "csv,", "csv;", "csv\t"])
@pytest.mark.parametrize("form", ["alpaca", "history", "messages", "sharegpt"])
def test_a_mended_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str, form: str) -> None:
    """Every kind of file and form: exit 1 becomes 0, the order stays, other keys and good rows stay as they were."""
    suffix = layout.partition("-")[0][:5].rstrip(",;\t")
    pairs = [(q, a, a) for q, a in good()]
    mixed: list[tuple[str, str, str | None]] = []
    for i, broken in enumerate(BROKEN):
        mixed += [pairs[i], broken]
    mixed += [pairs[0][:2] + (None,), *pairs[len(BROKEN) :]]
    source = write(tmp_path / f"x.{suffix}", [row_of(form, q, a) for q, a, _ in mixed], layout)
    before = source.read_bytes()
    out = tmp_path / f"数据.{suffix}"
    assert run(capsys, source)[0] == 1
    code, said, err = run(capsys, source, "--fix", out)
    assert (code, err) == (1, "") and f"{out}: {sum(m is not None for *_, m in mixed)} rows" in said
    assert source.read_bytes() == before
    assert run(capsys, out)[0] == 0
    expected = [row_of(form, q, m) for q, _, m in mixed if m is not None]
    for row in expected:
        if form == "history":
            row["history"] = [["你好", "好"]]
    if suffix == "csv":
        text = out.read_text(encoding="utf-8")
        assert text.startswith("\ufeff")
        cells = list(csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline=""), delimiter=layout[3]))
        assert cells[0] == list(expected[0])
        kept = [
            [v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in row.values()] for row in expected
        ]
        assert cells[1:] == kept
    elif suffix == "jsonl":
        assert [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] == expected
    else:
        text = out.read_text(encoding="utf-8")
        assert json.loads(text) == expected
        if layout != "json-flat":
            assert text == json.dumps(expected, ensure_ascii=False, indent={"2": 2, "tab": "\t"}[layout[5:]]) + "\n"
    dropped = [entry for entry in log_of(out) if entry["what"].startswith("dropped")]
    unit = "line" if suffix == "jsonl" else "row"
    assert [entry[unit] for entry in dropped] == [i for i, (*_, m) in enumerate(mixed, 1) if m is None]
    assert all(entry["after"] is None and entry["before"] for entry in dropped)
    changed = [entry for entry in log_of(out) if entry["after"] is not None]
    assert all(entry["at"] and entry["before"] != entry["after"] for entry in changed)
    assert {e["after"] for e in changed} >= {m for _, a, m in BROKEN if m and m != a}


TEXTS = st.text(
    st.sampled_from("ab 你\n\r\t\x00\x0b\x85\u200b\u200d\u200e\u05d0\u202e\ufeff\ufffd\x1b[0m<AI>"), max_size=8
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(TEXTS, TEXTS), max_size=8))
def test_nothing_safe_is_left(tmp_path: Path, pairs: list[tuple[str, str]]) -> None:
    """Whatever the rows: no finding that --fix mends is in the mended copy, and mending again changes nothing."""
    rows = [{"instruction": q, "output": a} for q, a in [("问", "答"), *pairs]]
    source = tmp_path / "x.json"
    source.write_text(json.dumps(rows), encoding="utf-8")
    outs = [tmp_path / "1.json", tmp_path / "2.json"]
    for path, out in zip([source, outs[0]], outs, strict=True):
        for old in (out, mend.log_of(out)):
            old.unlink(missing_ok=True)
        config = TrainConfig(data=str(path))
        mend.mend(config, check(config, near_duplicates="false"), out)
    report = check(TrainConfig(data=str(outs[0])), near_duplicates="false")
    assert {f.kind for f in report.findings} & SAFE == set()
    assert {kind for kind in KINDS if KINDS[kind].fix == "safe"} == SAFE
    assert outs[0].read_bytes() == outs[1].read_bytes() and log_of(outs[1]) == []


def test_what_needs_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Left and said without --fix_also; with a name, that and no more."""
    rows: list[dict[str, Any]] = [{"instruction": q, "output": a} for q, a in good(6)]
    long = rows[0]["output"] * 3
    special = {
        "near": [
            {"instruction": "近似的问题", "output": long + "好。"},
            {"instruction": "近似的问题", "output": long + "吧。"},
        ],
        "conflicts": [{"instruction": "你是谁", "output": "我是甲"}, {"instruction": "你是谁", "output": "我是乙"}],
        "personal": [{"instruction": "电话", "output": "请打13987654320，或写信到 li@qq.com 。"}],
        "markers": [{"instruction": "结束", "output": "说完了</s>"}],
        "unreadable": [{"instruction": "没有回答"}],
    }
    rows += [row for some in special.values() for row in some]
    source = tmp_path / "x.json"
    source.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")

    def fixed(*also: str) -> list[dict[str, Any]]:
        out = tmp_path / f"{'-'.join(also) or 'none'}.json"
        argv = ["--fix_also", ",".join(also)] if also else []
        assert run(capsys, source, "--fix", out, *argv)[0] == 1
        return json.loads(out.read_text(encoding="utf-8"))

    assert fixed() == rows
    # A near copy of another answer to the same question is a conflict as well.
    assert fixed("near") == [r for r in rows if r["output" if "output" in r else "instruction"] != long + "吧。"]
    assert fixed("conflicts") == [r for r in rows if r.get("output") not in (long + "吧。", "我是乙")]
    assert [r.get("output") for r in fixed("personal")][-3:] == ["请打[手机号]，或写信到 [邮箱] 。", "说完了</s>", None]
    assert [r.get("output") for r in fixed("markers")][-2:] == ["说完了", None]
    assert fixed("unreadable") == rows[:-1]
    fixed("all")
    code, _, _ = run(capsys, tmp_path / "all.json")
    assert code == 0 and len(load(tmp_path / "all.json").conversations) == len(rows) - 3


def test_held_out_rows_are_taken_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"instruction": q, "output": a} for q, a in good(8)]
    source, held, out = (tmp_path / name for name in ("x.jsonl", "held.jsonl", "o.jsonl"))
    for path, some in ((source, rows), (held, rows[2:4])):
        path.write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    assert run(capsys, source, "--eval_data", held, "--fix", out)[0] == 1
    assert [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] == rows[:2] + rows[4:]
    assert run(capsys, out, "--eval_data", held)[0] == 0
    assert [e["line"] for e in log_of(out)] == [3, 4]


def test_a_broken_line_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line that is no JSON is kept as it stands, and so is half a character, which UTF-8 can't write."""
    lines = [
        '{"instruction": "a", "output": "b"}',
        '{"instruction": "a", ',
        '{"instruction": "\\ud83d", "output": "b"}',
    ]
    source, out = tmp_path / "x.jsonl", tmp_path / "o.jsonl"
    source.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert run(capsys, source, "--fix", out)[0] == 1
    kept = out.read_text(encoding="utf-8").splitlines()
    assert kept[1].strip() == lines[1].strip() and json.loads(kept[2]) == json.loads(lines[2]) and len(kept) == 3


def test_parquet_is_mended_into_jsonl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet as pq

    rows = [{"instruction": "问", "output": " 答 "}, {"instruction": "问", "output": "答"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    out = tmp_path / "o.jsonl"
    assert run(capsys, tmp_path / "x.parquet", "--fix", out)[0] == 0
    assert json.loads(out.read_text(encoding="utf-8")) == {"instruction": "问", "output": "答"}


def test_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, exit code 2, nothing written; the same when the writing is interrupted."""
    source = tmp_path / "x.json"
    source.write_text(json.dumps([{"instruction": "a", "output": "b"}] * 2), encoding="utf-8")
    there = tmp_path / "there.json"
    there.write_text("kept", encoding="utf-8")
    (tmp_path / "logged.json.log.jsonl").write_text("kept", encoding="utf-8")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for out, words in (
        (source, "is there already"),
        (there, "is there already"),
        (tmp_path / "logged.json", "is there already"),
        (tmp_path / "none" / "o.json", "there is no folder"),
        (tmp_path / "o.txt", "name it .json, .jsonl or .csv"),
        (tmp_path / "o.jsonl", "holds json; name it .json"),
    ):
        code, said, err = run(capsys, source, "--fix", out)
        assert (code, said) == (2, "") and words in err and err.count("\n") == 1
    code, said, err = run(capsys, source, "--eval_data", source, "--fix", tmp_path / "o.json")
    assert (code, said) == (2, "") and "no row would be left" in err

    def stop(*_: Any) -> None:
        raise UserError("stop")

    monkeypatch.setattr(mend.Writer, "end", stop)
    assert run(capsys, source, "--fix", tmp_path / "o.json")[0] == 2
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
