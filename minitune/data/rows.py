"""A file of rows, whatever it is written in: json, jsonl, csv or parquet -> numbered rows, one at a time.

What a row means is the business of `forms`; here are only encodings, syntax and where in the file a fault is.
"""

from __future__ import annotations

import csv
import difflib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from minitune.data.json_rows import read_json, read_jsonl
from minitune.data.source import Rows, fail, not_utf8, share_read

BOM = b"\xef\xbb\xbf"
SUFFIXES = {".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv"}
SUFFIXES |= {".parquet": "parquet", ".pq": "parquet"}
FOREIGN = {
    b"PK\x03\x04": "a zip archive or an Excel workbook; unpack it, or save it from Excel as `CSV UTF-8`",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook; save it from Excel as `CSV UTF-8`",
    b"\x1f\x8b": "compressed with gzip; unpack it with `gunzip`",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it with `unzstd`",
}


def read_rows(path: Path) -> Rows:
    """Open `path` as what it holds (the content decides where the name says otherwise, with a note)."""
    try:
        kind, named = _kind(path), SUFFIXES.get(path.suffix.lower())
        rows = {"json": read_json, "jsonl": read_jsonl, "csv": _csv, "parquet": _parquet}[kind](path)
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


def _csv(path: Path) -> Rows:
    # The module's limit of 131,072 characters a cell would refuse a long conversation.
    csv.field_size_limit(2**31 - 1)
    opened: list[BinaryIO] = []

    def records() -> Iterator[list[str]]:
        with path.open(encoding="utf-8-sig", newline="") as file:
            start = skipped = 0
            opened.append(file.buffer)  # type: ignore[arg-type]
            try:
                skipped, first = next(((n, line) for n, line in enumerate(file) if line.strip()), (0, ""))
                delimiter = max(",;\t", key=first.count)
                reader = csv.reader(itertools.chain([first], file), delimiter=delimiter, strict=True)
                for cells in reader:
                    start = reader.line_num
                    if cells:
                        yield cells
            except UnicodeDecodeError:
                not_utf8(path)
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
    return Rows("csv", items(), header=header, progress=share_read(opened[0], path))


def _parquet(path: Path) -> Rows:
    with path.open("rb"):
        pass  # a missing or unreadable file is said before a missing library
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        fail(path, "reading parquet needs pyarrow: `pip install pyarrow`, or save the data as jsonl")

    def items() -> Iterator[tuple[int, Any]]:
        number, every = 0, max(1, file.metadata.num_rows)
        rows.progress = lambda: number / every
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
    rows = Rows("parquet", items())
    return rows
