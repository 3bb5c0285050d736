"""What can't work, said before anything is read or written."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

from minitune.checkpoint import resume
from minitune.config import TrainConfig, UserError

# name: (least, below), the bounds of a setting; below is never reached
BOUNDS: dict[str, tuple[float, float]] = {
    "max_length": (1, math.inf),
    "per_device_train_batch_size": (1, math.inf),
    "gradient_accumulation_steps": (1, math.inf),
    "tokens_per_step": (0, math.inf),
    "tokens_per_pack": (1, math.inf),
    "logging_steps": (1, math.inf),
    "save_steps": (0, math.inf),
    "eval_steps": (0, math.inf),
    "save_total_limit": (1, math.inf),
    "warmup_steps": (0, math.inf),
    "warmup_ratio": (0, 1),
    "weight_decay": (0, math.inf),
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_epsilon": (0, math.inf),
    "max_grad_norm": (0, math.inf),
    "resolved_learning_rate": (0, math.inf),
    "eval_fraction": (0, 1),
    "seed": (0, 2**32),
    "lora_r": (1, math.inf),
    "lora_alpha": (0, math.inf),
    "lora_dropout": (0, 1),
}


def check_settings(config: TrainConfig) -> None:
    """UserError for values that can't work, before anything is read."""
    for name in ("model", "data", "output"):
        if not getattr(config, name):
            raise UserError(f"--{name} is missing")
    for name, (least, below) in BOUNDS.items():
        value = getattr(config, name)
        if not least <= value < below:  # a NaN is neither
            end = f" and below {below:g}" if math.isfinite(below) else ""
            raise UserError(f"{name.removeprefix('resolved_')} is {value}; it is at least {least}{end}")
    if config.max_steps <= 0 and not 0 < config.num_train_epochs < math.inf:
        raise UserError(f"num_train_epochs is {config.num_train_epochs}; it is more than 0")
    if config.eval_data and config.eval_fraction:
        raise UserError("give --eval_data or --eval_fraction, not both")
    for name in ("data", "eval_data"):  # before a download of gigabytes
        path = getattr(config, name)
        if path and not Path(path).exists():
            raise UserError(f"{path}: no such file")


def check_output(output: Path, config: TrainConfig) -> Path | None:
    """The checkpoint to go on from, None to begin at the first step.

    UserError where the folder is a file, or holds another run. With --resume, a run that was stopped before its
    first checkpoint begins again.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; give a folder as --output")
    place = next((p for p in (output, *output.absolute().parents) if p.exists()), output)
    try:
        tempfile.TemporaryDirectory(dir=place, prefix=".minitune-").cleanup()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"{output}: can't be written ({place}: {reason}); give another --output") from None
    holds = [n for n in ("run.yaml", "config.json", "adapter_config.json") if (output / n).exists()]
    found = None
    if config.resume in resume.NEWEST:
        found = resume.newest(output)
        begun = "run.yaml" in holds and not (output / "summary.json").exists()
        if found is None and not begun:
            raise UserError(f"{output}: no checkpoint to go on from; start without --resume")
    elif config.resume:
        found = resume.find(config.resume)
    if holds and not (config.resume in resume.NEWEST or (found and output.resolve() in found.resolve().parents)):
        mend = "add --resume to go on with it, or give another --output"
        raise UserError(f"{output}: holds another run ({holds[0]}); {mend}")
    return found
