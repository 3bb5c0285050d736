"""What a run says of itself beforehand, what it refuses, and what it says of its time after its first steps."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from minitune.checkpoint.weights import int4_group
from minitune.config import TrainConfig, UserError, bytes_of
from minitune.data.loader import Loader
from minitune.data.store import EncodedRows
from minitune.model.decoder import DecoderConfig
from minitune.train import cards, plan, speed
from minitune.train.checks import several
from minitune.train.memory import GIB
from minitune.train.parallel import Team
from minitune.train.plan import Plan
from minitune.train.prepare import Prepared, training_dtype

PROBE = 10  # steps that are measured before the run's end is foretold; those of the first interval are not
SLACK = 1.05  # by how much the arithmetic may be wrong where nobody named a bound


def foresee(
    config: TrainConfig, ready: Prepared, device: torch.device, shape: DecoderConfig, team: Team
) -> tuple[TrainConfig, Plan | None, list[str]]:
    """(the settings with what the plan decides, the plan, what is said of it); UserError where it can't fit. A CPU,
    several processes and DeepSpeed have none. --memory holds from here on."""
    if device.type != "cuda" and config.memory:
        raise UserError("memory bounds a card, and this machine has none; leave it out")
    if device.type != "cuda" or team.size > 1 or config.deepspeed:
        optim = "adamw" if config.method == "full" and config.optim == "auto" else config.optim
        return dataclasses.replace(config, optim=optim), None, []  # type: ignore[arg-type]
    cards.check_served(device)
    dtype, int4 = training_dtype(config, device), int4_group(ready.base)
    planner = plan.planner_here(config, shape, ready.learn, ready.held_out, dtype, device, int4)
    made = planner.plan(config)
    assert made.room is not None
    if made.parts.total > made.room * (1.0 if config.memory else SLACK):
        raise planner.refused(config, made)
    if cap := bytes_of(config.memory):
        cards.hold(device, cap, made.parts)
    decided: dict[str, Any] = {"tokens_per_pack": made.choice.pack}
    if config.method == "full":
        decided["optim"] = made.choice.optim
    return dataclasses.replace(config, **decided), made, plan.lines(config, made)


def hopeless(config: TrainConfig, base: Path, shape: DecoderConfig, device: torch.device) -> bool:
    """Whether not even steps of a hundred tokens fit: `foresee` will refuse, and nothing need be read. Of one process
    without DeepSpeed."""
    if device.type != "cuda" or config.deepspeed or several():
        return False
    nothing = EncodedRows.of([])
    dtype, int4 = training_dtype(config, device), int4_group(base)
    planner = plan.planner_here(config, shape, nothing, nothing, dtype, device, int4)
    assert planner.room is not None
    return planner.least(config) > planner.room * (1.0 if config.memory else SLACK)


class Foretold:
    """A run's end, from its first steps. plan: whose prediction stands beside it. loader: whose steps it goes through:
    the last one of an epoch may be far smaller than those that are measured, so that time goes by tokens."""

    def __init__(self, total: int, made: Plan | None, loader: Loader):
        self.total, self.plan, self.step_seconds = total, made, 0.0
        self.tokens = float(loader.lengths.sum()) / len(loader.steps(0))  # of a step, in the mean

    def line(self, done: int, timed: Sequence[tuple[int, float, int]]) -> str:
        """What to say now, once; "" otherwise. timed: steps, seconds and tokens of each log interval so far, without
        pauses; the first one has what is slow once."""
        if self.step_seconds or len(timed) < 2 or done >= self.total:
            return ""
        steps, seconds, tokens = (sum(column) for column in zip(*timed[1:], strict=True))
        if steps < min(PROBE, max(1, self.total // 6)):
            return ""
        self.step_seconds = seconds * self.tokens / tokens
        end = time.strftime("%H:%M:%S", time.localtime(time.time() + self.step_seconds * (self.total - done)))
        predicted = ""
        if self.plan is not None and self.plan.seconds is not None:
            predicted = f" (predicted {speed.seconds_said(self.plan.seconds)})"
        return f"{speed.seconds_said(self.step_seconds)} a step{predicted}; the last of {self.total:,} at {end}"

    def summary(self, timed: Sequence[tuple[int, float, int]]) -> dict[str, Any]:
        """For summary.json: what was predicted, and what came of it."""
        steps, seconds = (sum(interval[i] for interval in timed[1:]) for i in (0, 1))
        out: dict[str, Any] = {"step_seconds": round(seconds / steps, 6) if steps else None}
        out["probed_step_seconds"] = round(self.step_seconds, 6) or None
        if self.plan is not None:
            p, choice = self.plan.parts, self.plan.choice
            out["planned"] = {
                "memory_gib": round(p.total / GIB, 3),
                "reserved_gib": round(p.reserved / GIB, 3),
                "step_seconds": self.plan.seconds and round(self.plan.seconds, 6),
                "optim": choice.optim,
                "whole_layers": choice.whole,
                "tokens_per_pack": choice.pack,
            }
        return out
