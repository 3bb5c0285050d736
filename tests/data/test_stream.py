"""A stream is what `load` gives, a row at a time; a window over a big .json is `json.loads`, its error places included."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from minitune.config import UserError
from minitune.data import json_rows, records, source
from minitune.data.rows import read_rows

GOOD = {"instruction": "你好 q", "input": "", "output": "a 🍐\n"}
BAD: list[Any] = [{"instruction": "q", "output": " "}, {"instruction": "q"}, "text", {"query": "q", "response": "a"}]
QUICK = settings(
    max_examples=120, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def write(path: Path, rows: list[Any]) -> Path:
    """As a .json array over many lines, as jsonl or as csv, by the name's ending."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    else:
        cells = [['"' + row["instruction"] + '"', '"' + row["output"].replace('"', '""') + '"'] for row in rows]
        lines = ["instruction,output", *(",".join(row) for row in cells)]
        path.write_text("\r\n".join(lines), encoding="utf-8", newline="")
    return path


@QUICK
@given(
    rows=st.lists(st.sampled_from([GOOD, *BAD]), min_size=1, max_size=12),
    suffix=st.sampled_from([".json", ".jsonl"]),
    window=st.integers(1, 90),
)
def test_a_stream_is_what_load_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[Any], suffix: str, window: int
) -> None:
    """Readable rows in order, faults with their numbers, and `load`'s result or message from the same rows."""
    monkeypatch.setattr(json_rows, "WINDOW", window)
    path = write(tmp_path / f"x{suffix}", rows)
    stream = records.stream(path)
    found = list(stream)
    assert [c.row for c in found] == [i for i, row in enumerate(rows, 1) if row not in BAD[:3] and alike(row, rows)]
    assert sorted([c.row for c in found] + [n for n, _ in stream.faults]) == list(range(1, len(rows) + 1))
    assert (
        stream.fraction == 1 and stream.kind == suffix[1:] and stream.unit == ("line" if suffix == ".jsonl" else "row")
    )
    try:
        loaded = records.load(path)
    except UserError as error:
        assert stream.faults and str(error) == f"{path}: {records.describe(stream.faults, stream.unit)}"
    else:
        assert not stream.faults and loaded.conversations == found
        assert (loaded.form, loaded.notes) == (stream.form, stream.notes)
    assert list(stream) == found  # it begins again


def alike(row: Any, rows: list[Any]) -> bool:
    """Whether a row is written as the first one whose form is known."""
    first = next(r for r in rows if r in (GOOD, BAD[0], BAD[3]))
    return ("query" in row) == ("query" in first)


def test_faults_hold_no_rows(tmp_path: Path) -> None:
    """Many rows with one fault cost a number each, not their text."""
    rows = [{"instruction": "q" * 5000, "output": ""} for _ in range(2000)]
    path = write(tmp_path / "x.jsonl", rows)
    stream = records.stream(path)
    assert list(stream) == [] and len(stream.faults) == 2000
    assert len({id(fault) for _, fault in stream.faults}) == 1
    fault = stream.faults[0][1]
    assert fault.__traceback__ is None and fault.__context__ is None


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    """Ten times the rows, the same peak; and the share that is read grows to 1."""
    monkeypatch.setattr(json_rows, "WINDOW", 1 << 16)
    peaks = []
    for count in (2000, 20000):
        path = write(tmp_path / f"x{count}{suffix}", [GOOD | {"instruction": f"问题 {i} " * 8} for i in range(count)])
        stream = records.stream(path)
        shares = []
        tracemalloc.start()
        for row in stream:
            if row.row % 1000 == 0:
                shares.append(stream.fraction)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert shares == sorted(shares) and stream.fraction == 1 and len(shares) == count // 1000
    assert path.stat().st_size > 2_000_000
    assert peaks[1] < peaks[0] + 300_000, peaks


values = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@QUICK
@given(
    rows=st.lists(values, max_size=5),
    indent=st.none() | st.integers(0, 2),
    ascii_=st.booleans(),
    window=st.integers(1, 40),
    damage=st.none() | st.tuples(st.integers(0, 500), st.sampled_from(["cut", "drop", *'"[]{},:\\\n x1-.'])),
)
@example(rows=[1.5e10, 12], indent=None, ascii_=True, window=1, damage=None)
@example(rows=["\\u12", "a\\"], indent=None, ascii_=True, window=3, damage=(6, "cut"))
@example(rows=["🍐" * 9], indent=None, ascii_=True, window=2, damage=(40, "\\"))
@example(rows=[[], {}], indent=2, ascii_=True, window=1, damage=(500, " "))
def test_a_window_is_json_loads(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: list[Any],
    indent: int | None,
    ascii_: bool,
    window: int,
    damage: tuple[int, str] | None,
) -> None:
    """Any array, whole or damaged anywhere, read a few bytes at a time: the values, or the message for the whole text."""
    monkeypatch.setattr(json_rows, "WINDOW", window)
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_) + "\n\n"
    if damage:
        at, what = 1 + damage[0] % (len(text) - 1), damage[1]
        text = text[:at] + ("" if what in ("cut", "drop") else what) + ("" if what == "cut" else text[at + 1 :])
    try:
        text.encode("utf-8")
        wanted: Any = json.loads(text)
    except UnicodeEncodeError:
        assume(False)
    except json.JSONDecodeError as error:
        assume(not error.msg.startswith("Illegal trailing comma"))  # another place since Python 3.13
        wanted = json_rows.syntax(error, text, None)
    except ValueError as error:
        wanted = json_rows.syntax(error, text, None)
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8", newline="")
    try:
        got: Any = [row for _, row in read_rows(path).items]
    except UserError as error:
        got = str(error).removeprefix(f"{path}: ")
        wanted = " ".join(wanted.splitlines()) if isinstance(wanted, str) else wanted
    assert got == wanted


def test_rows_before_a_break_are_read(tmp_path: Path) -> None:
    """A .json that breaks off late gives its first rows, then the place; a row's fault before it is said first."""
    text = json.dumps([GOOD] * 20000, ensure_ascii=False)
    path = tmp_path / "x.json"
    path.write_text(text[:-30], encoding="utf-8")
    stream, seen = records.stream(path), 0
    with pytest.raises(UserError, match=rf"line 1, column {len(text) - 29}; the file was cut short"):
        for _ in stream:
            seen += 1
    assert seen == 19999
    path.write_text(text[:-30].replace("你好 q", " ", 1), encoding="utf-8")
    with pytest.raises(UserError, match="row 1: `instruction`"):
        records.load(path)


def test_bytes_that_are_no_text_late_in_a_big_file(tmp_path: Path) -> None:
    """The place of a wrong byte beyond the first window is the file's, not the window's."""
    data = json.dumps([GOOD] * 40000, ensure_ascii=False).encode()
    at = len(data) - 20
    path = tmp_path / "x.json"
    path.write_bytes(data[:at] + b"\xff" + data[at:])
    with pytest.raises(UserError, match=rf"byte {at} "):
        list(records.stream(path))


@pytest.mark.parametrize(
    ("data", "musts"),
    [
        ("[\n你".encode() + b"\xff\xfe]", ["byte 5 ", "line 2;", "mend the damage"]),
        (b"[\n\n" + "你好".encode("gbk") + b"]", ["byte 3 ", "line 3;", "iconv -f gbk"]),
        (b"[ab" + "\U00020000".encode("gb18030") + b"]", ["byte 3 ", "line 1;", "iconv -f gb18030"]),
        ("[\n好".encode()[:-1], ["byte 2 ", "line 2:", "cut short"]),
        ("[é\n".encode() + "好".encode()[:1] + b"\xff]", ["byte 4 ", "line 2;", "save the file as UTF-8"]),
        (b"[" + "é".encode("latin-1") + b'"', ["byte 1 ", "line 1;", "save the file as UTF-8"]),
    ],
)
@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 1 << 20])
def test_wrong_bytes_at_the_seams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, musts: list[str], chunk: int
) -> None:
    """What is said of bytes that are no UTF-8 does not depend on how the file is read."""
    monkeypatch.setattr(source, "CHUNK", chunk)
    path = tmp_path / "x.json"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        records.load(path)
    assert all(must in str(caught.value) for must in musts), caught.value


def test_many_keys_of_their_own(tmp_path: Path) -> None:
    """Rows whose unused keys all differ are read, and memory for their shapes is bounded."""
    rng = random.Random(0)
    path = write(tmp_path / "x.jsonl", [GOOD | {f"k{rng.random()}": 1} for _ in range(1500)])
    stream = records.stream(path)
    assert len(list(stream)) == 1500 and len(stream._shapes) == 1000
    assert "and 1492 more" in stream.notes[-1]
