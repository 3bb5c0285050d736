"""Forgetting: how well base and tuned model predict plain text that has nothing to do with the training data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitune.config import UserError
from minitune.data.rows import read_rows
from minitune.data.template import IGNORED, Encoded
from minitune.evaluate.loss import Losses, exponential

TEXT = ("text", "content")  # the names under which a row holds it
# Rise of the loss on general text, nats a token: up to here it is called so. A nat of 0.02 is 2% of perplexity.
UNCHANGED, SLIGHT, CLEAR = 0.02, 0.1, 0.3


def texts(path: str) -> Iterator[tuple[str, str]]:
    """(where, text) of each document: a txt file is one, a row of the other kinds has it as `text` (or `content`)."""
    file = Path(path)
    if file.suffix.lower() in (".txt", ".md", ".text", ""):
        try:
            yield path, file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise UserError(f"{path}: not UTF-8; save the file as UTF-8") from None
        return
    found = read_rows(file)
    for number, row in found.items:
        values = [row] if isinstance(row, str) else [row.get(k) for k in TEXT] if isinstance(row, dict) else []
        text = next((value for value in values if isinstance(value, str)), None)
        if text is None:
            raise UserError(f"{path}: row {number}: no text in it; write plain text as `text`")
        yield f"row {number}", text


def windows(documents: Iterable[tuple[str, str]], tokenizer: Any, length: int) -> list[Encoded]:
    """Each document's ids in windows of at most `length`, begun as the model's tokenizer begins a text (BOS or not).

    Every token is predicted once; the first of a window without BOS has nothing before it and is not.
    """
    probe = tokenizer("a")["input_ids"]
    start = [i for i in probe[:1] if i == tokenizer.bos_token_id]
    out = []
    for _, text in documents:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        room = length - len(start)
        for at in range(0, len(ids), room):
            part = ids[at : at + room]
            row = Encoded([*start, *part], [*[IGNORED] * len(start), *part])
            if row.supervised:
                out.append(row)
    return out


def read(path: str, tokenizer: Any, length: int) -> list[Encoded]:
    """The windows of a file. UserError where there is nothing to predict."""
    if length < 2:
        raise UserError("--max_length is 1; general text needs windows of at least 2 tokens")
    found = windows(texts(path), tokenizer, length)
    if not found:
        raise UserError(f"{path}: no text in it")
    return found


@dataclass(frozen=True)
class Verdict:
    """rise: nats a token, tuned less base; error: its standard error over windows (nan for one window)."""

    rise: float
    error: float
    text: str


def verdict(before: Losses, after: Losses) -> Verdict:
    """One line on what was forgotten. The windows are the same, so the rise is measured window by window."""
    rise = after.mean - before.mean
    error = standard_error(before, after)
    change = f"loss {before.mean:.3f} -> {after.mean:.3f}, perplexity ×{exponential(rise):.2f}"
    if abs(rise) <= UNCHANGED:
        said = "nothing forgotten"
    elif abs(rise) < 2 * error:  # of one window nothing is known
        said = "too close to tell; give more text"
    elif rise < 0:
        said = "nothing forgotten: general text is predicted better than before"
    elif rise <= SLIGHT:
        said = "a little forgotten"
    elif rise <= CLEAR:
        said = "clearly forgotten: fewer epochs or a smaller learning rate keep more"
    else:
        said = "much forgotten: use a smaller learning rate, fewer epochs, or mix general rows into the data"
    return Verdict(rise, error, f"general text: {change}: {said}")


def standard_error(before: Losses, after: Losses) -> float:
    """Of the mean rise a token, windows taken as independent (a ratio estimator); nan for one window."""
    count = len(before.rows)
    if count < 2:
        return math.nan
    total = before.tokens
    mean = after.mean - before.mean
    residuals = [
        (b - a) - mean * tokens for (a, tokens), (b, _) in zip(before.rows, after.rows, strict=True)
    ]  # what each window's sum deviates by
    return math.sqrt(count / (count - 1) * math.fsum(r * r for r in residuals)) / total
