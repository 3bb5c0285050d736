"""One process or several behind one seam: who they are, what is added up between them, whose fault it is.

torchrun and DeepSpeed's launcher start the processes and say by environment who each is (RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR, MASTER_PORT). A step's rows are the same however many there are: they are dealt (`data.loader`), and every
sum is over all. Rank 0 alone speaks and writes.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minitune.checkpoint.weights import choose_device
from minitune.config import TrainConfig, UserError
from minitune.train.lifeline import Lifeline

PATIENCE = timedelta(minutes=30)  # one process saves or answers prompts while the others wait


class Elsewhere(UserError):
    """Ends this process without a word: another one says what was wrong."""

    def __init__(self, exit_code: int = 1):
        super().__init__("")
        self.exit_code = exit_code


class Team:
    """The processes of a run; alone, nothing here costs or changes anything. A context manager: leaving it with an
    error ends the others within a minute, with one line."""

    def __init__(self, rank: int = 0, size: int = 1, lifeline: Lifeline | None = None):
        self.rank, self.size, self.lifeline = rank, size, lifeline
        self.restore: Callable[[], object] = lambda: None  # the signal handler of before

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks and writes."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """The device of this process, made the current one; `name` as in the settings."""
        device = choose_device(name)
        if self.size > 1 and device.type == "cuda":
            local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
            if local >= there:
                raise UserError(f"process {local + 1} of this machine finds {there} cards; start one process a card")
            device = torch.device("cuda", local)
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)  # kernels and captures take the current one
        return device

    def watched(self, close: Callable[[], None], doing: Callable[[], str]) -> None:
        """close: gives the terminal back, should another process's death end this one. doing: what this one does now,
        "steps" where a standstill of all is a fault."""
        if self.lifeline is not None:
            self.lifeline.closing, self.lifeline.doing = close, doing

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is at fault for one process inside is at fault for all; it is said once, with the process's name."""
        if self.size == 1:
            yield
            return
        fault: tuple[str, int, str] | None = None
        try:
            yield
        except UserError as error:
            fault = str(error), getattr(error, "exit_code", 2), socket.gethostname()
        faults = self.all_of(fault)
        for rank, one in enumerate(faults):
            if one is not None:
                text, code, host = one
                everyone = all(f is not None and f[0] == text for f in faults)
                raise self.for_all(UserError(text if everyone else f"rank {rank} on {host}: {text}"), code)

    def all_of(self, value: Any) -> list[Any]:
        """What each process holds, by rank. Small values; the host waits."""
        if self.size == 1:
            return [value]
        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, value)
        return out

    def same(self, what: str, value: Any) -> None:
        """UserError, on all, where a process holds another `value` than rank 0."""
        values = self.all_of((value, socket.gethostname()))
        for rank, (other, host) in enumerate(values):
            if other != values[0][0]:
                raise self.for_all(UserError(f"rank {rank} on {host}: {what} differs from rank 0's"), 2)

    def for_all(self, error: UserError, code: int = 1) -> UserError:
        """An error that every process meets at this moment: rank 0 says it, the others end in silence."""
        if self.lifeline is not None:
            self.lifeline.agreed = True
        error.exit_code = code  # type: ignore[attr-defined]
        return error if self.first else Elsewhere(code)

    def any(self, wish: bool) -> bool:
        """Whether any process wishes so. The hosts wait for each other, the devices don't."""
        if self.size == 1:
            return wish
        if self.lifeline is not None and self.lifeline.doing() == "steps":
            self.lifeline.steps += 1  # each step asks
        wishes = torch.tensor(float(wish))
        dist.all_reduce(wishes)
        return bool(wishes > 0)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, equal on all; in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def __enter__(self) -> Team:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self.lifeline is None:
            return
        try:
            self._leave(self.lifeline, error)
        finally:
            self.restore()

    def _leave(self, lifeline: Lifeline, error: BaseException | None) -> None:
        if error is not None and not lifeline.agreed:
            host = socket.gethostname()
            text = "" if isinstance(error, UserError) else str(error).lower()
            lifeline.fail(lost="gloo" in text or "nccl" in text)
            if isinstance(error, UserError):
                error.args = (f"rank {self.rank} on {host}: {error}", *error.args[1:])
            return
        lifeline.end()
        with suppress(RuntimeError):  # gloo sometimes aborts where one process has left and another has not
            self.any(False)
        dist.destroy_process_group()


ALONE = Team()


def join(config: TrainConfig, after: Callable[[], str]) -> Team:
    """The team that the environment names: this process alone, or all that a launcher started.

    after: what is to be said where a process dies. UserError where the others don't come in time.
    """
    size = int(os.environ.get("WORLD_SIZE") or 1)
    if size == 1:
        return Team()
    rank = int(os.environ.get("RANK", "0"))
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    wait = timedelta(seconds=config.join_timeout)
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=wait))
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"rank {rank} of {size}: no meeting at {where} within {config.join_timeout:g} s "
            f"({str(error).splitlines()[0][:120]}); are all processes started, and is the port free and reachable?"
        ) from None
    lifeline = Lifeline(store, rank, size, after)
    missing = lifeline.others(wait)
    if missing:
        ranks = ", ".join(map(str, missing))
        line = f"{len(missing)} of {size} processes (rank {ranks}) did not come to {where} within"
        raise UserError(f"{line} {config.join_timeout:g} s") if lifeline.first_to_say() else Elsewhere(2)
    backend = "gloo" if choose_device_type(config.device) == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=dist.PrefixStore("run", store), rank=rank, world_size=size, timeout=PATIENCE)
    lifeline.start()
    team = Team(rank, size, lifeline)
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGTERM, lifeline.told)
        team.restore = lambda: signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
    return team


def choose_device_type(name: str) -> str:
    """cpu or cuda, also for a name that is no device: that is said later, by all."""
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"
