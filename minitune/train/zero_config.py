"""DeepSpeed's JSON file beside our settings: `auto` is filled from ours, what contradicts them is refused, what
DeepSpeed or we pass over is said in a line. A preflight says before the weights are read whether its CPU Adam builds
here and fits this machine's memory."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

from minitune.config import TrainConfig, UserError

MISSING = "--deepspeed: the package is not installed; pip install 'minitune[deepspeed]', or leave --deepspeed out"
# A parameter's float32 master (4), its gradient (4), two moments (8) and a 16-bit buffer (2), as DeepSpeed 0.19.8 holds
# them for ZeRO 2; 2 more where a step is several packs. Not measured for ZeRO 3, whose weights may lie there too.
STATE_BYTES, WEIGHT_BYTES = 18, 2

# Outer ones first.
ZERO = "zero_optimization"
BLOCKS = (ZERO, f"{ZERO}.offload_optimizer", f"{ZERO}.offload_param", "optimizer", "optimizer.params", "fp16", "bf16")


def read(config: TrainConfig) -> dict[str, Any]:
    """The file's object; UserError where it is missing, damaged, or the package is not installed."""
    path = Path(config.deepspeed)
    if not path.is_file():
        raise UserError(f"{path}: no such file; --deepspeed names a JSON file")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: not a JSON object")
    for name in BLOCKS:
        outer, _, last = name.rpartition(".")
        value = raw.get(outer, {} if outer else raw).get(last, {})
        if not isinstance(value, dict) and not (value is None and "offload" in name):  # null: no offload
            raise UserError(f"{path}: {name} is {json.dumps(value)}; write an object")
    stage = block(raw, "zero_optimization").get("stage", 0)
    if type(stage) is not int or stage not in (1, 2, 3):
        mend = "write 1, 2 or 3; torchrun without --deepspeed adds up gradients"
        raise UserError(f"{path}: zero_optimization.stage is {json.dumps(stage)}; {mend}")
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(MISSING)
    return raw


def block(raw: dict[str, Any], *names: str) -> dict[str, Any]:
    """A part of the file; {} where it is absent."""
    for name in names:
        raw = raw.get(name) or {}
    return raw if isinstance(raw, dict) else {}


def stage_of(raw: dict[str, Any]) -> int:
    return int(block(raw, "zero_optimization").get("stage", 0))


def offloads(raw: dict[str, Any]) -> bool:
    """Whether the optimizer runs on the CPU's memory."""
    return block(raw, "zero_optimization", "offload_optimizer").get("device", "none") != "none"


def filled(raw: dict[str, Any], config: TrainConfig, dtype: str, hidden: int, ranks: int) -> dict[str, Any]:
    """The object that DeepSpeed gets. UserError where a value contradicts a setting of ours, or an `auto` is none that
    we know."""
    fill = _Fill(config.deepspeed, json.loads(json.dumps(raw)))
    rows = config.rows_per_step
    fill.equal("train_batch_size", rows, "a step's rows")
    fill.equal("train_micro_batch_size_per_gpu", config.per_device_train_batch_size, "per_device_train_batch_size")
    fill.equal("gradient_accumulation_steps", config.gradient_accumulation_steps, "gradient_accumulation_steps")
    # What DeepSpeed is told of sizes: a pack is its micro-step, and the loop says where a step ends.
    fill.out |= {"train_batch_size": ranks, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    fill.equal("gradient_clipping", config.max_grad_norm, "max_grad_norm", absent=config.max_grad_norm)
    for name, kind in (("fp16", "float16"), ("bf16", "bfloat16")):
        fill.equal(f"{name}.enabled", dtype == kind, f"dtype {dtype}", absent=dtype == kind)
    optimizer = fill.out.setdefault("optimizer", {"type": "AdamW"})
    if str(optimizer.get("type")).lower() not in ("adam", "adamw"):
        raise UserError(f"{config.deepspeed}: optimizer.type is {optimizer.get('type')}; it takes AdamW")
    optimizer["type"] = "AdamW"
    betas = [config.adam_beta1, config.adam_beta2]
    fill.equal("optimizer.params.lr", config.resolved_learning_rate, "learning_rate", absent=0.0)
    fill.equal("optimizer.params.betas", betas, "adam_beta1, adam_beta2", absent=betas)
    fill.equal("optimizer.params.eps", config.adam_epsilon, "adam_epsilon", absent=config.adam_epsilon)
    fill.equal("optimizer.params.weight_decay", config.weight_decay, "weight_decay", absent=config.weight_decay)
    sizes = {"reduce_bucket_size": hidden * hidden, "stage3_param_persistence_threshold": 10 * hidden}
    for name, size in {**sizes, "stage3_prefetch_bucket_size": int(0.9 * hidden * hidden)}.items():
        if block(fill.out, "zero_optimization").get(name) == "auto":
            fill.out["zero_optimization"][name] = size
    for name in ("scheduler", "activation_checkpointing"):
        fill.out.pop(name, None)
    if stage_of(raw) < 3:
        block(fill.out, "zero_optimization").pop("offload_param", None)
    fill.out.setdefault("steps_per_print", 1 << 60)
    if left := next(autos(fill.out), ""):
        raise UserError(f'{config.deepspeed}: {left} is "auto", which says nothing here; write a number')
    return fill.out


class _Fill:
    """The file's object while it is filled."""

    def __init__(self, file: str, out: dict[str, Any]):
        self.file, self.out = file, out

    def equal(self, name: str, ours: Any, setting: str, absent: Any = None) -> None:
        """`auto` becomes `ours`; another value than ours is refused; absent: what is written where there is none."""
        place, _, last = name.rpartition(".")
        part = self.out
        for step in place.split(".") if place else ():
            if step not in part and absent is None:
                return
            part = part.setdefault(step, {})
        if last not in part:
            if absent is not None:
                part[last] = absent
        elif part[last] == "auto":
            part[last] = ours
        elif part[last] != ours:
            mend = 'write "auto", or make them equal'
            raise UserError(f"{self.file}: {name} is {part[last]}, the run's is {ours} ({setting}); {mend}")


def autos(part: Any, path: str = "") -> Any:
    """The names whose value is still `auto`."""
    if isinstance(part, dict):
        for name, value in part.items():
            yield from autos(value, f"{path}.{name}" if path else name)
    elif part == "auto":
        yield path


def notes(raw: dict[str, Any], config: TrainConfig) -> list[str]:
    """What of the file has no effect, or another one than it seems, a line each."""
    out = []

    def note(text: str) -> None:
        out.append(f"note: {config.deepspeed}: {text}")

    stage, zero = stage_of(raw), block(raw, "zero_optimization")
    if block(zero, "offload_param") and stage < 3:
        note(f"offload_param is ignored under stage {stage}: weights are split from stage 3 on")
    fp16 = block(raw, "fp16")
    if fp16.get("enabled") and fp16.get("loss_scale", 0) not in (0, "auto"):
        note(f"fp16 has a fixed loss_scale of {fp16['loss_scale']}: small gradients may be lost; 0 adapts it")
    if "scheduler" in raw:
        note(f"scheduler is ignored: lr_scheduler_type {config.lr_scheduler_type} and its warm-up decide")
    if "activation_checkpointing" in raw:
        note(f"activation_checkpointing is ignored: gradient_checkpointing {config.gradient_checkpointing} decides")
    if zero.get("stage3_gather_16bit_weights_on_model_save") is False:
        note("stage3_gather_16bit_weights_on_model_save is ignored: a checkpoint here is a whole folder")
    if "train_batch_size" in raw or "train_micro_batch_size_per_gpu" in raw:
        note(f"a step is {config.rows_per_step} rows on any number of cards; DeepSpeed's own sizes count packs")
    return out


def choose_adam(ds: dict[str, Any], on_card: bool) -> str:
    """Which AdamW is DeepSpeed's to make: its kernels are compiled at the first use, and need a compiler. Changes `ds`;
    returns a line where it is torch's own."""
    params = ds["optimizer"].setdefault("params", {})
    if params.get("torch_adam"):
        if offloads(ds):
            ds["zero_force_ds_cpu_optimizer"] = False
        return ""
    if offloads(ds) or (on_card and shutil.which("nvcc")):
        return ""
    params["torch_adam"] = True
    return "note: AdamW is torch's own: DeepSpeed's would be compiled, and there is no nvcc"


def why_no_cpu_adam() -> str:
    """ "" where DeepSpeed's CPU Adam has been built, or was just built; else why not. The first time takes a minute."""
    import contextlib
    import io

    if shutil.which("g++") is None and shutil.which("c++") is None:
        return "there is no C++ compiler"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            from deepspeed.ops.op_builder import CPUAdamBuilder

            CPUAdamBuilder().load(verbose=False)
    except Exception as error:
        text = " ".join(str(error).split())
        return text[-160:] or type(error).__name__
    return ""


def instruction_set() -> str:
    """What the CPU Adam computes with: its speed is that of these."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("flags")[2].split("\n")[0].split()
    except OSError:
        return "unknown"
    return "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else "scalar (no AVX2: slow)"


def preflight(config: TrainConfig, base: Path) -> list[str]:
    """Before the weights in `base` are read: builds the CPU Adam where the file asks for it, and compares what it will
    hold with this machine's memory. UserError where one of them can't be."""
    raw = read(config)
    params = block(raw, "optimizer", "params")
    if not offloads(raw):
        return []
    if not params.get("torch_adam") and (reason := why_no_cpu_adam()):
        mend = 'install g++ and ninja, or write "torch_adam": true into optimizer.params (slower)'
        raise UserError(f"DeepSpeed's CPU Adam can't be built here: {reason}; {mend}")
    if config.method != "full":
        return []
    import torch

    from minitune.checkpoint.weights import read_config
    from minitune.model.decoder import Decoder
    from minitune.train.stop import local_size

    with torch.device("meta"):
        parameters = sum(p.numel() for p in Decoder(read_config(base)).parameters())
    here = local_size() / int(os.environ.get("WORLD_SIZE", "1"))
    weights = stage_of(raw) == 3 and block(raw, "zero_optimization", "offload_param").get("device") == "cpu"
    each = STATE_BYTES + (WEIGHT_BYTES if weights else 0)
    need, have = parameters * each * here / 2**30, available_gib()
    what = "weights, masters, gradients" if weights else "masters, gradients"
    line = f"AdamW on the CPU ({instruction_set()}): {need:.1f} GiB of {what} and moments"
    if have is not None and need > have:
        raise UserError(f"{line}, {have:.1f} GiB are free; take --method lora, or a machine with more memory")
    return [line if have is None else f"{line}, of {have:.1f} GiB free"]


def available_gib() -> float | None:
    """Memory that can be had without swapping; None where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    return int(text.partition("MemAvailable:")[2].split()[0]) / 2**20
