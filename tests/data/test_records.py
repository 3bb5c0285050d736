"""records: every file kind and form gives the same conversations, and each bad input is named in one line."""

from __future__ import annotations

import csv
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minitune.config import UserError
from minitune.data.records import Conversation, Message, load

HUANHUAN = Path(__file__).parents[3] / "shared" / "data" / "huanhuan.json"
ROWS = [
    {"instruction": "你好，", "input": "你是谁？", "output": '我是"阿梨"，\n写诗的。'},
    {"instruction": "Name a fruit; any", "input": "", "output": " a pear 🍐\u2028\r\nor two "},
    {"instruction": "再见", "input": "", "output": "慢走。", "system": "说中文"},
]
ROWS_HISTORY = [[], [["早", "早上好"], ["吃了吗", "吃了"]], []]


def said(conversations: list[Conversation]) -> list[list[tuple[str, str, bool]]]:
    return [[(m.role, m.content, m.learn) for m in c.messages] for c in conversations]


def expected() -> list[list[tuple[str, str, bool]]]:
    """What ROWS say, spelled out here and not computed by the code under test."""
    return [
        [("user", "你好，你是谁？", False), ("assistant", '我是"阿梨"，\n写诗的。', True)],
        [
            ("user", "早", False),
            ("assistant", "早上好", True),
            ("user", "吃了吗", False),
            ("assistant", "吃了", True),
            ("user", "Name a fruit; any", False),
            ("assistant", " a pear 🍐\u2028\r\nor two ", True),
        ],
        [("system", "说中文", False), ("user", "再见", False), ("assistant", "慢走。", True)],
    ]


def alpaca() -> list[dict[str, Any]]:
    return [{"system": "", **row, "history": history} for row, history in zip(ROWS, ROWS_HISTORY, strict=True)]


def in_form(form: str) -> list[dict[str, Any]]:
    if form == "alpaca":
        return alpaca()
    if form == "query":
        return [
            {
                "query": row["instruction"] + row["input"],
                "response": row["output"],
                "history": row["history"],
                "system": row["system"],
            }
            for row in alpaca()
        ]
    if form == "messages":
        return [
            {"messages": [{"role": role, "content": content} for role, content, _ in turns]} for turns in expected()
        ]
    names = {"user": "human", "assistant": "gpt"}
    return [
        {
            "system": next((content for role, content, _ in turns if role == "system"), ""),
            "conversations": [
                {"from": names[role], "value": content} for role, content, _ in turns if role != "system"
            ],
        }
        for turns in expected()
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """`rows` in the kind of file that the name ends in; a csv cell holds the JSON of a list."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    elif path.suffix == ".jsonl":
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text(lines, encoding="utf-8", newline="")
    elif path.suffix == ".parquet":
        pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        for row in rows:
            cells = {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in row.items()}
            writer.writerow(cells)
        path.write_bytes(out.getvalue().encode())
    return path


def refused(path: Path) -> str:
    """The one-line message that loading `path` ends in."""
    with pytest.raises(UserError) as caught:
        load(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.startswith(f"{path}: ")
    message.encode("utf-8")
    return message


def refused_rows(tmp_path: Path, *rows: Any) -> str:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(list(rows)), encoding="utf-8")
    return refused(path).removeprefix(f"{path}: ")


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("form", ["alpaca", "query", "messages", "sharegpt"])
def test_every_kind_and_form_gives_the_same_conversations(tmp_path: Path, suffix: str, form: str) -> None:
    """One content, written 16 ways, equals the conversations spelled out by hand."""
    records = load(write(tmp_path / f"data{suffix}", in_form(form)))
    assert said(records.conversations) == expected()
    assert records.form == {"query": "alpaca"}.get(form, form)
    assert [c.row for c in records.conversations] == [1, 2, 3]
    assert {c.source for c in records.conversations} == {f"data{suffix}"}
    assert records.form in records.notes[0] and suffix[1:] in records.notes[0]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_byte_order_mark_is_tolerated(tmp_path: Path, suffix: str) -> None:
    """The mark that Windows programs put in front changes nothing."""
    path = write(tmp_path / f"data{suffix}", in_form("alpaca"))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert said(load(path).conversations) == expected()


def test_the_real_data_set() -> None:
    """3,729 rows, each the file's own strings, in less than 0.2 s of processor time."""
    if not HUANHUAN.exists():
        pytest.skip(f"{HUANHUAN} is absent")
    rows = json.loads(HUANHUAN.read_text(encoding="utf-8"))
    seconds = []
    for _ in range(3):
        start = time.process_time()
        records = load(HUANHUAN)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.2
    assert len(records.conversations) == 3729 and records.form == "alpaca"
    want = [[("user", r["instruction"], False), ("assistant", r["output"], True)] for r in rows]
    assert said(records.conversations) == want
    answers = [c.messages[-1].content for c in records.conversations]
    assert 27 <= sum(map(len, answers)) / len(answers) < 28
    prompts = {c.messages[0].content for c in records.conversations}
    assert len(prompts) == 3491
    assert "3,729" in records.notes[0]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)


@st.composite
def valid_turns(draw: st.DrawFn) -> list[tuple[str, str, bool]]:
    turns: list[tuple[str, str, bool]] = []
    if draw(st.booleans()):
        turns.append(("system", draw(TEXT), False))
    pairs = draw(st.integers(1, 3))
    learned = draw(st.lists(st.booleans(), min_size=pairs, max_size=pairs).filter(any))
    for learn in learned:
        turns += [("user", draw(TEXT), False), ("assistant", draw(TEXT), learn)]
    return turns


@settings(
    max_examples=60,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(turns=st.lists(valid_turns(), min_size=1, max_size=4), switch=st.sampled_from(["weight", "train"]))
def test_any_valid_conversations_read_back_equal(
    tmp_path: Path, turns: list[list[tuple[str, str, bool]]], switch: str
) -> None:
    """Conversations of any characters, written as messages jsonl, come back as they were, line by line."""
    rows = [
        {
            "messages": [
                {"role": r, "content": t} | ({switch: int(learn)} if r == "assistant" else {})
                for r, t, learn in conversation
            ]
        }
        for conversation in turns
    ]
    records = load(write(tmp_path / "any.jsonl", rows))
    want = [
        Conversation(tuple(Message(r, t, learn) for r, t, learn in c), "any.jsonl", line)  # type: ignore[arg-type]
        for line, c in enumerate(turns, 1)
    ]
    assert records.conversations == want


def test_join_stands_between_instruction_and_a_present_input(tmp_path: Path) -> None:
    """`join` appears where there is an input, and only there; null counts as none."""
    rows: list[dict[str, Any]] = [
        {"instruction": "a", "input": "b", "output": "o"},
        {"instruction": "a", "input": "", "output": "o"},
        {"instruction": "a", "input": None, "output": "o"},
        {"instruction": "a", "output": "o"},
        {"instruction": "", "input": "b", "output": "o"},
    ]
    path = write(tmp_path / "x.json", rows)
    asked = [c.messages[0].content for c in load(path, join="\n").conversations]
    assert asked == ["a\nb", "a", "a", "a", "b"]
    assert load(path).conversations[0].messages[0].content == "ab"


def test_a_blank_system_text_is_none(tmp_path: Path) -> None:
    """White space for a system text, in any form, adds no message."""
    for row in (GOOD | {"system": " \n"}, chat(("system", " "), U, A), chat(U, A) | {"system": "\t"}):
        want = [[("user", "q", False), ("assistant", "a", True)]]
        assert said(load(write(tmp_path / "x.json", [row])).conversations) == want


def test_prompt_completion_and_json_wrappers(tmp_path: Path) -> None:
    """TRL's names; rows under `data` or another single list; one object that is itself a row."""
    row = {"prompt": "q", "completion": "a"}
    want = [[("user", "q", False), ("assistant", "a", True)]]
    wrapped: list[Any] = [{"data": [row]}, {"version": "1.0", "train": [row], "size": 1}, row]
    wrapped.append({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]})
    wrapped.append({"id": "7", "conversations": [{"from": "user", "value": "q"}, {"from": "gpt", "value": "a"}]})
    for holder in wrapped:
        path = tmp_path / "x.json"
        path.write_text(json.dumps(holder), encoding="utf-8")
        assert said(load(path).conversations) == want


def test_content_decides_the_kind_and_the_note_says_so(tmp_path: Path) -> None:
    """A .json of one object a line is jsonl, and the other way round; a row is its line, with blank ones."""
    line = json.dumps({"instruction": "q", "output": "a"})
    path = tmp_path / "x.json"
    path.write_text(f"{line}\n\n{line}\n", encoding="utf-8")
    records = load(path)
    assert [c.row for c in records.conversations] == [1, 3]
    assert any("jsonl" in note and "x.json" in note for note in records.notes[1:])
    path = tmp_path / "y.jsonl"
    path.write_text(f"[{line},\n {line}]", encoding="utf-8")
    records = load(path)
    assert [c.row for c in records.conversations] == [1, 2]
    assert any("read as json" in note for note in records.notes)
    path = tmp_path / "z.txt"
    path.write_text(f"{line}\n{line}", encoding="utf-8")
    assert len(load(path).conversations) == 2


def test_unused_keys_are_named_once(tmp_path: Path) -> None:
    """Columns that nothing is read from are said, of rows and of turns, not refused."""
    turns = [{"role": "user", "content": "q", "name": "x"}, {"role": "assistant", "content": "a"}]
    rows = [{"id": i, "source": "s", "story": "t", "messages": turns} for i in range(3)]
    notes = load(write(tmp_path / "x.json", rows)).notes
    said_of = [note for note in notes if note.startswith("not used")]
    assert said_of == ["not used: `id`, `source`, `story`, `messages[].name`"]


def test_learn_switches_and_text_parts(tmp_path: Path) -> None:
    """`weight: 0` and `train: false` leave a turn unlearned; text parts are joined; null is absent."""
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "1", "weight": 0},
        {"role": "user", "content": "c", "weight": None},
        {"role": "assistant", "content": "2", "train": False},
        {"role": "user", "content": "d"},
        {"role": "assistant", "content": "3", "weight": 1.0, "train": True},
    ]
    messages = load(write(tmp_path / "x.jsonl", [{"messages": turns}])).conversations[0].messages
    assert [m.learn for m in messages] == [False, False, False, False, False, True]
    assert messages[0].content == "ab"


def test_parquet_nulls_and_nan_are_missing(tmp_path: Path) -> None:
    """A table's null or NaN is an absent value: fine for `input`, an error with its row for `output`."""
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet as pq

    path = tmp_path / "x.parquet"
    table = {"instruction": ["q", "r"], "input": pa.array([float("nan")] * 2), "output": ["a", "b"]}
    pq.write_table(pa.table(table), path)
    assert [c.messages[0].content for c in load(path).conversations] == ["q", "r"]
    pq.write_table(pa.table(table | {"output": ["a", None]}), path)
    message = refused(path)
    assert "row 2" in message and "`output`" in message
    path.write_bytes(path.read_bytes()[:-20])
    assert "parquet" in refused(path)


def test_parquet_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pyarrow the message says what to install, and reading json never asks for it."""
    path = write(tmp_path / "x.parquet", in_form("alpaca"))
    for name in [name for name in sys.modules if name.split(".")[0] == "pyarrow"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install pyarrow" in refused(path)
    load(write(tmp_path / "x.json", in_form("alpaca")))


def test_numbers_in_csv_stay_text_and_other_separators_are_seen(tmp_path: Path) -> None:
    """007 is not 7; a semicolon or a tab separates where the header says so."""
    for separator, name in [(",", "x.csv"), (";", "y.csv"), ("\t", "z.tsv")]:
        path = tmp_path / name
        path.write_text(separator.join(["instruction", "output"]) + f"\r\n1.50{separator}007\r\n", newline="")
        assert said(load(path).conversations) == [[("user", "1.50", False), ("assistant", "007", True)]]


GOOD = {"instruction": "q", "output": "a"}


def chat(*turns: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def good_like(row: Any) -> dict[str, Any]:
    """A row without fault in the form of `row`, so that what is refused is the fault."""
    if isinstance(row, dict) and "messages" in row and "instruction" not in row:
        return chat(U, A)
    if isinstance(row, dict) and "conversations" in row:
        return {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    return GOOD


ASKED, TOLD = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
MISSPELT: list[tuple[str, str, dict[str, Any]]] = [
    ("instrution", "instruction", {"instrution": "q", "input": "", "output": "a"}),
    ("ouput", "output", {"instruction": "q", "ouput": "a"}),
    ("instrution", "instruction", {"instrution": "q", "ouput": "a"}),
    ("ouput", "output", {"instrution": "q", "ouput": "a"}),
    ("Instruction", "instruction", {"Instruction": "q", "output": "a"}),
    ("imput", "input", {"instruction": "q", "imput": "more", "output": "a"}),
    ("histroy", "history", {"instruction": "q", "histroy": [], "output": "a"}),
    ("system_prompt", "system", {"instruction": "q", "system_prompt": "s", "output": "a"}),
    ("answer", "output", {"question": "q", "answer": "a"}),
    ("massages", "messages", {"massages": [ASKED, TOLD]}),
    ("conversation", "conversations", {"conversation": [{"from": "human", "value": "q"}]}),
    ("quary", "query", {"quary": "q", "response": "a"}),
    ("completions", "completion", {"prompt": "q", "completions": "a"}),
    ("contnet", "content", {"messages": [{"role": "user", "contnet": "q"}, TOLD]}),
    ("rloe", "role", {"messages": [ASKED, {"rloe": "assistant", "content": "a"}]}),
    ("form", "from", {"conversations": [{"form": "human", "value": "q"}]}),
    ("wieght", "weight", {"messages": [ASKED, {**TOLD, "wieght": 0}]}),
]


@pytest.mark.parametrize(("wrong", "right", "row"), MISSPELT)
def test_a_misspelt_key_is_named_with_the_right_one(
    tmp_path: Path, wrong: str, right: str, row: dict[str, Any]
) -> None:
    """A misspelt key, in the first row or a later one, is refused by its row with a did-you-mean."""
    for rows in ([row], [good_like(row), row]):
        message = refused_rows(tmp_path, *rows)
        assert message.startswith(f"row {len(rows)}")
        problem, mend = message.split("; did you mean ")
        assert f"`{wrong}`" in problem and f"`{right}`" in mend


U, A, S = ("user", "q"), ("assistant", "a"), ("system", "s")
BAD_ROWS: list[tuple[Any, list[str]]] = [
    ({"instruction": "q", "output": ""}, ["`output` is empty", "write the answer"]),
    ({"instruction": "q", "output": " \n\u3000"}, ["`output` is empty"]),
    ({"instruction": "q", "output": 3}, ["`output` is a number, not text"]),
    ({"instruction": "q", "output": ["a"]}, ["`output` is a list, not text"]),
    ({"instruction": "q", "output": None}, ["`output` is missing or null"]),
    ({"instruction": "q"}, ["`output` is missing"]),
    ({"output": "a"}, ["`instruction` is missing"]),
    ({"instruction": None, "output": "a"}, ["`instruction` is missing or null"]),
    ({"input": "q", "output": "a"}, ["`instruction` is missing", "rename `input`"]),
    ({"instruction": " ", "input": "\n", "output": "a"}, ["`instruction` (and `input`) is empty"]),
    ({"instruction": "q", "input": 5, "output": "a"}, ["`input` is a number"]),
    ({"instruction": "q", "system": 5, "output": "a"}, ["`system` is a number"]),
    ({"instruction": "q", "output": "half \ud83d"}, ["`output`", "surrogate", "\\ud83d"]),
    ({"instruction": "q", "output": "a", "history": [["only"]]}, ["history pair 1", "pair"]),
    ({"instruction": "q", "output": "a", "history": [["x", "y"], ["x", ""]]}, ["history pair 2", "empty"]),
    ({"instruction": "q", "output": "a", "history": "old"}, ["`history` is text, not a list"]),
    ({"instruction": "q", "output": "a", "tools": "[{}]"}, ["tools"]),
    ({"instruction": "q", "output": "a", "messages": [U]}, ["has both", "`messages`", "keep one"]),
    ({"text": "once"}, ["no known form", "`text`", "`instruction`", "`messages`", "`conversations`"]),
    ({}, ["no known form", "no keys"]),
    ({"a\nb\ud800": "c"}, ["no known form"]),
    ("text", ["is text, not an object"]),
    (None, ["is null, not an object"]),
    ([GOOD], ["is a list, not an object"]),
    (chat(), ["no assistant turn"]),
    (chat(U), ["no assistant turn"]),
    (chat(S), ["no assistant turn"]),
    (chat(A), ["message 1", "first turn is the assistant's"]),
    (chat(S, A), ["message 2", "first turn is the assistant's"]),
    (chat(U, U, A), ["message 2", "two user turns in a row"]),
    (chat(U, A, A), ["message 3", "two assistant turns in a row"]),
    (chat(U, A, U), ["ends in a user turn", "delete that turn"]),
    (chat(U, S, A), ["message 2", "system", "front"]),
    (chat(S, S, U, A), ["message 2", "system"]),
    (chat(S, U, A) | {"system": "other"}, ["message 1", "second system text"]),
    (chat(U, ("assistant", "")), ["message 2", "assistant's text is empty"]),
    (chat(("user", " "), A), ["message 1", "user's text is empty"]),
    (chat(U, ("assistant", 7)), ["message 2", "`content` is a number"]),
    (chat(U, ("assistant", None)), ["message 2", "`content` is missing or null"]),
    (chat(("user", [{"type": "image_url"}]), A), ["message 1", "`image_url`", "only text"]),
    (chat(U, ("asistant", "a")), ["message 2", "unknown role `asistant`", "did you mean `assistant`"]),
    (chat(("human", "q"), A), ["message 1", "unknown role `human`", "did you mean `user`"]),
    (chat(("zzz", "q"), A), ["message 1", "unknown role `zzz`", "`system`, `user`, `assistant`"]),
    (chat((3, "q"), A), ["message 1", "`role` is a number"]),  # type: ignore[arg-type]
    (chat(U, A, ("tool", "42"), A), ["message 3", "tool"]),
    (chat(U, A, ("function", None), A), ["message 3", "tool"]),
    (chat(U, A) | {"tools": [{"name": "f"}]}, ["tools"]),
    (
        {"messages": [dict(role="user", content="q"), dict(role="assistant", tool_calls=[{"id": 1}])]},
        ["message 2", "tool call"],
    ),
    (
        {"messages": [dict(role="user", content="q"), dict(role="assistant", content="a", weight=0)]},
        ["no assistant turn is learned"],
    ),
    (
        {"messages": [dict(role="user", content="q"), dict(role="assistant", content="a", weight=0.5)]},
        ["message 2", "`weight` is neither 0 nor 1"],
    ),
    (
        {"messages": [dict(role="user", content="q", train=True), dict(role="assistant", content="a")]},
        ["message 1", "`train`", "user"],
    ),
    ({"messages": "q"}, ["`messages` is text, not a list"]),
    ({"messages": ["q", "a"]}, ["message 1", "is text, not an object"]),
    ({"conversations": [{"from": "bing", "value": "q"}]}, ["message 1", "unknown role `bing`", "`human`"]),
    ({"conversations": [{"from": "gpt", "value": "q"}]}, ["message 1", "first turn is the assistant's"]),
]


@pytest.mark.parametrize(("row", "musts"), BAD_ROWS)
def test_a_bad_row_is_refused_by_its_number(tmp_path: Path, row: Any, musts: list[str]) -> None:
    """Each fault, alone and behind a good row of its form, is named with the row and what is wrong."""
    good = good_like(row)
    for rows in ([good, row], [row, good]):
        message = refused_rows(tmp_path, *rows)
        number = rows.index(row) + 1
        assert message.startswith((f"row {number}:", f"row {number}, "))
        assert all(must in message for must in musts), message


def test_rows_with_the_same_fault_are_counted(tmp_path: Path) -> None:
    """The first is named, the others of its kind counted, those of another kind not."""
    empty = {"instruction": "q", "output": ""}
    assert "more such" not in refused_rows(tmp_path, GOOD, empty)
    assert "(1 more such: row 3)" in refused_rows(tmp_path, GOOD, empty, empty, "text")
    message = refused_rows(tmp_path, *[GOOD, empty] * 6)
    assert message.startswith("row 2:") and "(5 more such: rows 4, 6, 8, ...)" in message


def test_mixed_forms_are_refused_at_the_first_that_differs(tmp_path: Path) -> None:
    """One file, one form: the row that differs is named with both forms."""
    message = refused_rows(tmp_path, GOOD, GOOD, chat(U, A), GOOD)
    assert message.startswith("row 3:") and "`messages`" in message and "`instruction`" in message
    message = refused_rows(tmp_path, GOOD, {"query": "q", "response": "a"})
    assert message.startswith("row 2:") and "`query`" in message


LINE = json.dumps(GOOD).encode()
BAD_FILES: list[tuple[str, bytes, list[str]]] = [
    ("x.json", b"", ["empty"]),
    ("x.json", b"\xef\xbb\xbf \n", ["empty"]),
    ("x.json", b"[]", ["no rows"]),
    ("x.json", b'{"data": []}', ["no rows"]),
    ("x.json", b"42", ["bare value"]),
    ("x.json", b'{"train": [{"a": 1}], "test": [{"a": 1}]}', ["several lists", "train, test"]),
    ("x.json", b"[\n" + LINE + b"\n" + LINE + b"]", ["line 3, column 1", "not JSON"]),
    ("x.json", b'[{"instruction": "a\nb", "output": "c"}]', ["line 1, column 20", "line break", "\\n"]),
    ("x.json", b"[" + LINE + b"]\n[" + LINE + b"]", ["line 2, column 1", "more text after"]),
    ("x.json", b"[" * 100_000, ["can't be read"]),
    ("x.jsonl", b"\n \n", ["no rows"]),
    ("x.jsonl", LINE + b"\n\n{'instruction': 1}\n", ["line 3, column 2", "not JSON"]),
    ("x.jsonl", LINE + b"\n" + LINE + LINE + b"\n", [f"line 2, column {len(LINE) + 1}", "one object a line"]),
    ("x.jsonl", LINE + b"\n" + LINE[:20], ["line 2, column 21", "cut short"]),
    ("x.jsonl", LINE + b'\n"text"\n', ["line 2: is text, not an object"]),
    ("x.jsonl", LINE + b'\n{"instruction": "q", "output": " "}\nbroken', ["line 2: `output` is empty"]),
    ("x.csv", b"\n", ["empty"]),
    ("x.csv", b"instruction,output\n", ["no rows"]),
    ("x.csv", b"hello,there\nhow,are\n", ["header", "`hello`", "`instruction`"]),
    ("x.csv", b"instrution,output\nq,a\n", ["header", "`instrution`", "did you mean `instruction`"]),
    ("x.csv", b"instruction,output\nq,a\nq,a,b\n", ["row 2", "3 cells", "double quotes"]),
    ("x.csv", b"instruction,output\nq,a\n\nq\n", ["row 2", "`output`"]),
    ("x.csv", b'\ninstruction,output\nq,a\nq,"a\nb\n', ["line 4", "never closed"]),
    ("x.csv", b'instruction,output\nq,"a" b\n', ["line 2", "not CSV", "double the quotes"]),
    ("x.csv", b"output,output\nq,a\n", ["`output` twice"]),
    ("x.csv", b"PK\x03\x04rest", ["Excel", "CSV UTF-8"]),
    ("x.parquet", b"not one", ["parquet"]),
    ("x.txt", b"hello", ["not recognised", "json, jsonl, csv or parquet"]),
]


@pytest.mark.parametrize(("name", "data", "musts"), BAD_FILES)
def test_a_bad_file_is_refused_with_its_place(tmp_path: Path, name: str, data: bytes, musts: list[str]) -> None:
    """Syntax and shape: the message names file, place and mend."""
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    path = tmp_path / name
    path.write_bytes(data)
    message = refused(path)
    assert all(must in message for must in musts), message


def test_json_cut_anywhere_is_called_cut_short(tmp_path: Path) -> None:
    """Each proper beginning of a file is refused with the line and column where it ends."""
    rows = [{"instruction": "q\\ \u00e9", "input": None, "output": "a"}]
    whole = json.dumps(rows, indent=1) + "\n"
    path = tmp_path / "x.json"
    for length in range(1, len(whole.rstrip())):
        begun = whole[:length]
        path.write_text(begun, encoding="utf-8")
        message = refused(path)
        end = begun.rstrip().split("\n")
        assert f"line {len(end)}, column {len(end[-1]) + 1}" in message, (begun, message)
        assert "cut short" in message


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_other_encodings_are_named(tmp_path: Path, suffix: str) -> None:
    """GBK, UTF-16, Latin-1, damage and a cut character: byte, line, and the way out that fits each."""
    path = tmp_path / f"data{suffix}"
    text = write(path, [{"instruction": "ok", "input": "", "output": "ok"}, *ROWS[:1]]).read_text(encoding="utf-8")
    at = len(text[: text.index("你")].encode())
    line = text[: text.index("你")].count("\n") + 1
    path.write_bytes(text.encode("gbk"))
    message = refused(path)
    assert f"byte {at} " in message and f"line {line};" in message
    assert f"`iconv -f gbk -t utf-8 {path} > {tmp_path / 'data.utf8'}{suffix}`" in message
    path.write_bytes(text.replace("你", "\U00020000").encode("gb18030"))
    assert "iconv -f gb18030 -t utf-8" in refused(path)
    path.write_bytes(text.encode("utf-16"))
    assert "iconv -f utf-16 -t utf-8" in refused(path)
    path.write_bytes(text.replace("你好", "caf\u00e9 ").split("，")[0].encode("latin-1") + b'"')
    message = refused(path)
    assert "not UTF-8" in message and "iconv" not in message
    whole = text.encode()
    damaged = whole.replace("是".encode(), b"\xff\xfe\xfd")
    path.write_bytes(damaged)
    message = refused(path)
    assert f"byte {damaged.index(0xFF)} " in message and "iconv" not in message
    path.write_bytes(whole[: at + 1])
    assert "cut short" in refused(path)


def test_damaged_utf8_is_not_taken_for_gbk(tmp_path: Path) -> None:
    """Bytes that would decode as GBK, behind Chinese that is good UTF-8: converting would spoil the file."""
    data = '{"instruction": "你好", "output": "'.encode() + b'\xc4\xe3"}'
    data.decode("gbk")
    path = tmp_path / "x.json"
    path.write_bytes(data)
    message = refused(path)
    assert f"byte {data.index(0xC4)} " in message and "damage" in message and "iconv" not in message


def test_missing_files_and_folders(tmp_path: Path) -> None:
    """No file: the nearest name is offered; a folder is not a file."""
    assert "no such file" in refused(tmp_path / "nothing.json")
    write(tmp_path / "mydata.json", ROWS)
    assert f"did you mean {tmp_path / 'mydata.json'}?" in refused(tmp_path / "mydata.jsn")
    assert "there is no folder" in refused(tmp_path / "absent" / "x.json")
    assert "folder, not a file" in refused(tmp_path)
