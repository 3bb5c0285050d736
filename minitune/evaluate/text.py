"""The result in the terminal: a table of numbers, then answers side by side."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from minitune.data.html import visible
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
        side_by_side(console, row, sides, lines.row_name(row, lines.several_files(result)))
    if len(rows) > answers:
        more = f"{len(rows) - answers} more answers: --show {len(rows)}, --html FILE or --output DIR"
        console.print(f"\n{more}", markup=False)


def side_by_side(console: Console, row: dict[str, Any], sides: list[str], name: str) -> None:
    """One question, the answer that was wanted, and what each side said."""
    above = Table.grid(padding=(0, 2, 0, 0))
    above.add_column(style="bold", no_wrap=True)
    above.add_column(overflow="fold")  # Chinese has no spaces to wrap at
    above.add_row(name, Text(visible(row["messages"][-1]["content"].strip())))
    above.add_row("wanted", Text(visible(row["wanted"])))
    console.print(above)
    table = Table(*sides, expand=True)
    for column in table.columns:
        column.ratio, column.overflow = 1, "fold"
    table.add_row(*(answer(row[side]) for side in sides))
    console.print(table)


def answer(said: dict[str, Any], most: int = 600) -> Text:
    """The text, shortened, and what is to be noticed of it."""
    text = visible(said["text"].strip())  # what a model says must not steer the terminal
    out = Text(text if len(text) <= most else text[:most].rstrip() + " …")
    marks = lines.marks(said)
    if marks:
        out.append(("\n" if out else "") + "; ".join(marks), "yellow")
    return out
