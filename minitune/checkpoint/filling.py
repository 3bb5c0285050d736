"""Parameters filled from safetensors files by several threads, each through one piece of memory of its own.

Read so, a file in the page cache comes several times faster than through a mapping (a fault every 4 KiB, one thread),
and the memory that it takes is bounded by the pieces. On a card the pieces are pinned and copied by a stream of their
own; the card itself casts and lays rows apart.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from minitune.config import UserError
from minitune.model.four_bits import Rounding

PIECE = 32 << 20  # bytes of a file that a thread holds at a time
THREADS = 8  # on a card; on a CPU as many as its cores, at most
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in a safetensors file. offset: bytes from the file's beginning."""

    name: str
    path: Path
    dtype: torch.dtype
    shape: torch.Size
    offset: int


def entries(path: Path) -> dict[str, Entry]:
    """{name: where it lies}, of a file whose header was checked; without scalars, and dtypes that are not in DTYPES."""
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
    return {
        name: Entry(name, path, DTYPES[told["dtype"]], torch.Size(told["shape"]), start + told["data_offsets"][0])
        for name, told in header.items()
        if name != "__metadata__" and told["dtype"] in DTYPES and told["shape"]
    }


Place = Tensor | Rounding


class Abandoned(Exception):
    """Whoever asked for the tensors no longer wants them."""


@dataclass(frozen=True)
class Piece:
    """Rows of a tensor that lie end to end in a file, and the rows that take them."""

    entry: Entry
    offset: int
    size: int
    place: Place


def pieces(entry: Entry, place: Place, most: int) -> Iterator[Piece]:
    """The tensor in pieces of whole rows, of at most `most` bytes where a row is no longer than that."""
    rows = entry.shape[0]
    row = entry.shape[1:].numel() * entry.dtype.itemsize
    step = max(1, most // max(1, row))
    for i in range(0, rows, step):
        count = min(step, rows - i)
        yield Piece(entry, entry.offset + i * row, count * row, place[i : i + count])


def fill(work: Sequence[tuple[Entry, Place]], stopped: Callable[[], bool] = lambda: False) -> None:
    """Reads each tensor into its place, which has its shape and any dtype and strides. All places lie on one device.

    stopped: asked between pieces; True ends in Abandoned. Raises UserError for a file that can't be read.
    """
    todo = [piece for entry, place in work for piece in pieces(entry, place, PIECE)]
    if not todo:
        return
    device = todo[0].place.device
    todo.sort(key=lambda piece: (piece.entry.path, piece.offset))
    size = max(piece.size for piece in todo)
    left = iter(todo)  # a list's iterator gives each piece to one thread
    failed = False

    def run() -> None:
        nonlocal failed
        try:
            with _Lane(device, size, stream) as lane:
                for piece in left:
                    if failed or stopped():
                        raise Abandoned
                    lane.take(piece)
        except BaseException:
            failed = True
            raise

    stream = None
    if device.type == "cuda":
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))  # the places may still be filled with zeros there
    threads = min(THREADS if stream else os.cpu_count() or 1, THREADS, len(todo))
    with _quick_turns(), ThreadPoolExecutor(threads, thread_name_prefix="weights") as pool:
        futures = [pool.submit(run) for _ in range(threads)]
        try:
            wait(futures)
        except BaseException:  # Ctrl-C: leaving the pool waits for its threads
            failed = True
            raise
    if stream:
        torch.cuda.empty_cache()  # what the lanes held belongs to their stream, and would serve no other
    errors = [error for error in (future.exception() for future in futures) if error]
    for error in sorted(errors, key=lambda error: isinstance(error, Abandoned)):
        raise error


class _Lane:
    """A thread's way from a file to the places: `host`, and on a card the same bytes there."""

    def __init__(self, device: torch.device, size: int, stream: torch.cuda.Stream | None):
        self.device, self.size, self.stream = device, size, stream
        self.file: BinaryIO | None = None
        self.host: Tensor | None = None

    def __enter__(self) -> _Lane:
        self.current = torch.cuda.stream(self.stream) if self.stream else nullcontext()
        self.current.__enter__()
        if self.stream:
            self.host = torch.empty(self.size, dtype=torch.uint8, pin_memory=True)
            self.card = torch.empty(self.size, dtype=torch.uint8, device=self.device)
            self.copied = torch.cuda.Event()
        return self

    def __exit__(self, *error: object) -> None:
        if self.stream:
            self.stream.synchronize()
        self.current.__exit__(*error)
        if self.file is not None:
            self.file.close()

    @torch.no_grad()
    def take(self, piece: Piece) -> None:
        """Reads a piece and lays it in its place."""
        place, kind = piece.place, piece.entry.dtype
        if isinstance(place, Tensor) and place.device.type == "cpu" and place.dtype == kind and place.is_contiguous():
            self._read(piece, place.detach().view(torch.uint8))
            return
        if self.host is None:
            self.host = torch.empty(self.size, dtype=torch.uint8)
        if self.stream:
            self.copied.synchronize()  # the last copy out of `host`
        host = self.host[: piece.size]
        self._read(piece, host)
        if self.stream:
            card = self.card[: piece.size]
            card.copy_(host, non_blocking=True)
            self.copied.record(self.stream)
            host = card
        place.copy_(host.view(kind).view(place.shape))

    def _read(self, piece: Piece, into: Tensor) -> None:
        path = piece.entry.path
        try:
            if self.file is None or self.file.name != str(path):
                if self.file is not None:
                    self.file.close()
                self.file = open(str(path), "rb", buffering=0)  # noqa: SIM115 (a lane's, closed with it)
            self.file.seek(piece.offset)
            view = into.numpy().reshape(-1).data
            while view:
                got = self.file.readinto(view)  # type: ignore[attr-defined]
                if not got:
                    raise UserError(f"{path}: damaged (it ends inside {piece.entry.name}); download it again")
                view = view[got:]
        except OSError as error:
            raise UserError(f"{path}: can't be read ({(error.strerror or str(error)).lower()})") from None


@contextmanager
def _quick_turns() -> Iterator[None]:
    """Threads hand the interpreter over every half millisecond: a reader needs it for microseconds, a piece, and would
    wait ten times as long for each beside a thread that computes in Python."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
