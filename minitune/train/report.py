"""Progress, log.jsonl, watch.jsonl, loss.png, trackers. The only place that waits for the device."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from minitune.checkpoint.folder import is_full_disk, write_text
from minitune.config import UserError
from minitune.train.picture import Background, draw
from minitune.train.step import StepResult
from minitune.train.stop import Stopped
from minitune.train.track import Trackers
from minitune.train.view import View
from minitune.train.watch import Sample


class Report:
    """Collects a row a step on the device and fetches them at every multiple of `every` steps, more often where steps
    are slow and someone watches.

    folder: where the files go. total: steps of the run. scaled: whether fp16 loss scaling may skip steps.
    """

    def __init__(
        self, folder: Path, total: int, every: int, device: torch.device, view: View, scaled: bool = False
    ) -> None:
        self.folder, self.total, self.every, self.device = folder, total, every, device
        self.view, self.scaled = view, scaled
        self.rows: list[dict[str, Any]] = []
        self.evals: list[tuple[int, float | None]] = []
        self.trackers: Trackers | None = None
        self.background = Background(folder, folder.resolve().name)
        self._pending: list[tuple[dict[str, Any], StepResult]] = []
        self._since = time.perf_counter()
        self._skipped_in_a_row = 0
        self.early: set[int] = set()  # steps of a short run after which its pace is looked at
        self.timed: list[tuple[int, float, int]] = []  # steps, seconds, tokens of each log interval, without pauses

    def resume(self, step: int) -> None:
        """Takes up logs that were cut at `step`; later rows of the interrupted run are dropped."""
        kept = cut(self.folder / "log.jsonl", step)
        self.rows = [r for r in kept if "eval_loss" not in r]
        self.evals = [(r["step"], r["eval_loss"]) for r in kept if "eval_loss" in r]
        if (self.folder / "watch.jsonl").exists():
            cut(self.folder / "watch.jsonl", step)

    def start(self, step: int, best: int, trackers: Trackers | None) -> None:
        """The steps begin behind `step`. best: the step of the lowest held-out loss, 0 for none."""
        self.trackers = trackers
        self.view.losses([r["loss"] for r in self.rows if r["loss"] is not None])
        for at, loss in self.evals:
            self.view.held_out(at, float("nan") if loss is None else loss, at == best)
        self.view.start(step)
        if self.total - step < 4 * self.every:
            self.early = {step + max(1, (self.total - step) // 6), step + max(2, (self.total - step) // 3)}
        self.pause()

    def say(self, line: str) -> None:
        """A line for the person, above the live view."""
        self.view.say(line)

    def step(self, step: int, epoch: float, rate: float, tokens: int, result: StepResult) -> None:
        """Takes a step's numbers; waits for the device only when a log row is due."""
        row = {"step": step, "epoch": round(epoch, 4), "learning_rate": rate, "tokens": tokens}
        self._pending.append((row, result))
        self.view.progress(step, epoch)
        slow = self.view.every_second and time.perf_counter() - self._since > 1.0
        if step % self.every == 0 or step in self.early or step == self.total or slow:
            self.flush()

    def flush(self) -> None:
        """Fetches the pending rows in one copy, writes and shows them. Stopped: a value was not finite."""
        if not self._pending:
            return
        fetched = torch.stack([torch.stack([r.loss, r.grad_norm, r.skipped]) for _, r in self._pending]).cpu().tolist()
        now = time.perf_counter()
        tokens = sum(row["tokens"] for row, _ in self._pending)
        speed = tokens / max(now - self._since, 1e-9)
        memory = peak_memory_gib(self.device)
        new: list[dict[str, Any]] = []
        bad: int | None = None
        for (row, _), (loss, norm, skipped) in zip(self._pending, fetched, strict=True):
            self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
            if skipped and (not self.scaled or self._skipped_in_a_row > 25):
                bad = bad or row["step"]
            row |= {"loss": _finite(loss), "grad_norm": _finite(norm), "tokens_per_second": round(speed, 1)}
            row["memory_gib"] = round(memory, 3)
            new.append(row)
        self._pending.clear()
        self.timed.append((len(new), now - self._since, tokens))
        self._since = now
        self._append("log.jsonl", new)
        self.rows += new
        self.view.losses([row["loss"] for row in new if row["loss"] is not None])
        last = new[-1]["step"]
        if self.view.every_second or last % self.every == 0 or last == self.total:
            self.view.row(new[-1])
        for row in new if self.trackers else ():
            self.trackers.row(row)  # type: ignore[union-attr]
        self.background.refresh()
        if bad is not None:
            raise Stopped(
                f"step {bad}: the loss or a gradient is not finite; nothing from that step on is kept. The last "
                f"checkpoint in {self.folder} is good: lower --learning_rate, or look at that step's rows"
            )

    def evaluated(self, step: int, loss: float, best: bool) -> None:
        """A held-out loss; whether it is the lowest so far."""
        row = {"step": step, "eval_loss": _finite(loss)}
        self.evals.append((step, row["eval_loss"]))
        self._append("log.jsonl", [row])
        self.view.held_out(step, loss, best)
        if self.trackers:
            self.trackers.row(row)
        self.pause()

    def watched(self, step: int, epoch: float, samples: Sequence[Sample]) -> None:
        """The answers of these weights."""
        rows = [{"step": step, "epoch": round(epoch, 4), **vars(sample)} for sample in samples]
        self._append("watch.jsonl", rows)
        self.view.samples(step, samples)
        if self.trackers:
            self.trackers.answers(step, samples)

    def _append(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        path = self.folder / name
        try:
            with path.open("a", encoding="utf-8") as log:
                log.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        except OSError as error:
            raise _full(path, error) from None

    def pause(self) -> None:
        """Leaves time spent elsewhere (saving, held-out loss, answers) out of the next tokens per second."""
        self._since = time.perf_counter()
        self.view.busy("")

    def summary(self) -> dict[str, Any]:
        """What summary.json says of the log and the device."""
        losses = [r["loss"] for r in self.rows if r["loss"] is not None]
        tail = losses[-max(1, len(losses) // 10) :]
        return {
            "loss": sum(tail) / len(tail) if tail else None,
            "peak_memory_gib": round(peak_memory_gib(self.device), 3),
            "device": device_name(self.device),
        }

    def picture_begins(self) -> None:
        """The log is complete: lets loss.png be drawn while the result is written."""
        self.background.last()

    def picture(self) -> None:
        """Has loss.png drawn, here where no other process did it."""
        if self.background.drawn():
            return
        path = self.folder / "loss.png"
        try:
            draw(path, self.rows, self.evals, self.background.title)
        except OSError as error:
            raise _full(path, error) from None

    def close(self) -> None:
        """Whatever happened: the terminal as it was, nothing left running."""
        try:
            self.view.close()
        finally:
            self.background.close()
            if self.trackers:
                self.trackers.close()
                self.trackers = None


class Silent(Report):
    """The report of a process that is not the first: it neither speaks nor writes, nor waits for the device."""

    def resume(self, step: int) -> None:
        pass

    def start(self, step: int, best: int, trackers: Trackers | None) -> None:
        pass

    def say(self, line: str) -> None:
        pass

    def step(self, step: int, epoch: float, rate: float, tokens: int, result: StepResult) -> None:
        pass

    def flush(self) -> None:
        pass

    def evaluated(self, step: int, loss: float, best: bool) -> None:
        pass

    def picture_begins(self) -> None:
        pass

    def picture(self) -> None:
        pass


def cut(path: Path, step: int) -> list[dict[str, Any]]:
    """Drops a log's rows behind `step`; returns the others."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else [""]
    lines.pop()  # empty, or half a line where a kill fell into the writing
    kept = [row for row in map(json.loads, lines) if row["step"] <= step]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
    return kept


def _full(path: Path, error: OSError) -> OSError | UserError:
    if is_full_disk(error):
        return UserError(f"{path}: no space left on the disk; free some and go on with --resume")
    return error


def _finite(value: float) -> float | None:
    """JSON has no NaN: what is not finite is null."""
    return value if value == value and abs(value) != float("inf") else None


def device_name(device: torch.device) -> str:
    """The card's name, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def peak_memory_gib(device: torch.device) -> float:
    """On a card the allocator's reserved peak; on the CPU the process's resident peak."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
