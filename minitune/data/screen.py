"""The report of `data check` in a terminal: two pictures, the findings, the verdict last, where the eye is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from minitune.data.report import Lengths, Report, some

BLOCKS = " ▁▂▃▄▅▆▇█"
TALL = 5
SIGNS = {"error": ("✗", "bold red"), "warning": ("!", "bold yellow"), "note": ("·", "cyan")}
# Findings of one severity beyond these are counted, not told; --json and --html tell all.
MOST = 12
EXAMPLES = 2
# Where no terminal reads, a sentence is a line, however long.
UNBROKEN = 4000


def show(report: Report, console: Console | None = None) -> None:
    """Prints the report: as wide as the terminal, 120 columns at most; without a terminal one line a sentence."""
    console = console or Console(highlight=False, emoji=False)
    Sheet(console, min(console.width, 120) if console.is_terminal else UNBROKEN).show(report)


class Sheet:
    """Lines of text with a hanging indent, no wider than `width` columns."""

    def __init__(self, console: Console, width: int):
        self.console, self.width = console, width

    def line(self, text: Text, indent: int = 0, lead: Text | None = None) -> None:
        for i, part in enumerate(text.wrap(self.console, max(20, self.width - indent)) or [Text()]):
            front = lead if lead and not i else Text(" " * indent)
            part.rstrip()
            self.console.print(Text.assemble(front, part), soft_wrap=True)

    def show(self, report: Report) -> None:
        self.line(Text.assemble((report.file, "bold"), f": {report.notes[0] if report.notes else ''}"))
        for note in [*report.notes[1:], *report.facts()]:
            self.line(Text(note, "dim"), 2, Text("  "))
        self.pictures(report)
        for severity in SIGNS:
            found = [f for f in report.findings if f.severity == severity]
            if found:
                self.console.print()
            for finding in found[:MOST]:
                self.finding(report, finding)
            if len(found) > MOST:
                self.line(Text(f"and {len(found) - MOST} more such; --json tells all", "dim"), 4)
        self.console.print()
        sign, style = SIGNS["error"] if report.hurts else ("✓", "bold green")
        self.line(Text(report.verdict(), style), 3, Text(f" {sign} ", style))
        if any(finding.safe for finding in report.findings):
            self.line(Text("--fix OUT writes a mended copy and a log of each change", "dim"), 3)

    def finding(self, report: Report, finding: Any) -> None:
        """What, which rows, an example or two, the mend."""
        sign, style = SIGNS[finding.severity]
        small = finding.severity == "note"
        what = Text(finding.what(report.unit), "" if small else "bold")
        where = ""
        if len(finding.rows) and f"all {report.readable:,} " not in what.plain:
            tries = (f"  {some(finding.rows, finding.unit or report.unit, most)}" for most in (6, 5, 4, 3, 2))
            room = self.width - 3 - cell_len(what.plain)
            where = next(
                (text for text in tries if cell_len(text) <= room),
                f"  {some(finding.rows, finding.unit or report.unit, 3)}",
            )
        self.line(Text.assemble(what, (where, "dim")), 3, Text(f" {sign} ", style))
        examples = finding.examples[: 1 if small else EXAMPLES]
        digits = max((len(str(row)) for row, _ in examples), default=0)
        for row, text in examples:
            room = self.width - 7 - digits
            self.line(Text(clipped(text, room)), 7 + digits, Text(f"     {row:>{digits}}  ", "dim"))
        if not (small and not finding.examples and "--fix" not in finding.mend()):
            self.line(Text(finding.mend(), "dim"), 7, Text("     → ", "dim"))

    def pictures(self, report: Report) -> None:
        """The lengths as histograms, side by side where there is room."""
        room = min(self.width, 120)
        beside = room >= 72
        wide = min(46, (room - 8) // 2 if beside else room - 4)
        drawn = [list(picture(each, wide, report.max_length)) for each in report.lengths]
        self.console.print()
        if beside:
            for pair in zip(*drawn, strict=True):
                joined = Text.assemble("  ", padded(pair[0], wide), "    ", pair[1])
                joined.rstrip()
                self.console.print(joined, soft_wrap=True)
        else:
            for each in drawn:
                for line in each:
                    line.rstrip()
                    self.console.print(Text.assemble("  ", line), soft_wrap=True)


def picture(each: Lengths, wide: int, max_length: int = 0) -> Iterator[Text]:
    """A histogram of `wide` columns: title, bars, axis, percentiles. What is over max_length is red."""
    edges, counts = each.histogram(wide)
    summary = each.summary()
    most = max(counts) or 1
    # Few bins are drawn broad, so that a file of short rows still fills its picture.
    broad = max(1, wide // len(counts))
    over = max_length if each.of == "a row" and each.unit == "tokens" else 0
    yield Text.assemble((f"{each.unit} {each.of}", "bold"), (f"  mean {summary['mean']:,.1f}", "dim"))
    for level in range(TALL - 1, -1, -1):
        line = Text()
        for start, count in zip(edges, counts, strict=False):
            eighths = max(1, round(count / most * TALL * 8)) if count else 0
            block = BLOCKS[min(8, max(0, eighths - 8 * level))]
            line.append(block * broad, "red" if over and start >= over else "cyan")
        yield line
    end = f"{edges[-1] - 1:,}" + ("+" if summary["longest"] >= edges[-1] else "")
    drawn = broad * len(counts)
    middle = f"{(edges[-1]) // 2:,}"
    left = "0" + middle.rjust(max(0, drawn // 2 + len(middle) // 2 - 1))
    axis = left + end.rjust(drawn - len(left)) if drawn > len(left) + len(end) + 1 else "0" + end.rjust(drawn - 1)
    yield Text(axis, "dim")
    for keys in (("p50", "p90", "p99", "longest"), ("p50", "p99", "longest"), ("p50", "longest")):
        names = [(key.replace("longest", "max").replace("p50", "median"), f"{summary[key]:,}") for key in keys]
        line = Text("  ").join(Text.assemble((f"{name} ", "dim"), value) for name, value in names)
        if cell_len(line.plain) <= wide:
            break
    yield line


def padded(text: Text, wide: int) -> Text:
    text = text.copy()
    text.append(" " * max(0, wide - cell_len(text.plain)))
    return text


def clipped(text: str, room: int) -> str:
    """The text in at most `room` columns; a Chinese character has two."""
    return text if cell_len(text) <= room else set_cell_size(text, max(1, room - 1)).rstrip() + "…"
