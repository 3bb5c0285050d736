"""Whether the other processes of a run are alive. A thread beside the steps: it beats, and looks at the
others' beats; where one is missing, or has failed, it ends this process. One process says why.

A beat also says how many steps a process has begun. Where all are in their steps (none saves or answers prompts) and
none begins another for minutes, a step hangs."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

from torch.distributed import Store

BEAT = 1.0  # seconds
SILENT = 20.0  # without a beat, a process is dead, or as good as dead
BROKEN = 4.0  # the same where a connection to it has just broken
HANG = 600.0  # without a new step of any process; at least so many of the longest pauses between steps so far, and so
PAUSES, FIRST = 20, 3  # many of the first step
GRACE = 10.0  # from a launcher's SIGTERM, which comes as soon as one process has died, to the end


class Lifeline(threading.Thread):
    """store: where all processes meet. after: what a person may do when one has died."""

    def __init__(self, store: Store, rank: int, size: int, after: Callable[[], str]):
        super().__init__(name="lifeline", daemon=True)
        self.rank, self.size, self.after = rank, size, after
        self.agreed = False  # every process knows of the error that ends it
        self.closing: Callable[[], None] = lambda: None  # gives the terminal back
        self.doing: Callable[[], str] = lambda: ""  # "steps" where a standstill is a fault
        self.steps = 0  # begun
        self._still = Still()
        self._store = store.clone()  # type: ignore[attr-defined]  # one connection a thread
        self._mine = store
        self._patience = SILENT
        self._told = float("inf")
        self._ended = threading.Event()
        self._mine.set(f"beat/{rank}", "0 0")
        self._mine.set(f"here/{rank}", socket.gethostname())

    def others(self, wait: timedelta) -> list[int]:
        """Waits for all; the ranks that did not come."""
        names = [f"here/{rank}" for rank in range(self.size)]
        with suppress(RuntimeError):
            self._mine.wait(names, wait)
            return []
        return [rank for rank, name in enumerate(names) if not self._mine.check([name])]

    def first_to_say(self) -> bool:
        """Whether no other process has said yet why the run ends; from now on one has."""
        mine = str(self.rank)
        return self._mine.compare_set("failed", "", mine).decode() == mine

    def fail(self, lost: bool) -> None:
        """This process has met an error. lost: since another one is gone; then that one is found and named. Returns
        where the error is to be said here; otherwise ends the process."""
        if lost:
            self._patience = BROKEN
            self.join(2 * SILENT)
        try:
            first = self.first_to_say()
        except RuntimeError:
            first = True
        if not first:
            self._leave("")
        self._ended.set()
        self._linger()

    def told(self, *_: object) -> None:
        """The signal handler outside the steps: the dead process is looked for before this one ends too."""
        self._patience, self._told = BROKEN, time.monotonic()

    def end(self) -> None:
        """The run is over: nobody is missed from now on."""
        self._ended.set()

    def run(self) -> None:
        seen = {rank: ("", time.monotonic()) for rank in range(self.size)}
        hosts = ["?"] * self.size
        beats = [f"beat/{rank}" for rank in range(self.size)]
        count = 0
        while not self._ended.wait(BEAT):
            count += 1
            try:
                hosts = [h.decode() for h in self._store.multi_get([f"here/{r}" for r in range(self.size)])]
                mark = self.steps if self.doing() == "steps" else 0
                self._store.set(beats[self.rank], f"{count} {mark}")
                if self._store.check(["failed"]) and not self._ended.is_set():
                    self._leave("")
                now = time.monotonic()
                texts = [beat.decode() for beat in self._store.multi_get(beats)]
                seen = {r: (text, now if text != seen[r][0] else seen[r][1]) for r, text in enumerate(texts)}
            except RuntimeError:
                if not self._ended.is_set():
                    # nobody is left who could choose a speaker: one a machine
                    speaks = self.rank == 1 or os.environ.get("LOCAL_RANK") == "0"
                    self._leave("rank 0, at which all others meet, has ended" if speaks else "")
                return
            if now - self._told > GRACE:
                self._leave("")
            dead = [rank for rank, (_, since) in seen.items() if now - since > self._patience]
            if dead and not self._ended.is_set():
                verb = "has ended or is stopped" if len(dead) == 1 else "have ended or are stopped"
                self._leave_first(f"{named(dead, hosts)} {verb}")
            if (behind := self._still.behind([int(text.split()[1]) for text in texts], now)) and not dead:
                seconds = self._still.seconds(now)
                self._leave_first(f"no step has ended for {seconds:.0f} s; waited for: {named(behind, hosts)}")

    def _leave_first(self, why: str) -> None:
        """Ends the process, and says why if no other has."""
        said = self._store.compare_set("failed", "", str(self.rank)).decode()
        self._leave(why if said == str(self.rank) else "")

    def _leave(self, why: str) -> None:
        """Ends the process at once: its other threads may wait for ever."""
        with suppress(Exception):
            self.closing()
        if why:
            print(f"minitune: {why}; {self.after()}", file=sys.__stderr__, flush=True)
        self._linger()
        os._exit(1)

    def _linger(self) -> None:
        """Others may meet at this process: it stays until they have read why the run ends."""
        if self.rank == 0:
            time.sleep(2.5 * BEAT)


class Still:
    """Whether all processes stand still in their steps."""

    def __init__(self) -> None:
        self._marks: list[int] = []
        self._since, self._longest, self._first = 0.0, 0.0, 0.0

    def behind(self, marks: list[int], now: float) -> list[int]:
        """Those that stand still, or, where some have come further, those that these wait for; none while it may still
        go on. marks: each process's steps begun; 0 where it does something else. The first step may take its time."""
        if marks != self._marks:
            if self._marks and min(self._marks) > 1:
                self._longest = max(self._longest, now - self._since)
            elif self._marks and min(self._marks) == 1:  # with what is compiled in it
                self._first = now - self._since
            self._marks, self._since = marks, now
        if min(marks) < 2 or self.seconds(now) < max(HANG, PAUSES * self._longest, FIRST * self._first):
            return []
        return [rank for rank, mark in enumerate(marks) if mark == min(marks)]

    def seconds(self, now: float) -> float:
        """Since the last of them moved."""
        return now - self._since


def named(ranks: list[int], hosts: list[str]) -> str:
    return ", ".join(f"rank {rank} on {hosts[rank]}" for rank in ranks)
