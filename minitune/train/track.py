"""The run's numbers for TensorBoard, Weights & Biases and SwanLab. Offline: files in the run's folder, nothing sent.

A tracker that fails is said once and left out; the run goes on.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Any, Protocol

from minitune.config import TrainConfig, UserError, to_yaml
from minitune.train.watch import Sample

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "swanlab": "swanlab"}
# Names as Hugging Face's Trainer gives them, so that curves of both lie in one chart.
NAMES = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "epoch": "train/epoch",
    "tokens_per_second": "train/tokens_per_second",
    "memory_gib": "train/memory_gib",
    "eval_loss": "eval/loss",
}


def check_trackers(names: Sequence[str]) -> None:
    """UserError for a name that is none, and for a package that is not installed."""
    for name in names:
        if name not in PACKAGES:
            raise UserError(f"track is {name!r}; it takes {', '.join(PACKAGES)}, or several with commas between")
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise UserError(f"--track {name}: the package is not installed; pip install 'minitune[track]'")


class Tracker(Protocol):
    """One program's files."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...
    def answers(self, step: int, samples: Sequence[Sample]) -> None: ...
    def close(self) -> str:
        """Writes what is left; returns what a person may do with it."""


class TensorBoard:
    def __init__(self, config: TrainConfig, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.folder = Path(config.output) / "tensorboard"
        # Rows behind the resumed step belong to a run that was cut off there.
        self.writer = SummaryWriter(str(self.folder), purge_step=step + 1 if step else None)
        self.writer.add_text("settings", f"```\n{to_yaml(config)}```", step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def answers(self, step: int, samples: Sequence[Sample]) -> None:
        for i, sample in enumerate(samples, 1):
            self.writer.add_text(f"watch/{i}", f"**{sample.prompt}**\n\n{sample.answer}", step)
        self.writer.flush()

    def close(self) -> str:
        self.writer.close()
        return f"tensorboard --logdir {quote(str(self.folder))}"


class Wandb:
    def __init__(self, config: TrainConfig, step: int):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its crash reports would go over the network
        import wandb

        self.wandb, folder = wandb, Path(config.output)
        mark = folder / "wandb" / "id"  # a resumed run is the same run there
        mark.parent.mkdir(parents=True, exist_ok=True)
        if not (step and mark.is_file()):
            mark.write_text(os.urandom(4).hex(), encoding="utf-8")
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "minitune"),
            name=folder.resolve().name,
            id=mark.read_text(encoding="utf-8"),
            dir=str(folder),
            mode="offline",
            config=json.loads(json.dumps(_plain(config))),
            settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
        )
        self.run.define_metric("*", step_metric="train/global_step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({"train/global_step": step, **values})

    def answers(self, step: int, samples: Sequence[Sample]) -> None:
        table = self.wandb.Table(["prompt", "answer"], [[s.prompt, s.answer] for s in samples])
        self.run.log({"train/global_step": step, "watch": table})

    def close(self) -> str:
        folder = Path(self.run.dir).parent
        self.run.finish()
        return f"wandb sync {quote(str(folder))}"


class SwanLab:
    def __init__(self, config: TrainConfig, step: int):
        import swanlab

        self.swanlab, folder = swanlab, Path(config.output) / "swanlab"
        folder.mkdir(parents=True, exist_ok=True)
        probe = {"conda": False, "git": False, "requirements": False}
        self.run = swanlab.init(
            project="minitune",
            name=Path(config.output).resolve().name + (f" from step {step}" if step else ""),
            log_dir=str(folder),
            mode="offline",
            config=_plain(config),
            settings=swanlab.Settings(interactive=False, terminal={"proxy_type": "none"}, probe=probe),
        )
        self.folder = next(iter(sorted(folder.glob("run-*"), key=os.path.getmtime, reverse=True)), folder)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def answers(self, step: int, samples: Sequence[Sample]) -> None:
        texts = [self.swanlab.Text(s.answer, caption=s.prompt[:60]) for s in samples]
        self.run.log({"watch": texts}, step=step)

    def close(self) -> str:
        self.run.finish()
        return f"swanlab sync {quote(str(self.folder))}"


KINDS: dict[str, Callable[[TrainConfig, int], Tracker]] = {
    "tensorboard": TensorBoard, "wandb": Wandb, "swanlab": SwanLab,
}  # fmt: skip


class Trackers:
    """All trackers of a run. say: takes a line for the person."""

    def __init__(self, config: TrainConfig, step: int, say: Callable[[str], None]):
        self.say, self.open = say, dict[str, Tracker]()
        for name in dict.fromkeys(config.track):
            with self._kept(name):
                self.open[name] = KINDS[name](config, step)

    def row(self, row: Mapping[str, Any]) -> None:
        """A row of the log; what is not finite has no place in a curve."""
        values = {ours: row[key] for key, ours in NAMES.items() if row.get(key) is not None}
        for name in list(self.open):
            with self._kept(name):
                self.open[name].log(row["step"], values)

    def answers(self, step: int, samples: Sequence[Sample]) -> None:
        for name in list(self.open):
            with self._kept(name):
                self.open[name].answers(step, samples)

    def close(self) -> None:
        for name in list(self.open):
            with self._kept(name):
                self.say(f"{name}: {self.open[name].close()}")
        self.open.clear()

    @contextmanager
    def _kept(self, name: str) -> Iterator[None]:
        """Nothing that a tracker does reaches the run: neither what it raises or prints, nor whom signals wake."""
        try:
            with signals_kept(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                yield
        except Exception as error:
            self.open.pop(name, None)
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
            self.say(f"note: {name} failed ({reason}); the run goes on without it")


@contextmanager
def signals_kept() -> Iterator[None]:
    """SwanLab takes Ctrl-C and ends its run, where ours still logs a step and saves: signals stay whose they were."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    from minitune.train.stop import Interrupt  # settings are checked, by this file too, before torch is imported

    before = {number: signal.getsignal(number) for number in Interrupt.SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)


def _plain(config: TrainConfig) -> dict[str, Any]:
    """The settings as JSON has them."""
    import dataclasses

    return json.loads(json.dumps(dataclasses.asdict(config)))
