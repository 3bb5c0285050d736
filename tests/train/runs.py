"""What tests of whole runs share: changed settings, their command line, what a run left, commands in a terminal."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from minitune import TrainConfig

ROWS = 22  # not a multiple of a step's four: the last step of an epoch is short


def with_(config: TrainConfig, **changes: Any) -> TrainConfig:
    return dataclasses.replace(config, **changes)


def argv_of(config: TrainConfig, **changes: Any) -> list[str]:
    """The command of these settings, where they are not the defaults."""
    plain = dataclasses.asdict(dataclasses.replace(config, **changes))
    default = dataclasses.asdict(TrainConfig())
    changed = {k: v for k, v in plain.items() if k != "template" and v != default[k]}
    return ["train", *(f"--{k}={','.join(v) if isinstance(v, tuple) else v}" for k, v in changed.items())]


def rows_of(folder: str | Path, name: str = "log.jsonl") -> list[dict[str, Any]]:
    """A log's rows."""
    return [json.loads(line) for line in (Path(folder) / name).read_text(encoding="utf-8").splitlines()]


def log_of(folder: str | Path) -> list[dict[str, Any]]:
    """log.jsonl without what the clock and the machine decide."""
    return [{k: v for k, v in r.items() if k not in ("tokens_per_second", "memory_gib")} for r in rows_of(folder)]


def result_of(folder: str | Path) -> dict[str, Tensor]:
    return load_file(next(Path(folder).glob("*model.safetensors")))


def same(one: str | Path, other: str | Path) -> None:
    """Equal bit for bit: every tensor and every number of the log."""
    a, b = result_of(one), result_of(other)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert log_of(one) == log_of(other)


def in_terminal(argv: list[str], tty: str, environment: dict[str, str], seconds: float = 0.0) -> None:
    """The body of a process: one minitune command whose stdin, stdout and stderr are the terminal `tty`; each step
    takes so many seconds more."""
    from minitune.cli import main
    from minitune.train import report
    from minitune.train.step import TrainStep

    report.draw = lambda *_: None
    inner = TrainStep.run
    TrainStep.run = lambda *a: (time.sleep(seconds), inner(*a))[1]  # type: ignore[method-assign]
    os.environ.pop("NO_COLOR", None)
    os.environ.update({"TERM": "xterm-256color", **environment})
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in a shell's background ignore it
    os.setsid()
    slave = os.open(tty, os.O_RDWR)  # the first one opened becomes the session's terminal: Ctrl-C in it is a SIGINT
    for number in range(3):
        os.dup2(slave, number)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    sys.argv[0] = "/usr/bin/minitune"
    sys.exit(main(argv))


def one_of(argv: list[str], log: str, rank: int, size: int, port: int) -> None:
    """The body of a process: one minitune command as a launcher starts it, rank `rank` of `size`."""
    from talker import command

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    command(argv, f"{log}.{rank}")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Launch:
    """`size` processes of one command, started at once; what each says is in `said`, by rank."""

    def __init__(
        self, processes: Any, folder: Path, argvs: list[list[str]], missing: int = 0, body: Callable[..., None] = one_of
    ):
        """missing: processes that the others wait for, and that are never started."""
        self.log, port, size = folder / f"said-{time.monotonic_ns()}", free_port(), len(argvs) + missing
        make = processes.Process
        self.ranks = [make(target=body, args=(argv, str(self.log), r, size, port)) for r, argv in enumerate(argvs)]
        for process in self.ranks:
            process.start()

    def codes(self, seconds: float = 100.0) -> list[int | None]:
        """The exit codes of all; None for one that is not over in time, which is ended."""
        end = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in self.ranks]
        for process in self.ranks:
            process.kill()
        return codes

    @property
    def said(self) -> list[str]:
        paths = [Path(f"{self.log}.{rank}") for rank in range(len(self.ranks))]
        return [path.read_text(encoding="utf-8") if path.is_file() else "" for path in paths]
