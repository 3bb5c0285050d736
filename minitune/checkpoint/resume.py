"""Training state on disk: written whole or not at all, read back bit for bit."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch

from minitune.checkpoint import adapter
from minitune.checkpoint.folder import save_hub_folder, whole
from minitune.checkpoint.weights import Shards, hub_parameters
from minitune.config import UserError
from minitune.model.decoder import Decoder

STATE = "training_state.pt"


def checkpoints(output: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    found = [
        p for p in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and (p / STATE).is_file()
    ]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))


def save(
    output: Path, step: int, decoder: Decoder, base: Path, base_name: str, state: dict[str, Any], keep: int
) -> Path:
    """Writes checkpoint-`step`: what was learned, in its usual format, and `state`. Keeps the newest `keep`."""
    folder = output / f"checkpoint-{step}"
    with whole(folder) as part:
        if decoder.lora_config is not None:
            adapter.save_adapter(decoder, part, base_name)
        else:
            save_hub_folder(decoder, base, part)
        torch.save(state, part / STATE)
    for old in checkpoints(output)[: -max(1, keep)]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def find(output: Path, resume: str) -> Path:
    """The folder to go on from: `auto` is the newest checkpoint of the run. UserError where there is none."""
    if resume not in ("auto", "true"):
        folder = Path(resume)
        inner = checkpoints(folder) if folder.is_dir() and not (folder / STATE).is_file() else []
        folder = inner[-1] if inner else folder
        if not (folder / STATE).is_file():
            raise UserError(f"{resume}: no checkpoint there ({STATE} is missing)")
        return folder
    found = checkpoints(output)
    if not found:
        raise UserError(f"{output}: no checkpoint to go on from; start without --resume")
    return found[-1]


@torch.no_grad()
def load(folder: Path, decoder: Decoder) -> dict[str, Any]:
    """Puts what was learned back into the decoder (an adapter must be attached already); returns the state."""
    if decoder.lora_config is not None:
        saved, wanted = adapter.read_tensors(folder), adapter.adapter_parameters(decoder)
        if saved.keys() != wanted.keys():
            raise UserError(f"{folder}: the checkpoint's adapter has other modules than the settings ask for")
        for name, target in wanted.items():
            target.copy_(saved[name])
    else:
        with Shards(folder) as shards:
            for name, target in hub_parameters(decoder).items():
                target.copy_(shards.get(name))
    try:
        return torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{folder / STATE}: damaged ({str(error).splitlines()[0][:100]}); use an older one") from None
