"""A file of conversations -> rows of token ids, with everything that was cut, dropped or guessed counted and said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from minitune.config import UserError
from minitune.data import records
from minitune.data.template import Encoded, Template, cut


@dataclass
class Dataset:
    """Encoded rows and what became of the others. `numbers[i]` is row i's number in the file, from 1."""

    file: str
    form: str
    rows: list[Encoded] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    unlearnable: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(len(r.input_ids) for r in self.rows)

    @property
    def supervised(self) -> int:
        return sum(r.supervised for r in self.rows)

    def summary(self, max_length: int) -> list[str]:
        """What a person should know before training, a line each."""
        longest = max((len(r.input_ids) for r in self.rows), default=0)
        lines = [
            f"{self.file}: {len(self.rows):,} rows ({self.form}), {self.tokens:,} tokens, {self.supervised:,} learned, "
            f"longest {longest}"
        ]
        for rows, what in (
            (self.cut, f"longer than {max_length} tokens, cut at the tail (no EOS is learned there)"),
            (self.dropped, f"longer than {max_length} tokens, dropped"),
            (self.unlearnable, f"have nothing left to learn within {max_length} tokens, dropped"),
        ):
            if rows:
                lines.append(f"{self.file}: {len(rows):,} rows {what}: {some(rows)}")
        return [*self.notes, *lines]


def some(numbers: Sequence[int], most: int = 8) -> str:
    """The first few row numbers, for a message."""
    shown = ", ".join(map(str, numbers[:most]))
    return f"row {shown}" if len(numbers) == 1 else f"rows {shown}{', …' if len(numbers) > most else ''}"


def load(path: str, template: Template, max_length: int, overlong: str = "cut") -> Dataset:
    """Reads, encodes and fits every row.

    overlong: `cut` the tail, `drop` the row, or `error` (UserError names the row).
    A row with no learned token left is a counted drop; a file with none left is a UserError.
    """
    loaded = records.load(path, join=template.config.join)
    data = Dataset(str(path), loaded.form, notes=list(loaded.notes))
    for conversation in loaded.conversations:
        try:
            row = template.encode(conversation.messages)
        except UserError as error:
            raise UserError(f"{path}: row {conversation.row}: {error}") from None
        if len(row.input_ids) > max_length:
            if overlong == "error":
                raise UserError(
                    f"{path}: row {conversation.row} has {len(row.input_ids)} tokens, --max_length is {max_length}; "
                    "raise it, or give --overlong cut or drop"
                )
            if overlong == "drop":
                data.dropped.append(conversation.row)
                continue
            row = cut(row, max_length)
            (data.cut if row.supervised else data.unlearnable).append(conversation.row)
        if row.supervised == 0:
            if conversation.row not in data.unlearnable[-1:]:
                data.unlearnable.append(conversation.row)
            continue
        data.rows.append(row)
        data.numbers.append(conversation.row)
    if not data.rows:
        raise UserError(f"{path}: no row has anything to learn within {max_length} tokens; raise --max_length")
    return data


def split(data: Dataset, fraction: float, seed: int) -> tuple[list[Encoded], list[Encoded]]:
    """(rows to learn, rows held out): a part of the rows by a seeded choice, both in the file's order."""
    import torch

    if not 0 < fraction < 1:
        raise UserError(f"eval_fraction is {fraction}; it lies between 0 and 1")
    count = max(1, round(len(data.rows) * fraction))
    if count >= len(data.rows):
        raise UserError(f"{data.file}: {len(data.rows)} rows are too few to hold out {fraction:g} of them")
    order = torch.randperm(len(data.rows), generator=torch.Generator().manual_seed(seed)).tolist()
    held = set(order[:count])
    return (
        [row for i, row in enumerate(data.rows) if i not in held],
        [row for i, row in enumerate(data.rows) if i in held],
    )
