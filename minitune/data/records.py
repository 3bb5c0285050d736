"""A file of conversations -> validated conversations, in one shape whatever form they were written in.

Every row is looked at before any is learned from. One that can't be learned from is refused with its number
and the mend. `rows` reads the file, `forms` understands a row; here is the pass over both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minitune.config import UserError
from minitune.data.forms import Form, Message, RowFault, convert, listing, present, recognise
from minitune.data.rows import Rows, fail, read_rows

__all__ = ["Conversation", "Message", "Records", "load"]


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


def load(path: str | Path, *, join: str = "") -> Records:
    """Every conversation of a json, jsonl, csv or parquet file; `join` stands between instruction and input.

    Contents are kept as written (the template strips). Raises UserError, one line, for anything that can't be
    learned from: the first such row, and how many more have the same fault.
    """
    path = Path(path)
    rows = read_rows(path)
    shapes: dict[tuple[str, ...], tuple[Form, tuple[str, ...]]] = {}
    unused: dict[str, None] = {}
    conversations: list[Conversation] = []
    faults: list[tuple[int, RowFault]] = []
    form: Form | None = None
    first = 0
    if rows.header is not None:
        try:
            recognise(rows.header)
        except RowFault as fault:
            fail(path, f"the header: {fault.problem}; {fault.mend}")
    try:
        for number, row in rows.items:
            try:
                row = present(row)
                keys = tuple(row)
                if keys not in shapes:
                    shapes[keys] = recognise(keys)
                found, extra = shapes[keys]
                if form is None:
                    form, first = found, number
                elif found is not form:
                    raise other_form(found, form, f"{rows.unit} {first}")
                unused |= dict.fromkeys(extra)
                messages = convert(row, found, join, unused)
                conversations.append(Conversation(messages, path.name, number))
            except RowFault as fault:
                faults.append((number, fault))
    except UserError:
        if not faults:  # otherwise the fault that stands first in the file is said first
            raise
    if faults:
        fail(path, describe(faults, rows.unit))
    if form is None:
        fail(path, "holds no rows; it needs at least one conversation")
    return Records(conversations, form.name, notes(rows, form, len(conversations), list(unused)))


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
