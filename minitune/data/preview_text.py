"""The preview for a terminal: colours where there are any, signs where there are none, Chinese two columns wide."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.text import Text

from minitune.data.preview import Row, Unit
from minitune.data.preview_packs import Document, PackView, Step, describe

GUTTER = 6
OPEN, CLOSE = "⟦", "⟧"


class Sheet:
    """Prints to stdout. `plain`: no colours (NO_COLOR, a dumb terminal, a pipe), so learned text stands in ⟦…⟧."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False)
        self.plain = self.console.no_color or self.console.color_system is None
        self.width = max(self.console.width, 24)

    def say(self, *parts: str | Text, style: str = "") -> None:
        """A line; a pipe gets it unbroken."""
        whole = Text.assemble(*parts, style=style)
        self.console.print(whole, soft_wrap=not self.console.is_terminal)

    def line(self, text: Text) -> None:
        """A line that is laid out already."""
        self.console.print(text, soft_wrap=True)

    def head(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.say(line)
        learned = f"learned: {OPEN}so{CLOSE}" if self.plain else Text.assemble("learned: ", ("so", "green"))
        special = "<s>" if self.plain else Text("<s>", style="reverse")
        self.say(learned, "; special: ", special, "; │ token; ×3: a character of 3 tokens; ·↵→ white space")

    def row(self, row: Row, shown: Sequence[Unit]) -> None:
        """A row, its given and its learned stretches each from a new line, the token's number in front."""
        total, learned = len(row.encoded.input_ids), row.encoded.supervised
        self.say()
        cut = "; cut, so no end is learned" if row.cut else ""
        self.say(f"row {row.number}: {total} tokens, {learned} learned ({learned / total:.0%}){cut}", style="bold")
        for at, text in self.layout(shown, self.width - GUTTER):
            self.line(Text.assemble((f"{at:>{GUTTER - 1}} ", "dim")) + text)

    def layout(self, shown: Sequence[Unit], width: int) -> Iterable[tuple[int, Text]]:
        """(number of the first token, text) of each line, none wider than `width` columns."""
        line, used, start = Text(), 0, 0
        for i, unit in enumerate(shown):
            fresh = i == 0 or shown[i - 1].learned != unit.learned
            for part in self.pieces(shown, i, width):
                if line and (fresh or used + part.cell_len > width):
                    yield start, line
                    line, used = Text(), 0
                if not line:
                    start = unit.at
                line.append_text(part)
                used += part.cell_len
                fresh = False
            if "↵" in unit.text and line:
                yield start, line
                line, used = Text(), 0
        if line:
            yield start, line

    def pieces(self, shown: Sequence[Unit], i: int, width: int) -> list[Text]:
        """A unit in parts that fit a line, with brackets where learning begins and ends, its count and its bound."""
        unit = shown[i]
        last = i + 1 == len(shown)
        begins = self.plain and unit.learned and (i == 0 or not shown[i - 1].learned)
        ends = self.plain and unit.learned and (last or not shown[i + 1].learned)
        behind = (f"×{len(unit.ids)}" if len(unit.ids) > 1 else "") + (CLOSE if ends else "") + ("" if last else "│")
        style = ("green" if unit.learned else "dim") + (" reverse" if unit.special else "")
        room = max(width - cell_len(behind) - 1, 2)
        out = [Text(part, style=style) for part in chop_cells(unit.text, room)] or [Text()]
        if begins:
            out[0] = Text.assemble(OPEN, out[0])
        out[-1] = Text.assemble(out[-1], (behind, "dim"))
        return out

    # A packed step

    def step(self, step: Step) -> None:
        self.say()
        self.say(step.heading(), style="bold")
        for number, pack in enumerate(step.packs, 1):
            self.say()
            self.say(describe(pack, number))
            for line in self.ribbon(pack):
                self.line(line)
            self.documents(pack)

    def ribbon(self, pack: PackView) -> Iterable[Text]:
        """The pack drawn to scale: ░ given, █ learned, │ where a document begins."""
        flags = [learned for document in pack.documents for learned in document.learned]
        starts = {document.start for document in pack.documents}
        cells = min(len(flags), 4 * self.width)
        line = Text()
        for cell in range(cells):
            span = range(cell * len(flags) // cells, (cell + 1) * len(flags) // cells)
            share = sum(flags[i] for i in span) / len(span)
            if starts & set(span):
                line.append("│", "bold")
            else:
                line.append("█" if share >= 0.5 else "░", "green" if share >= 0.5 else "dim")
            if line.cell_len == self.width:
                yield line
                line = Text()
        if line:
            yield line

    def documents(self, pack: PackView) -> None:
        """A line a document: where it lies, and how it begins and ends."""
        self.line(Text(f"{'row':>7} {'in the pack':>13} {'positions':>11} {'learned':>8}  begins and ends", "dim"))
        for document in pack.documents:
            inside = f"{document.start}…{document.end - 1}"
            positions = f"{document.first}…{document.last}"
            left = f"{document.row:>7} {inside:>13} {positions:>11} {sum(document.learned):>8}  "
            self.line(Text(left) + self.ends(document, self.width - len(left)))
        bounds = " ".join(map(str, pack.cu_seqlens))
        self.say("cu_seqlens: ", Text(bounds, "dim"))

    def ends(self, document: Document, room: int) -> Text:
        """The first and the last tokens, in `room` columns; where they don't fit, the first give way."""
        both = [*document.head, *document.tail]
        drawn = [Text("").join(self.pieces(both, i, 40)) for i in range(len(both))]
        head, tail = (Text("").join(half) for half in (drawn[: len(document.head)], drawn[len(document.head) :]))
        between = Text(" … " if document.elided else "", "dim")
        left = room - between.cell_len - tail.cell_len
        if head.cell_len > left:
            head.truncate(max(left, 6), overflow="ellipsis")
        text = head + between + tail
        text.truncate(max(room, 6), overflow="ellipsis")
        return text
