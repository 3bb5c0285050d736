"""A file of conversations -> validated conversations, in one shape whatever form they were written in.

A row that can't be learned from is a fault with its number and the mend. `rows` reads the file, `forms` understands
a row; here is the pass over both: `stream` a row at a time, `load` all of them or the first fault.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitune.config import UserError
from minitune.data.forms import Form, Message, RowFault, convert, listing, present, recognise
from minitune.data.rows import Rows, fail, read_rows
from minitune.data.source import Unread

__all__ = ["Conversation", "Message", "Records", "Stream", "load", "stream"]


@dataclass(frozen=True, slots=True)
class Conversation:
    """An optional system text, then user and assistant turns alternating, the last one the assistant's.

    `source` is the file's name; `row` its 1-based row (json, parquet), line (jsonl) or record (csv, the
    header not counted).
    """

    messages: tuple[Message, ...]
    source: str
    row: int


@dataclass(frozen=True, slots=True)
class Records:
    """What a file holds. `form`: alpaca, messages or sharegpt; `notes`: what a person should be told."""

    conversations: list[Conversation]
    form: str
    notes: list[str]


class Stream:
    """The conversations of a file, one at a time: memory does not grow with the file (unless it is one JSON object).

    Iterating yields the rows that can be learned from; the others are in `faults` as (number, fault), in the file's
    order, as far as the file has been read. A second iteration reads the file again. What can't be read at all
    raises UserError: where the stream is made, or at the place in the file; so does a file without rows at its end.

    kind: json, jsonl, csv or parquet. unit: what a number counts, `line` or `row`. form: alpaca, messages or sharegpt
    ("" before the first row). fraction: the share of the file that has been read, for a progress bar.
    """

    def __init__(self, path: str | Path, *, join: str = ""):
        self.path, self.join = Path(path), join
        self._open()

    def _open(self) -> None:
        self._rows = read_rows(self.path)
        self._fresh = True
        self._form: Form | None = None
        self._first = 0
        self._unused: dict[str, None] = {}
        self._shapes: dict[tuple[str, ...], tuple[Form, tuple[str, ...]]] = {}
        self.count = 0
        self.faults: list[tuple[int, RowFault]] = []
        if self._rows.header is not None:
            try:
                recognise(self._rows.header)
            except RowFault as fault:
                fail(self.path, f"the header: {fault.problem}; {fault.mend}")

    @property
    def kind(self) -> str:
        return self._rows.kind

    @property
    def unit(self) -> str:
        return self._rows.unit

    @property
    def form(self) -> str:
        return self._form.name if self._form else ""

    @property
    def fraction(self) -> float:
        return self._rows.progress()

    @property
    def notes(self) -> list[str]:
        """What was read and as what, and what was left aside; whole when the file has been read to its end."""
        return notes(self._rows, self._form, self.count, list(self._unused)) if self._form else list(self._rows.notes)

    def __iter__(self) -> Iterator[Conversation]:
        return (found for _, _, found in self.outcomes() if isinstance(found, Conversation))

    def outcomes(self, lenient: bool = False) -> Iterator[tuple[int, Any, Conversation | RowFault]]:
        """(number, the row as it stands in the file, what came of it) of every row.

        lenient: a broken line of a jsonl file is a fault like any other and its row an `Unread`.
        """
        if not self._fresh:
            self._open()
        self._fresh = False
        self._rows.lenient = lenient
        name = self.path.name
        alike: dict[tuple[str, str, str], RowFault] = {}
        for number, row in self._rows.items:
            try:
                messages = self._messages(number, row)
            except RowFault as fault:
                # Without its traceback, which holds the row; one object for all of a kind.
                key = (fault.problem, fault.mend, fault.at)
                same = alike.setdefault(key, RowFault(*key))
                self.faults.append((number, same))
                yield number, row, same
                continue
            self.count += 1
            yield number, row, Conversation(messages, name, number)
        if not self.count and not self.faults:
            fail(self.path, "holds no rows; it needs at least one conversation")

    def _messages(self, number: int, row: Any) -> tuple[Message, ...]:
        if isinstance(row, Unread):
            raise RowFault(f"is not JSON: {row.problem}", "mend the line (a comma or a quote, often) or delete it")
        row = present(row)
        keys = tuple(row)
        if keys not in self._shapes:
            shape = recognise(keys)
            if len(self._shapes) < 1000:  # rows with keys of their own must not fill the memory
                self._shapes[keys] = shape
        else:
            shape = self._shapes[keys]
        found, extra = shape
        if self._form is None:
            self._form, self._first = found, number
        elif found is not self._form:
            raise other_form(found, self._form, f"{self.unit} {self._first}")
        if extra:
            self._unused |= dict.fromkeys(extra)
        return convert(row, found, self.join, self._unused)


def stream(path: str | Path, join: str = "") -> Stream:
    """The conversations of a json, jsonl, csv or parquet file one at a time; see Stream."""
    return Stream(path, join=join)


def load(path: str | Path, *, join: str = "") -> Records:
    """Every conversation of a json, jsonl, csv or parquet file; `join` stands between instruction and input.

    Contents are kept as written (the template strips). Raises UserError, one line, for anything that can't be
    learned from: the first such row, and how many more have the same fault.
    """
    rows = Stream(path, join=join)
    conversations: list[Conversation] = []
    try:
        conversations.extend(rows)
    except UserError:
        if not rows.faults:  # otherwise the fault that stands first in the file is said first
            raise
    refuse(rows)
    return Records(conversations, rows.form, rows.notes)


def refuse(rows: Stream) -> None:
    """Raises the UserError of a stream that met faults."""
    if rows.faults:
        fail(rows.path, describe(rows.faults, rows.unit))


def describe(faults: Sequence[tuple[int, RowFault]], unit: str) -> str:
    """The first fault, with the number of rows that have the same."""
    number, fault = faults[0]
    more = [n for n, other in faults[1:] if other.problem == fault.problem]
    tail = f" ({len(more)} more such: {unit}" if more else ""
    tail += f"{'s' if len(more) > 1 else ''} {', '.join(map(str, more[:3]))}" if more else ""
    tail += (", ...)" if len(more) > 3 else ")") if more else ""
    at = f", {fault.at}" if fault.at else ""
    return f"{unit} {number}{at}: {fault.problem}; {fault.mend}{tail}"


def notes(rows: Rows, form: Form, count: int, unused: list[str]) -> list[str]:
    """What was read and as what, and what was left aside."""
    read = f"{count:,} conversation{'s' * (count != 1)}"
    out = [f"{read} of the {form.name} form ({', '.join(form.needed)}), {rows.kind}", *rows.notes]
    if unused:
        out.append(f"not used: {listing(unused)}")
    return out


def other_form(found: Form, form: Form, where: str) -> RowFault:
    problem = f"is written with {listing(found.needed)}, but {where} with {listing(form.needed)}"
    return RowFault(problem, "keep one form in a file")
