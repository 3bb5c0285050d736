"""A file of conversations -> rows of token ids, with everything that was cut, dropped or guessed counted and said."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from minitune.config import UserError
from minitune.data import bulk, cache, records
from minitune.data.store import EncodedFile, EncodedRows
from minitune.data.template import Template

Watch = Callable[[str, Callable[[], float], Iterable[Any]], Iterable[Any]]


@dataclass
class Dataset:
    """Encoded rows and what became of the others. `numbers[i]` is row i's number in the file, from 1."""

    file: str
    form: str
    rows: EncodedRows
    numbers: list[int] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    unlearnable: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return self.rows.tokens

    @property
    def supervised(self) -> int:
        return int(self.rows.supervised.sum())

    def summary(self, max_length: int) -> list[str]:
        """What a person should know before training, a line each."""
        lines = [
            f"{self.file}: {len(self.rows):,} rows ({self.form}), {self.tokens:,} tokens, {self.supervised:,} learned, "
            f"longest {self.rows.longest}"
        ]
        for rows, what in (
            (self.cut, f"longer than {max_length} tokens, cut at the tail (no EOS is learned there)"),
            (self.dropped, f"longer than {max_length} tokens, dropped"),
            (self.unlearnable, f"with nothing left to learn within {max_length} tokens, dropped"),
        ):
            if rows:
                lines.append(f"{self.file}: {len(rows):,} row{'s' * (len(rows) != 1)} {what}: {some(rows)}")
        return [*self.notes, *lines]


def some(numbers: Sequence[int], most: int = 8) -> str:
    """The first few row numbers, for a message."""
    shown = ", ".join(map(str, numbers[:most]))
    return f"row {shown}" if len(numbers) == 1 else f"rows {shown}{', …' if len(numbers) > most else ''}"


def unwatched(_: str, __: Callable[[], float], rows: Iterable[Any]) -> Iterable[Any]:
    """No progress is shown."""
    return rows


def load(
    path: str,
    template: Template,
    max_length: int,
    overlong: str = "cut",
    *,
    most: int = 0,
    kept: Path | None = None,
    watch: Watch = unwatched,
) -> Dataset:
    """Reads, encodes and fits every row.

    overlong: `cut` the tail, `drop` the row, or `error` (UserError names the row).
    most: only the file's first rows, this many; 0: all.
    kept: the folder where encoded rows are kept from run to run; None: nowhere.
    watch: (what, share done, rows) -> rows, shows progress.
    A row with no learned token left is a counted drop; a file with none left is a UserError.
    """

    def make() -> EncodedFile:
        return encode(path, template, watch)

    file = cache.remembered(kept, Path(path), template, make) if kept else make()
    if 0 < most < len(file.rows):
        file = EncodedFile(file.rows[:most], file.form, [*file.notes, f"{path}: its first {most:,} rows (max_samples)"])
    data = fit(path, file, max_length, overlong)
    if not len(data.rows):
        raise UserError(f"{path}: no row has anything to learn within {max_length} tokens; raise --max_length")
    return data


def together(parts: Sequence[Dataset], max_length: int) -> Dataset:
    """Several files' rows as one data set, in their order; what became of each file's rows is in the notes."""
    if len(parts) == 1:
        return parts[0]
    rows = EncodedRows.joined([part.rows for part in parts])
    form = ", ".join(dict.fromkeys(part.form for part in parts))
    notes = [line for part in parts for line in part.summary(max_length)]
    return Dataset(" + ".join(part.file for part in parts), form, rows, rows.numbers.tolist(), notes=notes)


def encode(path: str, template: Template, watch: Watch = unwatched) -> EncodedFile:
    """Every row of a file as the template makes it, of any length, in one pass."""
    stream = records.stream(path, join=template.config.join)
    try:
        rows = unless_faulty(watch(f"reading {Path(path).name}", lambda: stream.fraction, stream), stream)
        encoded = bulk.encode(rows, template)
    except UserError as error:
        records.refuse(stream)  # the fault that stands first in the file is said first
        raise UserError(str(error) if str(error).startswith(f"{path}: ") else f"{path}: {error}") from None
    records.refuse(stream)
    return EncodedFile(encoded, stream.form, stream.notes)


def unless_faulty(rows: Iterable[Any], stream: records.Stream) -> Iterator[Any]:
    """The rows up to the first fault; behind it the file is only read on, to count the rows that have the same."""
    for row in rows:
        if not stream.faults:
            yield row


def fit(path: str, file: EncodedFile, max_length: int, overlong: str) -> Dataset:
    """The file's rows within `max_length`, and the numbers of those that were cut or left out."""
    rows = file.rows
    long = rows.lengths > max_length
    if overlong == "error" and long.any():
        first = int(np.argmax(long))
        raise UserError(
            f"{path}: row {rows.numbers[first]} has {rows.lengths[first]} tokens, --max_length is {max_length}; "
            "raise it, or give --overlong cut or drop"
        )
    dropped = long if overlong == "drop" else np.zeros_like(long)
    short = rows.cut(max_length)
    learns = short.supervised > 0
    fitting = short.select(learns & ~dropped)
    return Dataset(
        path,
        file.form,
        fitting,
        fitting.numbers.tolist(),
        cut=rows.numbers[long & learns & ~dropped].tolist(),
        dropped=rows.numbers[dropped].tolist(),
        unlearnable=rows.numbers[~learns & ~dropped].tolist(),
        notes=list(file.notes),
    )


def split(data: Dataset, fraction: float, seed: int) -> tuple[EncodedRows, EncodedRows]:
    """(rows to learn, rows held out): a part of the rows by a seeded choice, both in the file's order."""
    import torch

    if not 0 < fraction < 1:
        raise UserError(f"eval_fraction is {fraction}; it lies between 0 and 1")
    count = max(1, round(len(data.rows) * fraction))
    if count >= len(data.rows):
        raise UserError(f"{data.file}: {len(data.rows)} rows are too few to hold out {fraction:g} of them")
    order = torch.randperm(len(data.rows), generator=torch.Generator().manual_seed(seed)).numpy()
    held = np.zeros(len(data.rows), bool)
    held[order[:count]] = True
    return data.rows.select(~held), data.rows.select(held)
