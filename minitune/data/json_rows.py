"""json and jsonl -> numbered rows, one at a time, and where exactly the text stops being JSON.

A .json of one big array is decoded row by row out of a window of its text, so its size does not matter.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from minitune.data.source import Rows, Unread, fail, not_utf8, share_read

WINDOW = 1 << 20  # bytes read at a time
MARGIN = 16  # an error this near to the window's end may be a literal or an escape that goes on behind it
DECODER = json.JSONDecoder()
SPACE = re.compile(r"[ \t\n\r]*")


def read_json(path: Path) -> Rows:
    """The rows of a .json: of its array, of the one list under a key, or the object that is itself a row."""
    with path.open("rb") as file:
        start = file.read(WINDOW).removeprefix(codecs.BOM_UTF8).lstrip(b" \t\n\r")[:1]
    return _array(path) if start == b"[" else _whole(path)


def _whole(path: Path) -> Rows:
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if not text.strip():
            fail(path, "the file is empty; it needs at least one conversation")
        loaded = json.loads(text)
    except UnicodeDecodeError:
        not_utf8(path)
    except (ValueError, RecursionError) as error:
        fail(path, syntax(error, text, None))
    notes: list[str] = []
    if isinstance(loaded, dict):
        loaded, notes = _unwrap(path, loaded)
    if not isinstance(loaded, list):
        fail(path, "holds one bare value; rows are objects in one [ ... ]")
    rows = Rows("json", iter(()), notes)
    rows.items = _drain(rows, loaded)
    return rows


def _unwrap(path: Path, holder: dict[str, Any]) -> tuple[list[Any], list[str]]:
    """The rows of a file that is one object: under its only list of rows, or the object is itself a row."""
    lists = [key for key, value in holder.items() if isinstance(value, list) and _are_rows(value)]
    if "data" in lists or isinstance(holder.get("data"), list) and not lists:
        lists = ["data"]
    if not lists:
        return [holder], []
    if len(lists) > 1:
        fail(path, f"holds several lists ({', '.join(lists)}); put the rows to learn in a file of their own")
    return holder[lists[0]], [f"the rows are those under `{lists[0]}`"]


def _are_rows(items: list[Any]) -> bool:
    """Whether a list holds rows, not the turns of one conversation."""
    turns = {"role", "from"}
    return bool(items) and all(isinstance(item, dict) and not turns & item.keys() for item in items)


def _drain(rows: Rows, items: list[Any]) -> Iterator[tuple[int, Any]]:
    """Numbered rows, each let go as it is handed out: raw rows and conversations never all coexist."""
    items.reverse()
    count = len(items)
    rows.progress = lambda: 1 - len(items) / max(1, count)
    for number in range(1, count + 1):
        yield number, items.pop()


def _array(path: Path) -> Rows:
    """The elements of an array that may be larger than memory."""

    def items() -> Iterator[tuple[int, Any]]:
        with path.open("rb") as file:
            rows.progress = share_read(file, path)
            yield from enumerate(Window(path, file).elements(), 1)

    rows = Rows("json", iter(()))
    rows.items = items()
    return rows


def read_jsonl(path: Path) -> Rows:
    """One row a line; blank lines count and hold nothing."""

    def items() -> Iterator[tuple[int, Any]]:
        with path.open("rb") as file:
            rows.progress = share_read(file, path)
            for number, raw in enumerate(file, 1):
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip()
                    if not line:
                        continue
                    row = json.loads(line)
                except UnicodeDecodeError:
                    not_utf8(path)
                except (ValueError, RecursionError) as error:
                    if not rows.lenient:
                        fail(path, syntax(error, line, number))
                    row = Unread(
                        line, getattr(error, "msg", str(error)).lower().removesuffix(" at").removesuffix(" starting")
                    )
                yield number, row

    rows = Rows("jsonl", iter(()))
    rows.items = items()
    return rows


class Window:
    """The stretch of a .json that is being decoded: `text`, and in it the place `at` where the next value begins.

    line, column: the lines of the file before `text`, and the characters before it on its first line.
    """

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.file = path, file
        self.bytes = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at = "", 0
        self.line, self.column = 0, 0
        self.ended = False

    def more(self) -> None:
        """Lets go what lies behind and reads on, as much again as is left: a long row is read twice at most."""
        broken = self.text.rfind("\n", 0, self.at)
        self.column = self.at - broken - 1 if broken >= 0 else self.column + self.at
        self.line += self.text.count("\n", 0, self.at)
        left = self.text[self.at :]
        data = self.file.read(max(WINDOW, len(left)))
        self.ended = not data
        try:
            self.text, self.at = left + self.bytes.decode(data, self.ended), 0
        except UnicodeDecodeError:
            not_utf8(self.path)

    def elements(self) -> Iterator[Any]:
        """The values between [ and ], each decoded when it is asked for."""
        self.peek()
        self.at += 1
        sign = "," if self.peek() != "]" else "]"
        while sign == ",":
            yield self.value()
            sign = self.peek()
            if sign == ",":
                self.at += 1
                self.peek()
            elif sign != "]":
                self.fail(json.JSONDecodeError("Expecting ',' delimiter", self.text, self.place))
        self.at += 1
        if self.peek():
            self.fail(json.JSONDecodeError("Extra data", self.text, self.place))

    def peek(self) -> str:
        """Goes to the next character that is no white space; "" at the end of the file."""
        while True:
            self.place = SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.place < len(self.text):
                self.at = self.place
                return self.text[self.at]
            if self.ended:
                return ""
            self.more()

    def value(self) -> Any:
        """The value that begins here; the window grows until it holds it whole."""
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.place)
            except (ValueError, RecursionError) as error:
                if self.ended or not self.may_go_on(error):
                    self.fail(error)
            else:
                if end + MARGIN < len(self.text) or self.ended:  # `12` may be the beginning of `12.5`
                    self.at = end
                    return value
            self.more()
            self.place = 0

    def may_go_on(self, error: ValueError | RecursionError) -> bool:
        """Whether more text may mend the error."""
        if not isinstance(error, json.JSONDecodeError):
            return False
        near = error.pos + MARGIN >= len(self.text)
        open_ = "escape" in error.msg and '"' not in self.text[error.pos :]
        return near or open_ or error.msg.startswith("Unterminated string")

    def fail(self, error: ValueError | RecursionError) -> NoReturn:
        fail(self.path, syntax(error, self.text, None, (self.line, self.column)))


def syntax(error: ValueError | RecursionError, text: str, line: int | None, before: tuple[int, int] = (0, 0)) -> str:
    """What is wrong with JSON `text`, with line and column.

    line: the line that `text` is in a jsonl file. before: the lines of the file in front of `text`, and the
    characters in front of it on its first line.
    """
    if not isinstance(error, json.JSONDecodeError):
        place = f"line {line}: " if line else ""
        return f"{place}JSON that can't be read ({error}); a row holds only short lists and text"
    end = text.rstrip()
    rest = end[error.pos :]
    short = error.msg.startswith("Unterminated string") or ("escape" in error.msg and '"' not in rest)
    if short or any(word.startswith(rest) for word in ("true", "false", "null", "NaN", "-Infinity")):
        last = line or before[0] + end.count("\n") + 1
        where = f"line {last}, column {len(end) - end.rfind(chr(10)) + before[1] * (chr(10) not in end)}"
        what = "the line" if line else "the file"
        return f"the JSON stops too soon, at {where}; {what} was cut short or a bracket or quote is missing"
    where = f"line {line or before[0] + error.lineno}, column {error.colno + before[1] * (error.lineno == 1)}"
    if error.msg == "Extra data":
        mend = "write one object a line" if line else "put all rows in one [ ... ], with commas between"
        return f"{where}: more text after the end of the JSON; {mend}"
    if error.msg.startswith("Invalid control character"):
        return f"{where}: a raw line break or tab inside a string; write \\n or \\t, or close the quote"
    message = error.msg[0].lower() + error.msg[1:]
    return f"{where}: not JSON: {message.removesuffix(' at')}; mend it there (a comma or a quote, often)"
