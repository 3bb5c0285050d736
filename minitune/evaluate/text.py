"""The result in the terminal: a table of numbers, then answers side by side."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from minitune.evaluate import lines


def show(result: dict[str, Any], answers: int, console: Console | None = None) -> None:
    """Prints to stdout; `answers`: how many are shown."""
    console = console or Console(highlight=False)
    sides = lines.names(result)
    table = Table("", *sides, box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for what, values in lines.table(result):
        table.add_row(Text(what), *map(Text, values))
    console.print(table)
    for line in lines.remarks(result):
        console.print(line, markup=False, soft_wrap=not console.is_terminal)
    rows = result.get("answers", {}).get("rows", [])
    for row in rows[:answers]:
        console.print()
        side_by_side(console, row, sides)
    if len(rows) > answers:
        console.print(
            f"\n{len(rows) - answers} more answers: --show {len(rows)}, --html FILE or --output DIR", markup=False
        )


def side_by_side(console: Console, row: dict[str, Any], sides: list[str]) -> None:
    """One question, the answer that was wanted, and what each side said."""
    console.print(
        Text.assemble((f"row {row['row']}  ", "bold"), row["messages"][-1]["content"].strip()), overflow="fold"
    )
    console.print(Text.assemble(("wanted  ", "dim"), row["wanted"]), overflow="fold")
    table = Table(*sides, expand=True)
    for column in table.columns:
        column.ratio, column.overflow = 1, "fold"  # Chinese has no spaces to wrap at
    table.add_row(*(answer(row[side]) for side in sides))
    console.print(table)


def answer(said: dict[str, Any], most: int = 600) -> Text:
    """The text, shortened, and what is to be noticed of it."""
    text = said["text"].strip()
    out = Text(text if len(text) <= most else text[:most].rstrip() + " …")
    marks = ["" if said["finish"] == "stop" else f"did not stop ({said['finish']})"]
    if said.get("shared", {}).get("recited"):
        marks.append(f"recites row {said['shared']['row']}")
    marks = [mark for mark in marks if mark]
    if marks:
        out.append(("\n" if out else "") + "; ".join(marks), "yellow")
    return out
