"""How a run ends before its last step: a signal, no further progress, no memory; and what is said then."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minitune.checkpoint import resume
from minitune.config import TrainConfig, UserError

# what needs less memory than an optimizer; `auto` has tried them
SMALLER = {"adamw": "adamw_8bit", "adamw_8bit": "adamw_8bit_in_backward"}


class Stopped(UserError):
    """The run ended itself; what was saved stays good."""

    exit_code = 1


class Interrupt:
    """Ctrl-C, SIGTERM and a lost terminal as a wish that the loop reads between steps: an update that was broken off
    half-way could not be saved. A second one stops at once, and saves nothing; under a launcher, which passes a Ctrl-C
    on as SIGTERM, only the same signal again is a second one.

    told: called once, when the wish comes, from a signal handler: it may set what another thread shows, or write to a
    file descriptor, and no more.
    """

    SIGNALS = tuple(getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n))

    def __init__(self, told: Callable[[], None] = lambda: None) -> None:
        self.wanted = False
        self.told = told
        self._before: dict[int, Any] = {}
        self._seen: set[int] = set()

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, and `&` in a script
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _note(self, number: int, *_: object) -> None:
        if self.wanted and (number in self._seen or "WORLD_SIZE" not in os.environ):
            raise KeyboardInterrupt
        self._seen.add(number)
        if not self.wanted:
            self.wanted = True
            self.told()


@dataclass
class Best:
    """The lowest held-out loss so far, and how long ago that was.

    As in Hugging Face's EarlyStoppingCallback, any improvement is a new best, and only one by more than `threshold`
    starts the patience anew. patience: evaluations; 0 never stops.
    """

    patience: int = 0
    threshold: float = 0.0
    step: int = 0
    loss: float | None = None
    without: int = 0

    def take(self, step: int, loss: float) -> bool:
        """A held-out loss; whether it is the best."""
        better = loss == loss and (self.loss is None or loss < self.loss)  # a NaN never is
        enough = better and (self.loss is None or self.loss - loss > self.threshold)
        self.without = 0 if enough else self.without + 1
        if better:
            self.step, self.loss = step, loss
        return better

    @property
    def stop(self) -> bool:
        """Whether patience is at an end."""
        return 0 < self.patience <= self.without

    def state_dict(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k in ("step", "loss", "without")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.loss, self.without = state["step"], state["loss"], state["without"]


def go_on(config: TrainConfig, program: str) -> str:
    """The exact command that takes the run up again; with no `program`, for whoever called from Python, both ways."""
    shell = f"{program or 'minitune'} train --config {shlex.quote(os.path.join(config.output, 'run.yaml'))} --resume"
    if program:
        return f"go on with: {shell}"
    return f'go on with: minitune.train(dataclasses.replace(config, resume="auto")), or in a terminal: {shell}'


def how_to_go_on(config: TrainConfig, program: str) -> str:
    """What to do where the run could not end itself: the last checkpoint and the command."""
    last = resume.newest(Path(config.output))
    return f"{last} is good; {go_on(config, program)}" if last else "nothing was saved yet: start the run again"


def local_size() -> int:
    """The run's processes on this machine, as torchrun or DeepSpeed's launcher says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def program() -> str:
    """How this process was started, as one would start it again."""
    name = os.path.basename(sys.argv[0])
    if os.environ.get("WORLD_SIZE", "1") != "1":
        return f"torchrun --nproc-per-node {local_size()} -m minitune"
    return f"{shlex.quote(sys.executable)} -m minitune" if name == "__main__.py" else "minitune"


def out_of_memory(error: BaseException) -> str:
    """Where memory ended, in a few words; "" for another error."""
    import torch

    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in text:
        tried = text.partition("Tried to allocate ")[2].partition(". ")[0]
        return "out of memory on the card" + (f" ({tried} more were asked for)" if tried else "")
    host = ("DefaultCPUAllocator", "not enough memory", "Cannot allocate memory", "std::bad_alloc")
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(word in text for word in host)):
        return "out of memory"
    return ""


def mends(config: TrainConfig, longest: int, on_card: bool) -> tuple[list[str], list[str]]:
    """What would take less memory, with what it costs: flags that leave the run what it is, and flags that make it
    another. longest: tokens of the longest row, 0 where it is not known yet."""
    same, other = [], []
    if config.memory:
        same.append("a larger --memory")
    if config.gradient_checkpointing != "true":
        same.append("--gradient_checkpointing true (a third more time)")
    step = config.tokens_per_step or config.rows_per_step * longest
    pack = min(config.tokens_per_pack if on_card else min(config.tokens_per_pack, 1024), step)
    if pack > longest > 0 and config.optim != "adamw_8bit_in_backward":
        # A step's rows are packed; per_device_train_batch_size alone would change nothing.
        same.append(f"--tokens_per_pack {max(longest, pack // 2)} (a smaller micro-batch, accumulated)")
    if longest > 64:
        other.append(f"--max_length {longest // 2} (longer rows are cut)")
    if config.method == "full" and (smaller := SMALLER.get(config.optim)):
        other.append(f"--optim {smaller} (moments of 8 bits)")
    if config.method == "full":
        other.append("--method lora (an adapter instead of every parameter)")
    if config.method == "lora" and on_card and not config.deepspeed:
        other.append("--method qlora (the base in 4 bits)")
    if config.dtype == "float32" and on_card:
        other.append("--dtype bfloat16")
    return same, other or ["a smaller --model"]


class memory_said:  # noqa: N801 (used as a function is)
    """Makes an end of memory inside it one line with the mend; exit code 1, and what was saved stays good."""

    def __init__(self, config: TrainConfig, device: Any):
        self.config, self.on_card, self.longest = config, device.type == "cuda", 0

    def __enter__(self) -> memory_said:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        where = out_of_memory(error) if error else ""
        if not where:
            return
        if self.config.memory and self.on_card:
            where = where.replace("on the card", f"within --memory {self.config.memory}")
        same, other = mends(self.config, self.longest, self.on_card)
        last = resume.newest(Path(self.config.output))
        with_resume = f"; with --resume it goes on from {last}, which is good" if last and same else ""
        line = f"{where}: try {' and '.join(same)}{with_resume}; or, as another run, " if same else f"{where}: try "
        raise Stopped(f"{line}{', '.join(other)}") from None
