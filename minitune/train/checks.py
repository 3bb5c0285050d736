"""What can't work, said before anything is read or written."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path

from minitune.config import TrainConfig, UserError, bytes_of, files_of
from minitune.train import zero_config
from minitune.train.track import check_trackers
from minitune.train.watch import read_prompts

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
    "early_stopping_patience": (0, math.inf),
    "early_stopping_threshold": (0, math.inf),
    "watch_steps": (0, math.inf),
    "watch_max_new_tokens": (1, math.inf),
    "watch_temperature": (0, math.inf),
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
    "eval_rows": (0, math.inf),
    "max_samples": (0, math.inf),
    "join_timeout": (1, math.inf),
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
    if sum(map(bool, (config.eval_data, config.eval_fraction, config.eval_rows))) > 1:
        raise UserError("give one of --eval_data, --eval_fraction and --eval_rows")
    for name in ("early_stopping_patience", "load_best_model_at_end"):
        if getattr(config, name) and not (config.eval_data or config.eval_fraction or config.eval_rows):
            raise UserError(f"{name} needs held-out rows; add --eval_fraction 0.05, or --eval_data FILE")
    check_memory(config)
    check_optimizer(config)
    if config.method == "qlora" and config.deepspeed:
        raise UserError("qlora and --deepspeed don't go together; torchrun without --deepspeed does, or --method lora")
    check_trackers(config.track)
    stage = zero_config.stage_of(zero_config.read(config)) if config.deepspeed else 0
    if config.watch and (stage == 3 or (several() and config.method == "full" and not stage)):
        raise UserError("watch: no process holds all weights (FSDP2, ZeRO 3); leave --watch out")
    for name in ("data", "eval_data"):  # before a download of gigabytes
        for path in files_of(getattr(config, name)):
            if not Path(path).exists():
                raise UserError(f"{path}: no such file")
    if config.watch:
        read_prompts(Path(config.watch))


def several() -> bool:
    """Whether a launcher has started several processes."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def check_memory(config: TrainConfig) -> None:
    """UserError for a bound that is none, or that nothing could hold."""
    if not config.memory:
        return
    bytes_of(config.memory)
    if config.deepspeed or several():
        raise UserError("memory is for one process on one card; leave it out")
    if config.device.startswith("cpu"):
        raise UserError("memory bounds a card, and this run is on the CPU; leave it out")


def check_optimizer(config: TrainConfig) -> None:
    """UserError for an optimizer that does not go with the rest."""
    if config.optim in ("auto", "adamw"):
        return
    if config.method != "full":
        raise UserError(f"optim {config.optim} is for --method full; an adapter's moments are small: leave it out")
    if config.deepspeed or several():
        raise UserError(f"optim {config.optim} is for one process on one card; leave it out, or use --optim adamw")
    if config.dtype == "float16":
        raise UserError(f"optim {config.optim} rounds into bfloat16 weights; use --dtype bfloat16, or --optim adamw")


def check_output(output: Path, config: TrainConfig) -> Path | None:
    """The checkpoint to go on from, None to begin at the first step.

    UserError where the folder is a file, or holds another run. With --resume, a run that was stopped before its
    first checkpoint begins again.
    """
    from minitune.checkpoint import resume

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
