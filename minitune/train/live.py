"""The live view: one block at the bottom of the terminal, redrawn in place; lines that stay scroll by above it.

The block is made by `Live.lines` from plain fields, which the run sets and the drawing thread reads: a row of the
log costs the run a few assignments.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, TextIO

from rich.cells import cell_len, chop_cells, set_cell_size
from rich.console import Console, ConsoleOptions, ConsoleRenderable, Group
from rich.live import Live as RichLive
from rich.segment import ControlType, Segment
from rich.text import Text

from minitune.train import chart
from minitune.train.picture import Smooth
from minitune.train.view import About, Pace, clock, number, one_line
from minitune.train.watch import Sample

STYLES = {chart.BLANK: "", chart.CURVE: "bright_blue", chart.RAW: "bright_black", chart.MARK: "bold yellow"}
DIM, CELL, WIDEST, POINTS = "bright_black", 20, 120, 2000


class Patient:
    """A stream whose terminal may go away (a lost connection): the run goes on and saves."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Code:
    """A control code as it is. Those for synchronised output mean nothing to a terminal that does not know them."""

    def __init__(self, code: str):
        self.segment = Segment(code, None, [(ControlType.CARRIAGE_RETURN,)])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        yield self.segment


class Steady(RichLive):
    """rich's, with each frame shown as a whole and only where it has news, and without remains where the window was
    made narrower."""

    def __init__(self, draw: Callable[[int, int], list[Text]], console: Console, **more: Any):
        self.draw, self.block, self.key = draw, list[Text](), ()
        self.drawn_at, self.lines_drawn = 0, list[int]()
        super().__init__(console=console, get_renderable=lambda: Group(*self.block), **more)

    def refresh(self) -> None:
        with self._lock:
            with contextlib.suppress(OSError, ValueError):  # the window itself: COLUMNS does not change with it
                size = os.get_terminal_size(self.console.file.fileno())
                if all(size):  # 0 x 0 is a terminal that does not know
                    self.console.size = size  # type: ignore[assignment]
            width, height = self.console.size
            block = self.draw(width, height)
            key: Any = (width, height, *(line.plain for line in block))
            if key != self.key or not self._started:
                self.key, self.block = key, block
                super().refresh()

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        width = self.console.width
        if width < self.drawn_at and self.lines_drawn:  # the terminal has wrapped what stands there
            rows = sum(max(1, -(-w // width)) for w in self.lines_drawn)
            self._live_render._shape = (width, rows)
        self.drawn_at, self.lines_drawn = width, [line.cell_len for line in self.block]
        return [Code("\x1b[?2026h"), *super().process_renderables(renderables), Code("\x1b[?2026l")]


class Live:
    """See `view.View`."""

    every_second = True

    def __init__(self, about: About):
        self.about = about
        self.console = Console(file=Patient(sys.stderr), stderr=True)  # type: ignore[arg-type]
        self.live: Steady | None = None
        self.pace, self.began, self.ended = Pace(about.total), time.monotonic(), 0.0
        self.step, self.epoch, self.status = 0, 0.0, ""
        self.last: dict[str, Any] = {}
        self.mean, self.smoothed, self.raw, self.each = Smooth(), [], [], 1  # type: ignore[var-annotated]
        self._group: list[tuple[float, float]] = []
        self.evals: list[tuple[int, float]] = []
        self.best: tuple[int, float] | None = None
        self.answers: tuple[int, Sequence[Sample]] = (0, ())
        self._chart: tuple[Any, list[Text]] = (None, [])

    # What the run tells

    def start(self, step: int) -> None:
        self.step, self.began = step, time.monotonic()
        self.pace.push(step)
        self.live = Steady(
            self.lines,
            self.console,
            refresh_per_second=2,  # a frame takes some 2 ms of the interpreter
            vertical_overflow="crop",
            redirect_stdout=sys.stdout.isatty(),
        )
        self.live.start(refresh=True)

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def progress(self, step: int, epoch: float) -> None:
        self.step, self.epoch = step, epoch

    def row(self, row: dict[str, Any]) -> None:
        self.last = row
        self.pace.push(row["step"])

    def losses(self, losses: Sequence[float]) -> None:
        """Keeps at most 2,000 points: from there on, each stands for twice as many steps."""
        for loss in losses:
            self._group.append((self.mean.push(loss), loss))
            if len(self._group) == self.each:
                smoothed, raw = (sum(part) / self.each for part in zip(*self._group, strict=True))
                self.smoothed.append(smoothed)
                self.raw.append(raw)
                self._group = []
            if len(self.smoothed) == POINTS:
                self.smoothed, self.raw = (chart.resample(v, POINTS // 2) for v in (self.smoothed, self.raw))
                self.each *= 2

    def held_out(self, step: int, loss: float, best: bool) -> None:
        self.evals.append((step, loss))
        if best:
            self.best = (step, loss)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        self.answers = (step, samples)

    def busy(self, what: str) -> None:
        if not self.status.startswith("stopping"):
            self.status = what

    def stopping(self) -> None:
        self.status = "stopping; Ctrl-C again: at once"

    def close(self) -> None:
        if self.live is not None:
            self.ended = time.monotonic()
            self.status = ""
            self.live.stop()
            self.live = None

    # What is drawn

    def lines(self, width: int, height: int) -> list[Text]:
        """The block for a terminal of this size: as many lines at the end of the run as at its beginning."""
        width = min(width, WIDEST)
        out = [self._title(width), self._bar(width), *self._numbers(width)]
        free = height - 1 - len(out)
        shown = min(3, len(self.about.prompts))
        while shown and free - (1 + 3 * shown) < 3:
            shown -= 1
        lines = min(7, free - (1 + 3 * shown if shown else 0))
        if lines >= 3 and width >= 30:
            out[2:2] = self._curve(width, lines)
        if shown:
            out += self._answers(width, shown)
        for line in out:
            line.truncate(width, overflow="ellipsis")
            line.no_wrap, line.overflow = True, "crop"  # the window may have shrunk before this is drawn
        return out[: max(1, height - 1)]

    def _title(self, width: int) -> Text:
        status = Text(self.status, "yellow")
        name = Text.assemble(("minitune ", "bold"), one_line(self.about.title), no_wrap=True)
        room = width - (status.cell_len + 2 if self.status else 0)
        name.truncate(max(8, room), overflow="ellipsis")
        return (
            Text.assemble(name, " " * max(1, width - name.cell_len - status.cell_len), status) if self.status else name
        )

    def _bar(self, width: int) -> Text:
        total = self.about.total
        part = min(1.0, self.step / max(1, total))
        right = f" {self.step:>{len(str(total))}}/{total} {int(part * 100):>3}%"
        if width >= 60:
            right += f"  epoch {self.epoch:.2f}/{self.about.epochs:g}"
        size = max(4, width - len(right))
        halves = int(part * size * 2)
        full, half = divmod(halves, 2)
        bar = Text("━" * full + "╸" * half, "green", no_wrap=True)
        return bar.append("━" * (size - full - half), "grey23").append(right, "default")

    def _numbers(self, width: int) -> list[Text]:
        """Fields of fixed width, as many a line as there is room for."""
        row, now = self.last, self.ended or time.monotonic()
        known = bool(row)
        fields = [
            ("loss", number(row["loss"]) if known else "-", 1),
            ("smoothed", number(self.smoothed[-1]) if self.smoothed else "-", 1),
            ("rate", f"{row['learning_rate']:.2e}" if known else "-", 1),
            ("grad norm", number(row["grad_norm"]) if known else "-", 1),
            ("tokens/s", f"{row['tokens_per_second']:,.0f}" if known else "-", 1),
            ("memory", f"{row['memory_gib']:.1f} GiB" if known else "-", 1),
            ("elapsed", clock(now - self.began), 1),
            ("left", clock(0.0 if self.step >= self.about.total else self.pace.left), 1),
        ]
        if self.about.holds_out:
            last, best = self.evals[-1] if self.evals else None, self.best
            fields.append(("held out", f"{number(last[1])} at step {last[0]}" if last else "-", 2))
            fields.append(("best", f"{number(best[1])} at step {best[0]}" if best else "-", 2))
        lines, used = [Text(no_wrap=True)], 0
        for label, value, cells in fields:
            if used and used + cells > max(1, width // CELL):
                lines.append(Text(no_wrap=True))
                used = 0
            lines[-1].append(f"{label:<10}", DIM).append(set_cell_size(value, CELL * cells - 10), "bold")
            used += cells
        for line in lines:
            line.rstrip()
        return lines

    def _curve(self, width: int, lines: int) -> list[Text]:
        """Smoothed loss, each loss as a dot, held-out losses as marks; drawn anew only where there is news."""
        key = (width, lines, self.each, len(self.smoothed), len(self.evals))
        if self._chart[0] == key:
            return [line.copy() for line in self._chart[1]]
        if not self.smoothed:
            return [Text() for _ in range(lines)]
        steps = self.each * len(self.smoothed)
        first = max(0, int(self.last.get("step", steps)) - steps)
        marks = [((step - first) / max(1, steps), loss) for step, loss in self.evals if step > first and loss == loss]
        low, high = chart.bounds(self.smoothed, [loss for _, loss in marks])
        cells = chart.plot(self.smoothed, self.raw, marks, (width - 9, lines), (low, high))
        labels = {0: f"{high:.3f}", lines - 1: f"{low:.3f}"}
        out = []
        for i, row in enumerate(cells):
            line = Text(f"{labels.get(i, ''):>7} ", DIM, no_wrap=True)
            for kind, run in groupby(row, key=lambda cell: cell[1]):
                line.append("".join(character for character, _ in run), STYLES[kind])
            line.rstrip()
            out.append(line)
        self._chart = (key, out)
        return [line.copy() for line in out]

    def _answers(self, width: int, shown: int) -> list[Text]:
        """The newest answers, three lines a prompt whatever their length."""
        step, samples = self.answers
        more = len(self.about.prompts) - shown
        head = f"answers at step {step}" if samples else "answers to come"
        out = [Text(head + (f"; {more} more in watch.jsonl" if more else ""), DIM, no_wrap=True)]
        for i in range(shown):
            out.append(Text(f"  {one_line(self.about.prompts[i])}", "cyan", no_wrap=True))
            answer = one_line(samples[i].answer) if samples else ""
            parts = chop_cells(answer, max(4, width - 4)) if answer else []
            if len(parts) > 2:
                room = max(4, width - 4) - 1
                parts = [parts[0], set_cell_size(parts[1], min(room, cell_len(parts[1]))) + "…"]
            out += [Text(f"    {part.strip()}", no_wrap=True) for part in [*parts, "", ""][:2]]
        return out
