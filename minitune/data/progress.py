"""Progress while a file is read. Apart from the report's screen: a run without a terminal imports no rich."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

PATIENCE = 0.7  # seconds before a bar shows


def watch(what: str, fraction: Callable[[], float], rows: Iterable[Any]) -> Iterator[Any]:
    """The rows, with a progress line on stderr while they are read, where that is a terminal."""
    if not sys.stderr.isatty():
        yield from rows
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    begun = time.monotonic()
    rows_done = TextColumn("{task.fields[done]:,} rows")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        rows_done,
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    task = progress.add_task(what, total=1.0, done=0)
    try:
        for count, row in enumerate(rows, 1):
            yield row
            if count % 500 == 0 and time.monotonic() - begun > PATIENCE:
                progress.start()  # what is done at once shows no bar
                progress.update(task, completed=fraction(), done=count)
    finally:
        progress.stop()
