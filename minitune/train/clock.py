"""Where a run's seconds go (`--profile`)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Clock:
    """Every second belongs to one name: the one that was begun last. What a thread does meanwhile (the base weights are
    read while the data are) counts only as far as it is waited for.

    A card works on behind the host: what it still owes is waited for, and counted, where the host next waits.
    """

    def __init__(self, name: str):
        self.seconds: dict[str, float] = {}
        self.name, self._since = name, time.perf_counter()

    def begin(self, name: str) -> None:
        """From now on, `name`."""
        now = time.perf_counter()
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + now - self._since
        self.name, self._since = name, now

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """`name` inside, what was before it afterwards."""
        before = self.name
        self.begin(name)
        try:
            yield
        finally:
            self.begin(before)

    def line(self) -> str:
        """All of it, in the order in which it came up."""
        self.begin(self.name)
        return "seconds: " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.seconds.items())


def process_seconds() -> float:
    """Seconds since this process began; 0 where the system does not say."""
    try:
        ticks = int(Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()[19])
        up = float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])
        return max(0.0, up - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return 0.0
