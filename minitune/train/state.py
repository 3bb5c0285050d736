"""What a checkpoint remembers of its run, and whether a resumed run is that run."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from minitune.config import TrainConfig, UserError
from minitune.data.packing import ORDER
from minitune.train.prepare import Prepared

# Settings that may differ between a run and its resumption: none of them changes what is computed.
FREE = {"resume", "output", "source", "logging_steps", "save_steps", "save_total_limit", "eval_steps", "track"}
FREE |= {"profile", "join_timeout", "memory", "deepspeed"}  # whether DeepSpeed saved it, who loads it says
FREE |= {"watch", "watch_steps", "watch_max_new_tokens", "watch_temperature"}
FREE |= {"early_stopping_patience", "early_stopping_threshold", "load_best_model_at_end"}
# Only the order of additions differs: allowed, since a run that ran out of memory needs it, and said.
ROUNDING = {"tokens_per_pack", "gradient_checkpointing"}
# Only their product is a step's size.
PRODUCT = {"per_device_train_batch_size", "gradient_accumulation_steps"}
# Rows are compared by what they are, wherever their file is.
ROWS = {"data", "eval_data"}


def identity(config: TrainConfig, ready: Prepared) -> dict[str, Any]:
    """What must be equal for a resumed run to be the same run, as plain values."""
    return {
        "settings": json.loads(json.dumps(dataclasses.asdict(config))),
        "base": os.path.realpath(ready.base),
        "data": ready.fingerprint,
        "order": ORDER,
        "held_out": ready.held_out.digest() if len(ready.held_out) else "",
    }


def check_same(folder: Path, state: dict[str, Any], config: TrainConfig, ready: Prepared) -> list[str]:
    """UserError where `state`, read from `folder`, is another run's; else what is worth a line."""
    now, was = identity(config, ready), state["settings"]
    notes = []
    for name, value in now["settings"].items():
        before = was.get(name, getattr(TrainConfig, name, value))  # a setting that is younger than the checkpoint
        before = list(before) if isinstance(before, tuple) else before
        if before == value or name in FREE | ROWS or (name == "optim" and {before, value} == {"auto", "adamw"}):
            continue
        if (
            name in PRODUCT
            and was["per_device_train_batch_size"] * was["gradient_accumulation_steps"] == config.rows_per_step
        ):
            continue
        if name == "model" and _same_model(str(before), state, now["base"]):
            continue
        if name not in ROUNDING:
            raise UserError(f"{folder}: was trained with {name} {before}, now it is {value}")
        notes.append(f"note: {name} was {before}, now it is {value}: the same steps, rounded otherwise")
    if state.get("order", 1) != now["order"]:
        notes.append("note: the checkpoint is of a minitune with another order: this epoch may see rows twice, or not")
    if state["data"] != now["data"]:
        raise UserError(f"{folder}: was trained on other rows than {config.data} gives now")
    if state.get("held_out", now["held_out"]) != now["held_out"]:
        raise UserError(f"{folder}: its held-out rows were others than those that are given now")
    return notes


def _same_model(before: str, state: dict[str, Any], base: str) -> bool:
    """Another spelling of one folder (./x, x, absolute), or a hub's name and the folder that it was loaded into."""
    return state.get("base", os.path.realpath(before)) == base
