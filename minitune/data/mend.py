"""`data check --fix`: a mended copy in the input's kind, form and order, and a log with one line a change.

What is mended without asking loses nothing that was meant: copies, rows that say nothing, characters that nobody
sees. What needs a person's word is mended only where it is named.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from minitune.config import TrainConfig, UserError
from minitune.data import findings, personal, records
from minitune.data.check import Watch, question_key, row_key, unwatched
from minitune.data.findings import (
    FIX_ALSO,
    Marks,
)
from minitune.data.forms import Message, RowFault, convert, present, recognise
from minitune.data.html import writing
from minitune.data.report import Report
from minitune.data.rows import BOM, SUFFIXES
from minitune.data.source import Unread

# The keys whose texts are learned from, whatever the form.
TEXTS = ("instruction", "input", "output", "query", "response", "prompt", "completion", "system")
COLOURS = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")  # a terminal's commands go whole, not their first character only
TURNS = ("messages", "conversations", "history")


@dataclass
class Mended:
    """What became of the rows. `changed` counts rows by what was done to them."""

    output: Path
    log: Path
    written: int = 0
    changed: Counter[str] = field(default_factory=Counter)

    def as_json(self) -> dict[str, Any]:
        return {"output": str(self.output), "log": str(self.log), "rows": self.written, "changed": dict(self.changed)}

    def lines(self) -> list[str]:
        head = f"{self.output}: {self.written:,} rows; {self.log.name} has a line for each change"
        return [head, *(f"  {count:,} × {what}" for what, count in self.changed.most_common())]


def parse_also(text: str) -> frozenset[str]:
    """The names in a --fix_also list. UserError for a name that is none."""
    names = [name for name in re.split(r"[,\s]+", text.strip().lower()) if name]
    for name in names:
        if name not in (*FIX_ALSO, "all"):
            raise UserError(f"--fix_also: unknown {name!r}; there are {', '.join(FIX_ALSO)}, and all")
    return frozenset(FIX_ALSO if "all" in names else names)


def log_of(output: Path) -> Path:
    return output.with_name(f"{output.name}.log.jsonl")


def check_target(output: Path, source: Path) -> None:
    """Refuses, before anything is read, an OUT that is there already, has no folder, or names another kind."""
    for path in (output, log_of(output)):
        if path.exists():
            raise UserError(f"--fix {path}: is there already; name a file that is not")
    if not output.parent.is_dir():
        raise UserError(f"--fix {output}: there is no folder {output.parent}")
    named = SUFFIXES.get(output.suffix.lower())
    if named not in ("json", "jsonl", "csv"):
        raise UserError(f"--fix {output}: name it .json, .jsonl or .csv, as {source.name} is")


def mend(
    config: TrainConfig, report: Report, output: Path, also: frozenset[str] = frozenset(), watch: Watch = unwatched
) -> Mended:
    """Writes `output` and its log, both whole or neither. also: names of FIX_ALSO. UserError: another kind of file."""
    named = SUFFIXES.get(output.suffix.lower())
    if named != report.kind and not (report.kind == "parquet" and named in ("json", "jsonl")):
        wanted = ".jsonl" if report.kind == "parquet" else f".{report.kind}"
        raise UserError(f"--fix {output}: {report.file} holds {report.kind}; name it {wanted}")
    mended = Mended(output, log_of(output))
    stream = records.stream(config.data, config.template.join)
    mender = Mender(report, also, config.template.join)
    with ExitStack() as files:
        out, log = (files.enter_context(writing(path)) for path in (mended.output, mended.log))
        writer = Writer(out, str(named), Path(config.data))
        rows = watch("mending", lambda: stream.fraction, stream.outcomes(lenient=True))
        for number, row, found in rows:
            kept, changes = mender.row(number, row, found)
            for what, at, before, after in changes:
                entry = {report.unit: number, "what": what} | ({"at": at} if at else {})
                log.write(
                    json.dumps(entry | {"before": plain(before), "after": plain(after)}, ensure_ascii=False) + "\n"
                )
            mended.changed.update(sorted({what for what, *_ in changes}))
            if kept is not None:
                writer.row(kept)
                mended.written += 1
        writer.end()
        if not mended.written:
            raise UserError(f"--fix {output}: no row would be left; nothing was written")
    return mended


def plain(value: Any) -> Any:
    """A row or text as the log shows it."""
    if isinstance(value, Unread):
        value = value.line
    return json.loads(json.dumps(value, default=str).encode("utf-8", "replace"))


# What was done, where in the row (nothing: the whole of it), and the text or row before and after.
Change = tuple[str, str, Any, Any]


class Mender:
    """Row by row: what is kept of it, and what was changed."""

    def __init__(self, report: Report, also: frozenset[str], join: str):
        self.report, self.also, self.join = report, also, join
        self.seen: set[int] = set()
        self.answered: dict[int, int] = {}
        self.marks = Marks.of() if report.marks is None else report.marks

    def row(self, number: int, row: Any, found: Any) -> tuple[Any, list[Change]]:
        """(the row as it is to be written, or None; the changes)."""
        if isinstance(found, RowFault):
            blank = found.problem.endswith(" is empty")
            if blank or "unreadable" in self.also:
                return None, [("dropped: nothing to learn" if blank else f"dropped: {found.problem}", "", row, None)]
            return row, []
        changes: list[Change] = []

        def mended(text: str, at: str) -> str:
            for what, change in self.changes():
                after = change(text)
                if after != text:
                    changes.append((what, at, text, after))
                    text = after
            return text

        if any(findings.LOST.search(m.content) for m in found.messages):
            return None, [("dropped: text that was lost", "", row, None)]
        new = in_texts(row, mended)
        try:
            messages = read(new, self.join) if changes else found.messages
        except RowFault as fault:
            return None, [*changes, (f"dropped: {fault.problem}", "", row, None)]
        reason = self.unwanted(number, messages)
        return (None, [*changes, (f"dropped: {reason}", "", row, None)]) if reason else (new, changes)

    def changes(self) -> Iterator[tuple[str, Callable[[str], str]]]:
        yield "control characters deleted", control_deleted
        yield "line ends written as LF", lambda text: text.replace("\r\n", "\n")
        yield "unseen characters deleted", unseen_deleted
        if "markers" in self.also:
            yield "marks deleted", lambda text: self.marks.pattern.sub("", text)
        if "personal" in self.also:
            yield "personal data masked", personal.mask
        yield "white space stripped", str.strip

    def unwanted(self, number: int, messages: tuple[Message, ...]) -> str:
        """Why a row that can be learned from is left out; nothing where it is kept."""
        key = row_key(messages)
        if key in self.report.held:
            return "it is held out"
        if key in self.seen:
            return "repeats an earlier row"
        self.seen.add(key)
        if "near" in self.also and number in self.report.near:
            return "nearly repeats an earlier row"
        if "conflicts" in self.also:
            question, answer = question_key(messages), hash(messages[-1].content.strip())
            if self.answered.setdefault(question, answer) != answer:
                return "answers an earlier question otherwise"
        return ""


def read(row: Any, join: str) -> tuple[Message, ...]:
    """The messages of a row that was changed."""
    row = present(row)
    return convert(row, recognise(tuple(row))[0], join, {})


def control_deleted(text: str) -> str:
    """Those that broke a line become line feeds; in text that was decoded wrongly they are parts of letters: left."""
    if text.isprintable() or findings.mojibake(text):
        return text
    return findings.CONTROL.sub(lambda c: "\n" if c[0] in "\r\x0b\x0c\x85" else "", COLOURS.sub("", text))


def unseen_deleted(text: str) -> str:
    before = ""
    while text != before:  # a joiner may come to stand beside a letter where there was something between
        before, text = text, findings.INVISIBLE.sub("", text)
        if not findings.RIGHT_TO_LEFT.search(text):
            text = findings.MARKS_OF_DIRECTION.sub("", text)
    return text


def in_texts(row: dict[str, Any], change: Callable[[str, str], str]) -> dict[str, Any]:
    """The row with `change(text, its place)` for each text of the conversation; everything else as it was."""
    out = dict(row)
    for key in TEXTS:
        if isinstance(row.get(key), str):
            out[key] = change(row[key], key)
    for key in TURNS:
        turns = row.get(key)
        if isinstance(turns, str) and turns.strip():  # the cell of a table
            before = json.loads(turns)
            after = _turns(before, key, change)
            out[key] = turns if after == before else json.dumps(after, ensure_ascii=False)
        elif isinstance(turns, list):
            out[key] = _turns(turns, key, change)
    return out


def _turns(turns: list[Any], name: str, change: Callable[[str, str], str]) -> list[Any]:
    out: list[Any] = []
    for i, turn in enumerate(turns):
        at = f"{name}[{i}]"
        if isinstance(turn, list):  # a pair of `history`
            out.append([change(text, at) if isinstance(text, str) else text for text in turn])
            continue
        turn = dict(turn)
        for key in ("content", "value"):
            if isinstance(turn.get(key), str):
                turn[key] = change(turn[key], f"{at}.{key}")
            elif isinstance(turn.get(key), list):
                turn[key] = [part | {"text": change(part["text"], f"{at}.{key}")} for part in turn[key]]
        out.append(turn)
    return out


class Writer:
    """Rows -> a file of one kind, laid out as the source is: a json's indent, a csv's separator and header."""

    def __init__(self, out: TextIO, kind: str, source: Path):
        self.out, self.kind, self.count = out, kind, 0
        with source.open("rb") as file:
            head = file.read(65536).decode("utf-8-sig", "ignore")
        if kind == "csv" and file_has_mark(source):  # Excel knows UTF-8 by it
            out.write("\ufeff")
        found = re.match(r"\s*[\[{]\s*?\n([ \t]*)[\[{\"]", head)
        indent = found[1] if found else ""
        self.indent: int | str | None = len(indent) if not indent.strip(" ") else indent
        if not re.match(r"\s*\[\s*?\n\s*\{\s*?\n", head):
            self.indent = None  # a row a line
        self.table: Any = None
        if kind == "csv":
            first = next((line for line in head.splitlines() if line.strip()), "")
            self.delimiter = max(",;\t", key=first.count)
            self.names = list(
                next(csv.reader(io.StringIO(head[head.index(first) :], newline=""), delimiter=self.delimiter))
            )

    def row(self, row: Any) -> None:
        if self.kind == "csv":
            if self.table is None:
                self.table = csv.writer(self.out, delimiter=self.delimiter, lineterminator="\n")
                self.table.writerow(self.names)
            self.table.writerow([row.get(name.strip(), "") for name in self.names][: max(len(row), 1)])
        elif self.kind == "jsonl":
            self.out.write((row.line if isinstance(row, Unread) else dumped(row)) + "\n")
        else:
            text = dumped(row, self.indent)
            if self.indent is not None:
                space = self.indent if isinstance(self.indent, str) else " " * self.indent
                text = "\n".join(space + line for line in text.split("\n"))
            self.out.write(("[\n" if not self.count else ",\n") + text)
        self.count += 1

    def end(self) -> None:
        if self.kind == "json":
            self.out.write("\n]\n" if self.count else "[]\n")


def file_has_mark(source: Path) -> bool:
    with source.open("rb") as file:
        return file.read(3) == BOM


def dumped(row: Any, indent: int | str | None = None) -> str:
    """JSON as people read it; half a character can only be written as its code."""
    text = json.dumps(row, ensure_ascii=False, indent=indent, default=str)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(row, indent=indent, default=str)
    return text
