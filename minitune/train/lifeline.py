"""Whether the other processes of a run are alive. A thread beside the steps: it beats, and looks at the
others' beats; where one is missing, or has failed, it ends this process. One process says why. A step that hangs in a
process that lives is not found here."""

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
GRACE = 10.0  # from a launcher's SIGTERM, which comes as soon as one process has died, to the end


class Lifeline(threading.Thread):
    """store: where all processes meet. after: what a person may do when one has died."""

    def __init__(self, store: Store, rank: int, size: int, after: Callable[[], str]):
        super().__init__(name="lifeline", daemon=True)
        self.rank, self.size, self.after = rank, size, after
        self.agreed = False  # every process knows of the error that ends it
        self.closing: Callable[[], None] = lambda: None  # gives the terminal back
        self._store = store.clone()  # type: ignore[attr-defined]  # one connection a thread
        self._mine = store
        self._patience = SILENT
        self._told = float("inf")
        self._ended = threading.Event()
        self._mine.set(f"beat/{rank}", "0")
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
                self._store.set(beats[self.rank], str(count))
                if self._store.check(["failed"]) and not self._ended.is_set():
                    self._leave("")
                now = time.monotonic()
                for rank, beat in enumerate(self._store.multi_get(beats)):
                    if (text := beat.decode()) != seen[rank][0]:
                        seen[rank] = text, now
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
                names = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in dead)
                verb = "has ended or is stopped" if len(dead) == 1 else "have ended or are stopped"
                said = self._store.compare_set("failed", "", str(self.rank)).decode()
                self._leave(f"{names} {verb}" if said == str(self.rank) else "")

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
