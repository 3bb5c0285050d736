"""What a person sees while it runs: one line on stderr, so that stdout holds the result."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Watch:
    """A bar where stderr is a terminal, else nothing but a line a part. quiet: nothing at all."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self._bar: Any = None

    def __enter__(self) -> Watch:
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(file=sys.stderr, highlight=False), transient=True)
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, line: str) -> None:
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.console.print(line, markup=False)
        else:
            print(line, file=sys.stderr, flush=True)

    @contextmanager
    def count(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """(done) -> None, while a part of `total` things runs (0: how many is not known)."""
        if self._bar is None:
            self.say(f"{what}{f': {total:,}' if total else ''}")
            yield lambda done: None
            return
        task = self._bar.add_task(what, total=total or None)
        try:
            yield lambda done: self._bar.advance(task, done)
        finally:
            self._bar.remove_task(task)
