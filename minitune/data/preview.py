"""`minitune data preview`: rows and packed steps as the model sees them, before it does.

Here a row becomes what can be shown of it: `Unit`s, a token each, or a character that several tokens spell.
`preview_text` lays them out for a terminal, `preview_page` for a browser, `preview_packs` says how rows share a step.
"""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitune.config import TrainConfig, UserError
from minitune.data import dataset
from minitune.data.template import IGNORED, Encoded, Template

BYTE = re.compile(r"<0x([0-9A-F]{2})>")
SIGNS = {" ": "·", "\n": "↵", "\t": "→", "\r": "␍"}


@dataclass(frozen=True)
class Unit:
    """What is shown as one: a token, or a character of several.

    at: the place in the row of its first token. text: its white space as signs (`shown`).
    """

    at: int
    ids: tuple[int, ...]
    text: str
    learned: bool
    special: bool


@dataclass(frozen=True)
class Row:
    """A row that was chosen: its number in the file, what is learned of it, and whether `max_length` cut it."""

    number: int
    encoded: Encoded
    cut: bool


def units(row: Encoded, tokenizer: Any) -> list[Unit]:
    """The row token by token, a character's bytes joined. The first token is never learned: nothing precedes it."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | set(
        tokenizer.all_special_ids
    )
    spell = speller(tokenizer)
    out: list[Unit] = []
    waiting: list[int] = []
    data = b""

    def flush(text: str, at: int, learned: bool) -> None:
        nonlocal data
        out.append(Unit(at - len(waiting) + 1, tuple(waiting), text, learned, False))
        waiting.clear()
        data = b""

    before = False
    for at, (token, label) in enumerate(zip(row.input_ids, row.labels, strict=True)):
        learned = label != IGNORED and at > 0
        piece = str(tokenizer.convert_ids_to_tokens(token))
        spelled = None if token in special else spell(piece)
        if waiting and (learned != before or not isinstance(spelled, bytes)):  # bytes that never became a character
            flush(broken(data), at - 1, before)
        before = learned
        if token in special:
            out.append(Unit(at, (token,), piece, learned, True))
        elif isinstance(spelled, str):
            out.append(Unit(at, (token,), shown(spelled), learned, False))
        else:
            waiting.append(token)
            data += spelled or b""
            if whole(data):
                flush(shown(data.decode("utf-8", "replace")), at, learned)
    if waiting:
        flush(broken(data), len(row.input_ids) - 1, before)
    return out


def speller(tokenizer: Any) -> Any:
    """piece -> its text, or its bytes where a character may need several pieces."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and "ByteLevel" in repr(backend.decoder):
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        byte_of = {char: byte for byte, char in bytes_to_unicode().items()}

        def byte_level(piece: str) -> str | bytes:
            if piece in added or not all(char in byte_of for char in piece):
                return piece
            return bytes(byte_of[char] for char in piece)

        return byte_level

    def pieces(piece: str) -> str | bytes:
        found = BYTE.fullmatch(piece)
        return bytes([int(found[1], 16)]) if found else piece.replace("▁", " ")

    return pieces


def whole(data: bytes) -> bool:
    """Whether no character is left open at the end. Bytes that are no UTF-8 at all are not waited for."""
    for back in range(1, min(4, len(data) + 1)):
        lead = data[-back]
        if lead >= 0xC0:
            return back >= (2 if lead < 0xE0 else 3 if lead < 0xF0 else 4)
        if lead < 0x80:
            return True
    return True


def broken(data: bytes) -> str:
    """Bytes of a character that is not whole: a row that was cut inside it."""
    return f"⟨{data.hex(' ').upper()}⟩"


def shown(text: str) -> str:
    """The text with white space as signs, and what can't be seen spelled out."""
    return "".join(SIGNS.get(char) or _spelled(char, text) for char in text)


def _spelled(char: str, text: str) -> str:
    """A joiner between emoji joins them; alone in a token it would not be seen."""
    hidden = unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zs", "Zl", "Zp") and (char != "\u200d" or text == char)
    return f"⟨U+{ord(char):04X}⟩" if hidden else char


def choose(data: dataset.Dataset, numbers: Sequence[int], first: int, max_length: int) -> list[Row]:
    """The rows of these numbers, else the first few. UserError for a number that is not there, with the reason."""
    cut, at = set(data.cut), {number: i for i, number in enumerate(data.numbers)}
    for number in numbers:
        if number not in at:
            gone = number in (*data.dropped, *data.unlearnable)
            why = f"is dropped: nothing of it fits {max_length} tokens" if gone else (
                f"is not there; rows are numbered {data.numbers[0]} to {data.numbers[-1]}"
            )  # fmt: skip
            raise UserError(f"{data.file}: row {number} {why}")
    wanted = [at[number] for number in numbers] if numbers else range(min(first, len(data.rows)))
    return [Row(data.numbers[i], data.rows[i], data.numbers[i] in cut) for i in wanted]


def print_json(config: TrainConfig, data: dataset.Dataset) -> int:
    """Every row for a program: number, ids, labels; the summary goes to stderr."""
    for number, row in zip(data.numbers, data.rows, strict=True):
        print(json.dumps({"row": number, "input_ids": row.input_ids, "labels": row.labels}))
    for line in data.summary(config.max_length):
        print(line, file=sys.stderr)
    return 0


def show(
    config: TrainConfig,
    tokenizer: Any,
    hub_config: dict[str, Any],
    rows: int = 3,
    as_json: bool = False,
    *,
    numbers: Sequence[int] = (),
    html: str = "",
    packed: Any = None,
    kept: Path | None = None,
    watch: dataset.Watch = dataset.unwatched,
) -> int:
    """Prints rows as they are trained: JSON for programs (every row), colours for a person (some).

    numbers: rows to show instead of the first few. html: a file for the same as a page. packed: None, or
    (data) -> `preview_packs.Step`, the step to show; it is made where the settings are known. kept, watch: as in
    `dataset.load`.
    """
    template = Template.choose(tokenizer, config.template, hub_config)
    data = dataset.load(config.data, template, config.max_length, config.overlong, kept=kept, watch=watch)
    if as_json:
        return print_json(config, data)
    chosen = choose(data, numbers, rows, config.max_length)
    step = packed(data) if packed else None
    if html:
        from minitune.data.preview_page import write_page

        write_page(html, config, data, template, chosen, step)
        print(f"{html}: {len(chosen)} rows{' and the packs of a step' if step else ''}; it opens offline")
        return 0
    from minitune.data.preview_text import Sheet

    sheet = Sheet()
    sheet.head([*data.summary(config.max_length), f"template: {template.config.name}"])
    for row in chosen:
        sheet.row(row, units(row.encoded, tokenizer))
    if step:
        sheet.step(step)
    return 0
