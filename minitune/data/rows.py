"""A file of rows, whatever it is written in: json, jsonl, csv or parquet -> numbered rows, one at a time.

What a row means is the business of `forms`; here are only encodings, syntax and where in the file a fault is.
"""

from __future__ import annotations

import csv
import difflib
import itertools
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from minitune.config import UserError

BOM = b"\xef\xbb\xbf"
SUFFIXES = {".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv"}
SUFFIXES |= {".parquet": "parquet", ".pq": "parquet"}
FOREIGN = {
    b"PK\x03\x04": "a zip archive or an Excel workbook; unpack it, or save it from Excel as `CSV UTF-8`",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook; save it from Excel as `CSV UTF-8`",
    b"\x1f\x8b": "compressed with gzip; unpack it with `gunzip`",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it with `unzstd`",
}


@dataclass
class Rows:
    """The rows of one file. `items` yields (number, row) once; a row is what stands there, unchecked."""

    kind: str
    items: Iterator[tuple[int, Any]]
    notes: list[str] = field(default_factory=list)
    header: tuple[str, ...] | None = None

    @property
    def unit(self) -> str:
        """What `number` counts: the lines of a jsonl file, the records of any other."""
        return "line" if self.kind == "jsonl" else "row"


def fail(path: Path, message: str) -> NoReturn:
    """Raise the UserError for `path`, on one line and printable whatever the file's own words hold."""
    text = f"{path}: {message}".encode("utf-8", "backslashreplace").decode("utf-8")
    raise UserError(" ".join(text.splitlines()))


def read_rows(path: Path) -> Rows:
    """Open `path` as what it holds (the content decides where the name says otherwise, with a note)."""
    try:
        kind, named = _kind(path), SUFFIXES.get(path.suffix.lower())
        rows = {"json": _json, "jsonl": _jsonl, "csv": _csv, "parquet": _parquet}[kind](path)
    except FileNotFoundError:
        _missing(path)
    except IsADirectoryError:
        fail(path, "a folder, not a file; name one json, jsonl, csv or parquet file")
    except OSError as error:
        fail(path, f"can't be read: {error.strerror or error}")
    if named and rows.kind != named:
        rows.notes.insert(0, f"{path.name} is named {path.suffix} and holds {rows.kind}: read as {rows.kind}")
    return rows


def _missing(path: Path) -> NoReturn:
    if not path.parent.is_dir():
        fail(path, f"no such file: there is no folder {path.parent}")
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir() if p.is_file()], n=1)
    fail(path, "no such file" + (f"; did you mean {path.parent / near[0]}?" if near else "; check the path"))


def _kind(path: Path) -> str:
    named = SUFFIXES.get(path.suffix.lower())
    with path.open("rb") as file:
        head = file.read(4096)
        if not head:
            fail(path, "the file is empty; it needs at least one conversation")
        if head.startswith(b"PAR1") or named == "parquet":
            return "parquet"
        for magic, what in FOREIGN.items():
            if head.startswith(magic):
                fail(path, f"this is {what}")
        start = head.removeprefix(BOM).lstrip()[:1]
        if start == b"[":
            return "json"
        if start == b"{":
            file.seek(0)
            lines = (line.removeprefix(BOM).strip() for line in file)
            first = next(line for line in lines if line)
            if named == "jsonl":
                return "json" if first == b"{" else "jsonl"
            return "jsonl" if _is_object(first) and any(lines) else "json"
    if named is None:
        fail(path, "not recognised as json, jsonl, csv or parquet; name it with the ending of what it holds")
    return named


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _not_utf8(path: Path) -> NoReturn:
    """Where the first wrong byte is, and what the file probably is instead."""
    data = path.read_bytes()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        fail(path, f"not UTF-8 but UTF-16; {_iconv('utf-16', path)}")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        at, end, cut = error.start, error.end, error.reason == "unexpected end of data"
    else:
        fail(path, "changed while it was being read; try again")
    line = data.count(b"\n", 0, at) + 1
    place = f"byte {at} (offset from 0), line {line}"
    if cut and end == len(data):
        fail(path, f"not UTF-8: {place}: it ends inside a character; it was cut short, so get it again")
    # Chinese that has already read well as UTF-8 (three bytes a character) is UTF-8 with damage, never GBK.
    if all(c <= "\u07ff" for c in data[:at].decode("utf-8")):
        for encoding in ("gbk", "gb18030"):
            try:
                data.decode(encoding)
            except UnicodeDecodeError:
                continue
            fail(path, f"not UTF-8: {place}; it reads as {encoding.upper()}; {_iconv(encoding, path)}")
    fail(path, f"not UTF-8: {place}; save the file as UTF-8, or mend the damage there")


def _iconv(encoding: str, path: Path) -> str:
    new = path.with_suffix(f".utf8{path.suffix}")
    return f"convert it: `iconv -f {encoding} -t utf-8 {shlex.quote(str(path))} > {shlex.quote(str(new))}`"


def _syntax(error: ValueError | RecursionError, text: str, line: int | None) -> str:
    """What is wrong with JSON `text`, with line and column; `line` is its line in a jsonl file."""
    if not isinstance(error, json.JSONDecodeError):
        place = f"line {line}: " if line else ""
        return f"{place}JSON that can't be read ({error}); a row holds only short lists and text"
    end = text.rstrip()
    rest = end[error.pos :]
    short = error.msg.startswith("Unterminated string") or ("escape" in error.msg and '"' not in rest)
    if short or any(word.startswith(rest) for word in ("true", "false", "null", "NaN", "-Infinity")):
        last = line or end.count("\n") + 1
        where = f"line {last}, column {len(end) - end.rfind(chr(10))}"
        what = "the line" if line else "the file"
        return f"the JSON stops too soon, at {where}; {what} was cut short or a bracket or quote is missing"
    where = f"line {line or error.lineno}, column {error.colno}"
    if error.msg == "Extra data":
        mend = "write one object a line" if line else "put all rows in one [ ... ], with commas between"
        return f"{where}: more text after the end of the JSON; {mend}"
    if error.msg.startswith("Invalid control character"):
        return f"{where}: a raw line break or tab inside a string; write \\n or \\t, or close the quote"
    message = error.msg[0].lower() + error.msg[1:]
    return f"{where}: not JSON: {message.removesuffix(' at')}; mend it there (a comma or a quote, often)"


def _json(path: Path) -> Rows:
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if not text.strip():
            fail(path, "the file is empty; it needs at least one conversation")
        loaded = json.loads(text)
    except UnicodeDecodeError:
        _not_utf8(path)
    except (ValueError, RecursionError) as error:
        fail(path, _syntax(error, text, None))
    notes: list[str] = []
    if isinstance(loaded, dict):
        loaded, notes = _unwrap(path, loaded)
    if not isinstance(loaded, list):
        fail(path, "holds one bare value; rows are objects in one [ ... ]")
    return Rows("json", _drain(loaded), notes)


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


def _drain(rows: list[Any]) -> Iterator[tuple[int, Any]]:
    """Numbered rows, each let go as it is handed out: raw rows and conversations never all coexist."""
    rows.reverse()
    for number in range(1, len(rows) + 1):
        yield number, rows.pop()


def _jsonl(path: Path) -> Rows:
    def items() -> Iterator[tuple[int, Any]]:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip()
                    if not line:
                        continue
                    row = json.loads(line)
                except UnicodeDecodeError:
                    _not_utf8(path)
                except (ValueError, RecursionError) as error:
                    fail(path, _syntax(error, line, number))
                yield number, row

    return Rows("jsonl", items())


def _csv(path: Path) -> Rows:
    # The module's limit of 131,072 characters a cell would refuse a long conversation.
    csv.field_size_limit(2**31 - 1)

    def records() -> Iterator[list[str]]:
        with path.open(encoding="utf-8-sig", newline="") as file:
            start = skipped = 0
            try:
                skipped, first = next(((n, line) for n, line in enumerate(file) if line.strip()), (0, ""))
                delimiter = max(",;\t", key=first.count)
                reader = csv.reader(itertools.chain([first], file), delimiter=delimiter, strict=True)
                for cells in reader:
                    start = reader.line_num
                    if cells:
                        yield cells
            except UnicodeDecodeError:
                _not_utf8(path)
            except csv.Error as error:
                what = "a quoted text that is never closed" if "end of data" in str(error) else f"{error}"
                where = f"line {skipped + start + 1}"
                fail(path, f"{where}: not CSV: {what}; quote a whole cell and double the quotes inside it")

    def items() -> Iterator[tuple[int, Any]]:
        for number, cells in enumerate(rest, 1):
            if len(cells) > len(header):
                why = "put a text that holds the separator in double quotes"
                fail(path, f"row {number}: {len(cells)} cells under a header of {len(header)} names; {why}")
            yield number, dict(zip(header, cells, strict=False))

    rest = records()
    header = tuple(name.strip() for name in next(rest, []))
    if not header:
        fail(path, "the file is empty; it needs a header and at least one conversation")
    twice = next((name for name in header if name and header.count(name) > 1), None)
    if twice:
        fail(path, f"the header names `{twice}` twice; rename or delete one column")
    return Rows("csv", items(), header=header)


def _parquet(path: Path) -> Rows:
    with path.open("rb"):
        pass  # a missing or unreadable file is said before a missing library
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        fail(path, "reading parquet needs pyarrow: `pip install pyarrow`, or save the data as jsonl")

    def items() -> Iterator[tuple[int, Any]]:
        number = 0
        try:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
        except UnicodeDecodeError:
            fail(path, f"after row {number}: a text that is not UTF-8; write the file again with UTF-8 text")
        except (pa.ArrowException, OSError) as error:
            fail(path, f"after row {number}: parquet that can't be read ({error}); write the file again")

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        fail(path, f"not a whole parquet file ({error}); get or write it again")
    return Rows("parquet", items())
