"""Training state on disk: written whole or not at all, read back bit for bit."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from minitune.checkpoint import adapter, filling
from minitune.checkpoint.folder import whole
from minitune.checkpoint.shards import Shards
from minitune.checkpoint.weights import hub_parameters
from minitune.checkpoint.writing import write_safetensors
from minitune.config import UserError
from minitune.model.decoder import Decoder

STATE = "training_state.pt"
LARGE = "training_tensors"  # what of the state is large, in files that are quickly written and read
LEAST = 1 << 20  # bytes from which a tensor is large
NEWEST = ("auto", "true")  # what --resume says without a folder


def checkpoints(output: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    found = [
        p for p in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and (p / STATE).is_file()
    ]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))


@contextmanager
def saved(output: Path, step: int, state: dict[str, Any], keep: int, best: int = 0) -> Iterator[Path]:
    """checkpoint-`step`: yields the folder to write what was learned into, adds `state`, keeps the newest `keep` and
    checkpoint-`best`, however old."""
    with whole(output / f"checkpoint-{step}") as part:
        yield part
        large: dict[str, Tensor] = {}
        small = _apart(state, large)
        if large:
            write_safetensors(part / LARGE, large.items())
        torch.save(small, part / STATE)
    left_by_a_kill = output.glob(".checkpoint-*")
    for old in [*checkpoints(output)[: -max(1, keep)], *left_by_a_kill]:
        if old.name != f"checkpoint-{best}":
            shutil.rmtree(old, ignore_errors=True)


def newest(output: Path) -> Path | None:
    """The run's last checkpoint."""
    return next(reversed(checkpoints(output)), None)


def find(resume: str) -> Path:
    """The checkpoint that a user named: its folder, or the newest of a run's. UserError where there is none."""
    folder = Path(resume)
    found = folder if (folder / STATE).is_file() else newest(folder)
    if found is None:
        raise UserError(f"{resume}: no checkpoint there ({STATE} is missing)")
    return found


def _apart(value: Any, large: dict[str, Tensor]) -> Any:
    """The value with its large tensors moved into `large`, their names in their places."""
    if isinstance(value, Tensor) and value.numel() * value.element_size() >= LEAST:
        large[name := f"{LARGE}.{len(large)}"] = value
        return name
    if isinstance(value, dict):
        return {key: _apart(one, large) for key, one in value.items()}
    return [_apart(one, large) for one in value] if isinstance(value, list) else value


def _together(value: Any, large: dict[str, Tensor]) -> Any:
    if isinstance(value, str):
        return large.get(value, value)
    if isinstance(value, dict):
        return {key: _together(one, large) for key, one in value.items()}
    return [_together(one, large) for one in value] if isinstance(value, list) else value


def read_state(folder: Path) -> dict[str, Any]:
    """What `saved` was given, on the CPU."""
    try:
        state: dict[str, Any] = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:100]
        raise UserError(f"{folder / STATE}: damaged ({reason}); use an older one") from None
    if not (folder / LARGE).is_dir():
        return state
    try:
        with Shards(folder / LARGE) as files:
            places = [(entry, torch.empty(entry.shape, dtype=entry.dtype)) for entry in files.entries()]
            filling.fill(places)
    except UserError:
        raise UserError(f"{folder / LARGE}: damaged; use an older one") from None
    return cast(dict[str, Any], _together(state, {entry.name: tensor for entry, tensor in places}))


def linked(checkpoint: Path, folder: Path) -> bool:
    """Puts what was learned, as `checkpoint` has it, into `folder`: weights that take no further room on the disk,
    where its file system has links. False where there is no such checkpoint."""
    if not (checkpoint / STATE).is_file():
        return False
    for file in checkpoint.iterdir():
        if file.is_file() and file.name not in (STATE, "run.yaml"):
            try:
                (os.link if file.suffix == ".safetensors" else shutil.copyfile)(file, folder / file.name)
            except OSError:
                shutil.copyfile(file, folder / file.name)
    return True


@torch.no_grad()
def load_weights(folder: Path, decoder: Decoder) -> None:
    """Puts what was learned back into the decoder; an adapter must be attached already."""
    if decoder.lora_config is not None:
        saved, wanted = adapter.read_tensors(folder), adapter.adapter_parameters(decoder)
        if saved.keys() != wanted.keys():
            raise UserError(f"{folder}: the checkpoint's adapter has other modules than the settings ask for")
        for name, target in wanted.items():
            target.copy_(saved[name])
    else:
        with Shards(folder) as shards:
            for name, target in hub_parameters(decoder).items():
                target.copy_(shards.get(name, target.shape))
