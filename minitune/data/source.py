"""What the readers of files share: numbered rows, the one-line failure, and what bytes that are no UTF-8 may be."""

from __future__ import annotations

import codecs
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from minitune.config import UserError

CHUNK = 1 << 20
WIDE = re.compile("[\u0800-\U0010ffff]")  # three bytes or more in UTF-8


@dataclass(frozen=True)
class Unread:
    """A line that is no JSON, where the reader was asked to go on behind it: the line, and what is wrong."""

    line: str
    problem: str


@dataclass
class Rows:
    """The rows of one file. `items` yields (number, row) once; a row is what stands there, unchecked.

    progress: the share of the file that has been read, 0 to 1, at any moment.
    lenient: a broken line of a jsonl file is handed out as `Unread` instead of ending the reading.
    """

    kind: str
    items: Iterator[tuple[int, Any]]
    notes: list[str] = field(default_factory=list)
    header: tuple[str, ...] | None = None
    progress: Callable[[], float] = lambda: 0.0
    lenient: bool = False

    @property
    def unit(self) -> str:
        """What `number` counts: the lines of a jsonl file, the records of any other."""
        return "line" if self.kind == "jsonl" else "row"


def fail(path: Path, message: str) -> NoReturn:
    """Raise the UserError for `path`, on one line and printable whatever the file's own words hold."""
    text = f"{path}: {message}".encode("utf-8", "backslashreplace").decode("utf-8")
    raise UserError(" ".join(text.splitlines()))


def share_read(file: BinaryIO, path: Path) -> Callable[[], float]:
    """`Rows.progress` of a file that is read from its beginning to its end."""
    size = max(1, path.stat().st_size)
    return lambda: 1.0 if file.closed else file.tell() / size


def not_utf8(path: Path) -> NoReturn:
    """Where the first wrong byte is, and what the file probably is instead."""
    with path.open("rb") as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            fail(path, f"not UTF-8 but UTF-16; {_iconv('utf-16', path)}")
    at, line, cut, wide = _first_wrong(path)
    place = f"byte {at} (offset from 0), line {line}"
    if cut:
        fail(path, f"not UTF-8: {place}: it ends inside a character; it was cut short, so get it again")
    # Chinese that has already read well as UTF-8 (three bytes a character) is UTF-8 with damage, never GBK.
    for encoding in () if wide else ("gbk", "gb18030"):
        if _reads_as(path, encoding):
            fail(path, f"not UTF-8: {place}; it reads as {encoding.upper()}; {_iconv(encoding, path)}")
    fail(path, f"not UTF-8: {place}; save the file as UTF-8, or mend the damage there")


def _first_wrong(path: Path) -> tuple[int, int, bool, bool]:
    """(the first wrong byte, its line, whether the file ends inside a character, whether a wide one stands before)."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    read, line, wide = 0, 1, False
    for data in _chunks(path):
        held = decoder.getstate()[0]
        try:
            text = decoder.decode(data, not data)
        except UnicodeDecodeError as error:
            good = (held + data)[: error.start].decode("utf-8")
            wide = wide or WIDE.search(good) is not None
            cut = error.reason == "unexpected end of data"
            return read - len(held) + error.start, line + good.count("\n"), cut, wide
        read += len(data)
        line += text.count("\n")
        wide = wide or WIDE.search(text) is not None
    fail(path, "changed while it was being read; try again")


def _reads_as(path: Path, encoding: str) -> bool:
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        for data in _chunks(path):
            decoder.decode(data, not data)
    except UnicodeDecodeError:
        return False
    return True


def _chunks(path: Path) -> Iterator[bytes]:
    """The file's bytes, and an empty chunk at its end."""
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            yield data
    yield b""


def _iconv(encoding: str, path: Path) -> str:
    new = path.with_suffix(f".utf8{path.suffix}")
    return f"convert it: `iconv -f {encoding} -t utf-8 {shlex.quote(str(path))} > {shlex.quote(str(new))}`"
