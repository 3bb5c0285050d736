"""What a person sees of a run: plain lines here, the live view of a terminal in `live.py`; both have these methods."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from minitune.train.watch import Sample


@dataclass(frozen=True)
class About:
    """What a view knows from the beginning: steps and epochs of the run, its name, whether held-out losses will
    come, and the prompts that will be answered."""

    total: int
    epochs: float
    title: str
    holds_out: bool = False
    prompts: Sequence[str] = ()


class View(Protocol):
    """From the run to a person. Nothing here may wait for the device, fail, or cost a step's time.

    every_second: whether it wants news at least so often, where steps are slow.
    """

    every_second: bool

    def start(self, step: int) -> None:
        """The steps begin; `step` are done already."""

    def say(self, line: str) -> None:
        """A line that stays."""

    def progress(self, step: int, epoch: float) -> None:
        """A step was given to the device."""

    def row(self, row: dict[str, Any]) -> None:
        """The newest row of the log, once a logging interval."""

    def losses(self, losses: Sequence[float]) -> None:
        """The losses of the rows since the last time."""

    def held_out(self, step: int, loss: float, best: bool) -> None:
        """A held-out loss."""

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """The answers of these weights."""

    def busy(self, what: str) -> None:
        """What is being done that is no step; "" when it is over."""

    def stopping(self) -> None:
        """The run will save and end; called from a signal handler."""

    def close(self) -> None:
        """Leaves the terminal as it was."""


class Pace:
    """Time left, from the last log intervals, pauses included: they will come again."""

    def __init__(self, total: int, window: int = 60):
        self.total = total
        self._seen: deque[tuple[int, float]] = deque(maxlen=window)

    def push(self, step: int) -> None:
        self._seen.append((step, time.monotonic()))

    @property
    def left(self) -> float | None:
        """Seconds; None while nothing is known."""
        if len(self._seen) < 2:
            return None
        (first, began), (last, now) = self._seen[0], self._seen[-1]
        each = (now - began) / max(1, last - first)
        return max(0.0, each * (self.total - last) - (time.monotonic() - now))


def clock(seconds: float | None) -> str:
    """3661 -> 1:01:01."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def one_line(text: str) -> str:
    """Text that a model wrote, safe for a terminal: no line ends, nothing that moves a cursor."""
    return "".join(c if c.isprintable() else "·" for c in " ".join(text.split()))


def number(value: float | None) -> str:
    return "not finite" if value is None or value != value or abs(value) == float("inf") else f"{value:.4f}"


STOPPING = "stopping after this step, then saving; Ctrl-C again stops at once and saves nothing"


class Lines:
    """A line a log interval, for files, pipes and terminals that can't do more."""

    every_second = False

    def __init__(self, about: About, quiet: bool = False):
        self.about, self.quiet = about, quiet
        self.pace = Pace(about.total)

    def start(self, step: int) -> None:
        self.pace.push(step)

    def say(self, line: str) -> None:
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)

    def progress(self, step: int, epoch: float) -> None:
        pass

    def row(self, row: dict[str, Any]) -> None:
        self.pace.push(row["step"])
        self.say(
            f"step {row['step']}/{self.about.total}  epoch {row['epoch']:.2f}  loss {number(row['loss'])}  "
            f"lr {row['learning_rate']:.2e}  {row['tokens_per_second']:,.0f} tok/s  {row['memory_gib']:.1f} GiB  "
            f"left {clock(self.pace.left)}"
        )

    def losses(self, losses: Sequence[float]) -> None:
        pass

    def held_out(self, step: int, loss: float, best: bool) -> None:
        self.say(f"step {step}/{self.about.total}  held-out loss {number(loss)}" + ("  best so far" if best else ""))

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        for i, sample in enumerate(samples, 1):
            self.say(
                f"step {step}/{self.about.total}  watch {i}  {one_line(sample.prompt)} -> {one_line(sample.answer)}"
            )

    def busy(self, what: str) -> None:
        pass

    def stopping(self) -> None:
        if not self.quiet:
            with contextlib.suppress(OSError, ValueError):  # a handler may not use the stream that it interrupted
                os.write(sys.stderr.fileno(), f"{STOPPING}\n".encode())

    def close(self) -> None:
        pass


def choose(about: About, quiet: bool) -> View:
    """The live view in a terminal that can move its cursor and wants colours; lines elsewhere."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") in ("dumb", "unknown", "")
    if quiet or plain or not sys.stderr.isatty():
        return Lines(about, quiet)
    from minitune.train.live import Live

    return Live(about)
