"""`minitune data preview` and `minitune data check`: what the model sees and learns, before it does."""

from __future__ import annotations

import json
import sys
from typing import Any

from minitune.config import TrainConfig, UserError
from minitune.data import dataset, records
from minitune.data.template import IGNORED, Encoded, Template


def show(config: TrainConfig, tokenizer: Any, hub_config: dict[str, Any], rows: int, as_json: bool) -> int:
    """Prints rows as they are trained: JSON for programs (every row), colours for a person (`rows` of them)."""
    template = Template.choose(tokenizer, config.template, hub_config)
    data = dataset.load(config.data, template, config.max_length, config.overlong)
    if as_json:
        for number, row in zip(data.numbers, data.rows, strict=True):
            print(json.dumps({"row": number, "input_ids": row.input_ids, "labels": row.labels}))
        for line in data.summary(config.max_length):
            print(line, file=sys.stderr)
        return 0
    from rich.console import Console

    console = Console(highlight=False)
    for line in data.summary(config.max_length):
        console.print(line, markup=False)
    console.print(f"template: {template.config.name}; learned tokens are green, each with its bounds")
    for number, row in list(zip(data.numbers, data.rows, strict=True))[:rows]:
        console.print()
        console.print(f"row {number}: {len(row.input_ids)} tokens, {row.supervised} learned", style="bold")
        console.print(coloured(row, tokenizer))
    return 0


def coloured(row: Encoded, tokenizer: Any) -> Any:
    """The row token by token; special tokens and white space made visible, a character of several tokens as one."""
    from rich.text import Text

    out, held = Text(), []
    special = set(tokenizer.all_special_ids)
    for token, label in zip(row.input_ids, row.labels, strict=True):
        style = "dim" if label == IGNORED else "green"
        if token in special:
            out.append(str(tokenizer.convert_ids_to_tokens(token)), style=f"{style} reverse")
        else:
            held.append(token)
            text = visible(held, tokenizer)
            if "\ufffd" in text and len(held) < 4:  # a character's first bytes
                continue
            out.append(text, style=style)
            if len(held) > 1:
                out.append(f"×{len(held)}", style="dim")
            held.clear()
        out.append("│", style="dim")
    return out


def visible(tokens: list[int], tokenizer: Any) -> str:
    """The tokens' text with white space as signs."""
    text = tokenizer.decode(tokens)
    raw = str(tokenizer.convert_ids_to_tokens(tokens[0]))
    lead = "·" if raw.startswith("▁") and not text.startswith(" ") else ""
    return lead + text.replace(" ", "·").replace("\n", "↵").replace("\t", "→")


def check(config: TrainConfig, tokenizer: Any = None, hub_config: dict[str, Any] | None = None) -> int:
    """Says what the file holds; returns 1 where training on it would lose or spoil rows. UserError: unreadable."""
    loaded = records.load(config.data, join=config.template.join)
    rows = loaded.conversations
    for note in loaded.notes:
        print(note)
    seen: dict[tuple, int] = {}
    doubles = []
    for row in rows:
        key = tuple((m.role, m.content) for m in row.messages)
        if key in seen:
            doubles.append(row.row)
        seen.setdefault(key, row.row)
    if doubles:
        print(f"{config.data}: {len(doubles):,} rows repeat an earlier row, word for word: {dataset.some(doubles)}")
    broken = [r.row for r in rows if any("\ufffd" in m.content for m in r.messages)]
    if broken:
        print(f"{config.data}: {len(broken):,} rows hold U+FFFD, text that was lost in an earlier conversion: "
              f"{dataset.some(broken)}")  # fmt: skip
    hurt = bool(broken)
    if tokenizer is not None:
        template = Template.choose(tokenizer, config.template, hub_config or {})
        try:
            data = dataset.load(config.data, template, config.max_length, config.overlong)
        except UserError as error:
            print(error)
            return 1
        for line in data.summary(config.max_length)[len(loaded.notes) :]:
            print(line)
        hurt |= bool(data.cut or data.dropped or data.unlearnable)
    print("would hurt: mend the rows above" if hurt else "nothing here would hurt")
    return int(hurt)
