"""How many tokens rows and answers have, and what `max_length` would take from them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from minitune.config import TrainConfig, UserError
from minitune.data import bulk, cache
from minitune.data.findings import Finding, shown
from minitune.data.records import Conversation, Stream
from minitune.data.store import GATHER, EncodedFile, EncodedRows
from minitune.data.template import Template

EXAMPLES = 3


class Faulty(Exception):
    """The rows of a file of which some can't be learned from: they are not kept, training refuses the file."""

    def __init__(self, rows: EncodedRows):
        super().__init__()
        self.rows = rows


def encode(passing: Iterable[Conversation], stream: Stream, template: Template, kept: Path | None) -> EncodedRows:
    """The rows in tokens, from the folder `kept` where an earlier run put them; then `passing` is left unread.

    Else it is read here, while the tokenizer is at what was read before. UserError: the template can't encode a row.
    """

    def make() -> EncodedFile:
        rows = bulk.encode(passing, template)
        if stream.faults:
            raise Faulty(rows)
        return EncodedFile(rows, stream.form, stream.notes)

    try:
        return (cache.remembered(kept, stream.path, template, make) if kept else make()).rows
    except Faulty as faulty:
        return faulty.rows
    except UserError as error:
        message = str(error)
        raise UserError(message if message.startswith(f"{stream.path}: ") else f"{stream.path}: {message}") from None


def answers(rows: EncodedRows) -> Any:
    """The lengths of the runs of learned tokens: the answers, each with the EOS that ends it. A row ends a run."""
    out = [np.zeros(0, np.int32)]
    for at in range(0, len(rows), GATHER):
        learned = rows[at : at + GATHER].flat()[1].view(np.int8)
        edges = np.flatnonzero(np.diff(learned, prepend=np.int8(0), append=np.int8(0)))
        out.append((edges[1::2] - edges[::2]).astype(np.int32))
    return np.concatenate(out)


def too_long(rows: EncodedRows, config: TrainConfig, tokenizer: Any) -> list[Finding]:
    """Rows over config.max_length and what would be lost of them; rows that would teach nothing."""
    most = config.max_length
    nothing = rows.cut(most).supervised == 0
    over = (rows.lengths > most) & ~nothing
    out = []
    lost = int((rows.lengths[over] - most).sum())
    words = {"max_length": most, "lost": f"{lost:,}", "longest": f"{rows.longest}"}
    if over.any():
        kind = {"cut": "cut", "drop": "dropped", "error": "refused"}[config.overlong]
        out.append(Finding(kind, rows.numbers[over].tolist(), words))
        for i in np.flatnonzero(over)[:EXAMPLES]:
            ids = rows[int(i)].input_ids[most:]
            tail = tokenizer.decode(ids, skip_special_tokens=True).lstrip("\ufffd")  # half a character
            out[0].examples.append((int(rows.numbers[i]), f"{len(ids):,} tokens lost: {shown(tail, 0, len(tail))}"))
    if nothing.any():
        out.append(Finding("unlearnable", rows.numbers[nothing].tolist(), words))
        for i in np.flatnonzero(nothing)[:EXAMPLES]:
            text = f"{int(rows.lengths[i]):,} tokens: {shown(tokenizer.decode(rows[int(i)].input_ids[:80]))}"
            out[-1].examples.append((int(rows.numbers[i]), text))
    return out
