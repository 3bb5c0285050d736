"""Progress, log.jsonl, loss.png, summary.json. The only place that waits for the device."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from minitune.checkpoint.folder import is_full_disk, write_text
from minitune.config import UserError
from minitune.train.step import StepResult


class Stopped(UserError):
    """The run ended itself; what was saved stays good."""

    exit_code = 1


class Interrupt:
    """Ctrl-C as a wish that the loop reads between steps: an update that was broken off half-way could not be saved.
    A second Ctrl-C stops at once, and saves nothing."""

    def __init__(self) -> None:
        self.wanted = False

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._before)

    def _note(self, *_: object) -> None:
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True


@dataclass
class Report:
    """Collects a row a step on the device and fetches them every `every` steps.

    folder: where log.jsonl and loss.png go. total: steps of the run. scaled: whether fp16 loss scaling may skip steps.
    """

    folder: Path
    total: int
    every: int
    device: torch.device
    scaled: bool = False
    quiet: bool = False
    rows: list[dict[str, Any]] = field(default_factory=list)
    evals: list[tuple[int, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._pending: list[tuple[dict[str, Any], StepResult]] = []
        self._since = time.perf_counter()
        self._skipped_in_a_row = 0
        self._drawn = (0, 0)
        self._bar = _Bar(self.total, self.quiet)

    def resume(self, step: int) -> None:
        """Takes up a log that was cut at `step`; later rows of the interrupted run are dropped."""
        path = self.folder / "log.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else [""]
        lines.pop()  # empty, or half a line where a kill fell into the writing
        kept = [row for row in map(json.loads, lines) if row["step"] <= step]
        self.rows = [r for r in kept if "eval_loss" not in r]
        self.evals = [(r["step"], r["eval_loss"]) for r in kept if "eval_loss" in r]
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(json.dumps(r) + "\n" for r in kept))
        self._bar.advance(step)

    def say(self, line: str) -> None:
        """A line for the person, above the progress bar."""
        self._bar.say(line)

    def step(self, step: int, epoch: float, rate: float, tokens: int, result: StepResult) -> None:
        """Takes a step's numbers; waits for the device only when a log row is due."""
        row = {"step": step, "epoch": round(epoch, 4), "learning_rate": rate, "tokens": tokens}
        self._pending.append((row, result))
        if len(self._pending) >= self.every or step == self.total:
            self.flush()

    def flush(self) -> None:
        """Fetches the pending rows in one copy, writes and shows them. Stopped: a value was not finite."""
        if not self._pending:
            return
        fetched = torch.stack([torch.stack([r.loss, r.grad_norm, r.skipped]) for _, r in self._pending]).cpu().tolist()
        now = time.perf_counter()
        speed = sum(row["tokens"] for row, _ in self._pending) / max(now - self._since, 1e-9)
        memory = peak_memory_gib(self.device)
        lines = []
        bad: int | None = None
        for (row, _), (loss, norm, skipped) in zip(self._pending, fetched, strict=True):
            self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
            if skipped and (not self.scaled or self._skipped_in_a_row > 25):
                bad = bad or row["step"]
            row |= {"loss": _number(loss), "grad_norm": _number(norm), "tokens_per_second": round(speed, 1)}
            row["memory_gib"] = round(memory, 3)
            self.rows.append(row)
            lines.append(json.dumps(row) + "\n")
        self._append("".join(lines))
        last = self._pending[-1][0]
        self._pending.clear()
        self._since = now
        self._bar.show(last)
        if bad is not None:
            raise Stopped(
                f"step {bad}: the loss or a gradient is not finite; nothing was learned from that step on. The last "
                f"checkpoint in {self.folder} is good: lower --learning_rate, or look at that step's rows"
            )

    def evaluated(self, step: int, loss: float) -> None:
        """A held-out loss."""
        self.evals.append((step, loss))
        self._append(json.dumps({"step": step, "eval_loss": loss}) + "\n")
        self.say(f"step {step}: held-out loss {loss:.4f}")
        self._since = time.perf_counter()

    def _append(self, lines: str) -> None:
        path = self.folder / "log.jsonl"
        try:
            with path.open("a", encoding="utf-8") as log:
                log.write(lines)
        except OSError as error:
            if is_full_disk(error):
                raise UserError(f"{path}: no space left on the disk; free some and go on with --resume") from None
            raise

    def pause(self) -> None:
        """Leaves time spent elsewhere (saving) out of the next tokens per second."""
        self._since = time.perf_counter()

    def close(self) -> None:
        self._bar.close()

    def picture(self) -> None:
        """Draws loss.png where there is something new: every step, a smoothed line, and the held-out losses."""
        known = (len(self.rows), len(self.evals))
        if self._drawn == known:
            return
        self._drawn = known
        draw(self.folder / "loss.png", self.rows, self.evals)


def _number(value: float) -> float | None:
    """JSON has no NaN: what is not finite is null."""
    return value if value == value and abs(value) != float("inf") else None


def smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average without the bias of its start."""
    out: list[float] = []
    mean = norm = 0.0
    for value in values:
        mean, norm = weight * mean + (1 - weight) * value, weight * norm + (1 - weight)
        out.append(mean / norm)
    return out


def draw(path: Path, rows: list[dict[str, Any]], evals: list[tuple[int, float]]) -> None:
    """The loss over the steps as a PNG."""
    import logging

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it speaks while it builds its font cache
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    known = [(r["step"], r["loss"]) for r in rows if r.get("loss") is not None]
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    if known:
        steps, losses = zip(*known, strict=True)
        axes.plot(steps, losses, color="#9db7d5", linewidth=1, label="loss")
        axes.plot(steps, smooth(list(losses)), color="#1f4e89", linewidth=2, label="smoothed")
    if evals:
        axes.plot(*zip(*evals, strict=True), "o-", color="#c8553d", label="held out")
    axes.set(xlabel="step", ylabel="loss (nats per learned token)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if known or evals:
        axes.legend(frameon=False)
    part = path.with_name(f".{path.name}.part")
    try:
        figure.savefig(part, format="png")
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        if is_full_disk(error):
            raise UserError(f"{path}: no space left on the disk; free some and go on with --resume") from None
        raise
    finally:
        plt.close(figure)


def peak_memory_gib(device: torch.device) -> float:
    """On a card the allocator's reserved peak; on the CPU the process's resident peak."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class _Bar:
    """A live line in a terminal; a plain line a log row elsewhere."""

    def __init__(self, total: int, quiet: bool):
        self.total, self.quiet, self.live = total, quiet, sys.stderr.isatty() and not quiet
        if self.live:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self.progress = Progress(
                TextColumn("training"),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self.task = self.progress.add_task("training", total=total, text="")
            self.progress.start()

    def advance(self, step: int) -> None:
        if self.live:
            self.progress.update(self.task, completed=step)

    def say(self, line: str) -> None:
        if self.live:
            self.progress.console.print(line, highlight=False, markup=False, soft_wrap=True)
        elif not self.quiet:
            print(line, file=sys.stderr, flush=True)

    def show(self, row: dict[str, Any]) -> None:
        loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
        text = f"loss {loss}  lr {row['learning_rate']:.2e}  {row['tokens_per_second']:,.0f} tok/s"
        text += f"  {row['memory_gib']:.1f} GiB"
        if self.live:
            self.progress.update(self.task, completed=row["step"], text=text)
        else:
            self.say(f"step {row['step']}/{self.total}  epoch {row['epoch']:.2f}  {text}")

    def close(self) -> None:
        if self.live:
            self.progress.stop()
            self.live = False
