"""The loop: read this first. Data -> model -> steps -> folder; LoRA and every parameter differ in what learns."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import deque
from contextlib import closing, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from minitune.checkpoint import adapter, resume
from minitune.checkpoint.folder import copy_tokenizer, moved_into, save_hub_folder, write_text
from minitune.config import TrainConfig, UserError, to_yaml
from minitune.data.loader import Loader, StepBatch
from minitune.model.decoder import Decoder
from minitune.train import fast, full, parallel, zero_config
from minitune.train.ahead import Loading
from minitune.train.checks import check_output, check_settings
from minitune.train.clock import Clock, process_seconds
from minitune.train.foresee import Foretold, foresee
from minitune.train.graph import CapturedStep
from minitune.train.optim import AdamW, learning_rate_at
from minitune.train.optim8 import AdamW8
from minitune.train.parallel import ALONE, Team
from minitune.train.prepare import Prepared, build, describe, prepare, resolved
from minitune.train.report import Report, Silent
from minitune.train.sharded import Alone, Sharded, sharded_of
from minitune.train.state import check_same, identity
from minitune.train.step import TrainStep, held_out_loss
from minitune.train.steps import count_steps, make_loader
from minitune.train.stop import Best, Interrupt, Stopped, go_on, how_to_go_on, memory_said
from minitune.train.track import Trackers
from minitune.train.view import About, choose
from minitune.train.watch import Answer, Watch

if TYPE_CHECKING:
    from minitune.train.zero import Zero


def train(config: TrainConfig, quiet: bool = False, answer: Answer | None = None, program: str = "") -> dict[str, Any]:
    """Trains as `config` says and returns what summary.json holds.

    answer: how sample prompts are answered, where config.watch names some. program: the command that a stopped run is
    taken up with, where there is one. Raises UserError for bad input; Stopped where the run ended before its time.
    """
    started = time.perf_counter()
    clock = Clock("data")
    clock.seconds["start"] = process_seconds()
    output = Path(config.output)
    with parallel.join(config, lambda: how_to_go_on(config, program)) as team:
        with team.together():
            check_settings(config)
            checkpoint = check_output(output, config)
            fast.settle_memory()
            device = team.device(config.device)
        with memory_said(config, device) as memory, Loading(config, device) as loading:
            with team.together():
                ready = prepare(config, loading.begin)
                lines = zero_config.preflight(config, ready.base) if config.deepspeed else []
            if team.size > 1:
                team.same("the rows of data", (ready.fingerprint, ready.held_out.digest()))
                team.same("the newest checkpoint", checkpoint and checkpoint.name)
            memory.longest = ready.learn.longest
            config, planned, said = foresee(resolved(config, ready, device), ready, device, loading.shape, team)
            memory.config, lines = config, [*said, *lines]
            clock.begin("model")
            loaded = loading.result()
            decoder, optimizer, step = build(config, ready, loaded, team, planned.choice if planned else None)
            watch = Watch(config, ready.template, ready.tokenizer, decoder.config.max_position_embeddings, answer)
            loader = make_loader(config, ready.learn, device, team=team)
            total, per_epoch = count_steps(config, loader)
            full.check_packs(config, loader, per_epoch, total)
            title = f"{config.model} · {config.method} → {config.output}"
            about = About(total, config.num_train_epochs, title, bool(len(ready.held_out)), watch.prompts)
            kind, view = (Report, choose(about, quiet)) if team.first else (Silent, choose(about, True))
            report = kind(output, total, config.logging_steps, device, view, step.loss_scale is not None)
            team.watched(report.view.close, lambda: clock.name)
            run = Run(config, ready, decoder, optimizer, step, loader, report, watch, total, per_epoch, clock, program)
            run.team, run.sharded, run.foretold = team, sharded_of(step), Foretold(total, planned, loader)
            try:
                if config.resume:
                    run.restore(checkpoint)
                lines = [*ready.lines, *lines, *getattr(run.sharded, "lines", ())]
                for line in [*lines, *describe(config, decoder, step, total, loader)]:
                    report.say(line)
                if device.type == "cuda" and run.done < total and not run.sharded:
                    clock.begin("capture")
                    loading.compiled()
                    run.step, line = fast.quicken(step, loader, per_epoch, total)
                    report.say(line)
                clock.begin("steps")
                with Interrupt(report.view.stopping) as interrupt:
                    run.loop(interrupt)
                    with clock.during("saving"):
                        summary = run.finish(started)
                if config.profile:
                    report.say(clock.line())
                return team.all_of(summary)[0]
            finally:
                report.close()


@dataclass
class Run:
    """The run's moving parts."""

    config: TrainConfig
    ready: Prepared
    decoder: Decoder
    optimizer: AdamW | AdamW8
    step: TrainStep | CapturedStep
    loader: Loader
    report: Report
    watch: Watch
    total: int
    per_epoch: list[int]
    clock: Clock
    program: str = ""
    done: int = 0
    saved: int = 0
    tokens: int = 0
    team: Team = ALONE
    sharded: Sharded | Zero | None = None  # where no process holds all of what learns
    foretold: Foretold | None = None

    def __post_init__(self) -> None:
        self.best = Best(self.config.early_stopping_patience, self.config.early_stopping_threshold)

    def loop(self, interrupt: Interrupt) -> None:
        """Every step of every epoch, from where the run stands."""
        trackers = None
        if self.team.first:
            output = Path(self.config.output)
            output.mkdir(parents=True, exist_ok=True)
            write_text(output / "run.yaml", self.settings_text)
            trackers = Trackers(self.config, self.done, self.report.say)
        self.report.start(self.done, self.best.step, trackers)
        if self.done == 0:
            self.answer(0.0)
        every = ((epoch, i) for epoch, steps in enumerate(self.per_epoch) for i in range(steps))
        places = islice(every, self.done, self.total)
        with closing(fast.batches(self.loader.batch, places, self.decoder.device.type == "cuda")) as batches:
            for (epoch, i), batch in batches:
                if self.best.stop or self.team.any(interrupt.wanted):
                    break
                self.one(batch, epoch + (i + 1) / self.per_epoch[epoch])
        self.report.flush()
        if self.done < self.total and not self.best.stop:
            self.save()
            how = go_on(self.config, self.program)
            raise self.team.for_all(Stopped(f"stopped at step {self.done}; {how}"))

    def one(self, batch: StepBatch, epoch: float) -> None:
        """One step and what is due after it. A checkpoint comes last: a resumed run repeats nothing of its step."""
        rate = learning_rate_at(self.done, self.total, self.config)
        result = self.step(batch, rate)
        self.done += 1
        self.tokens += batch.tokens
        self.report.step(self.done, epoch, rate, batch.tokens, result)
        if self.foretold and (line := self.foretold.line(self.done, self.report.timed)):
            self.report.say(line)
        end, better = epoch == int(epoch), False
        if len(self.ready.held_out) and self.due(self.config.eval_steps, end):
            better = self.evaluate()
        end = end or self.best.stop
        if self.due(self.config.watch_steps, end) or self.best.stop:
            self.answer(epoch)
        end = end or self.done == self.total
        if self.done == self.total:
            self.report.picture_begins()
        if (self.done % self.config.save_steps == 0 if self.config.save_steps else end) or (
            better and self.config.load_best_model_at_end
        ):
            self.save()

    def due(self, every: int, end_of_epoch: bool) -> bool:
        """Whether something is due now that happens every so many steps (0: each epoch), and at the run's end."""
        return self.done == self.total or (self.done % every == 0 if every else end_of_epoch)

    def evaluate(self) -> bool:
        """The held-out loss now; whether it is the best."""
        self.report.flush()
        self.report.view.busy("held-out loss …")
        device = self.decoder.device
        with self.clock.during("held-out loss"):
            loader = make_loader(self.config, self.ready.held_out, device, shuffle=False, team=self.team)
            loss = held_out_loss(
                self.decoder, list(loader.batches()), self.team.sum, getattr(self.sharded, "loss", None)
            )
        better = self.best.take(self.done, loss)
        self.report.evaluated(self.done, loss, better)
        return better

    def answer(self, epoch: float) -> None:
        """The sample prompts, answered by the weights of now. What goes wrong there is no fault of the run."""
        if not self.watch.prompts or not self.team.first:
            return
        self.report.flush()
        self.report.view.busy("answering the prompts …")
        try:
            with self.clock.during("answers"):
                samples = self.watch.take(self.decoder)
        except (UserError, torch.OutOfMemoryError) as error:
            self.report.say(f"note: step {self.done}: no answers ({str(error).splitlines()[0][:160]})")
        else:
            self.report.watched(self.done, epoch, samples)
        self.report.pause()

    def save(self) -> None:
        """A checkpoint of this step, once; never of weights that a bad value may have reached."""
        if self.saved == self.done:
            return
        self.saved = self.done
        if not self.team.first:
            self.help_saving(checkpoint=True)
            return
        self.report.flush()
        self.report.view.busy(f"saving checkpoint-{self.done} …")
        state = {
            "step": self.done,
            "tokens": self.tokens,
            "optimizer": None if self.sharded else self.optimizer.state_dict(),
            "loss_scale": self.step.loss_scale.state_dict() if self.step.loss_scale else None,
            "best": self.best.state_dict(),
            **identity(self.config, self.ready),
        }
        keep, limit = self.best.step if self.config.load_best_model_at_end else 0, self.config.save_total_limit
        with self.clock.during("saving"), resume.saved(Path(self.config.output), self.done, state, limit, keep) as part:
            if self.sharded:
                self.team.all_of(str(part))
                self.sharded.save(part, self.optimizer)
            self.write(part)
            write_text(part / "run.yaml", self.settings_text)
        self.report.pause()

    def help_saving(self, checkpoint: bool) -> None:
        """What a process that does not speak does meanwhile: it writes its moments into the checkpoint that the first
        one makes, and hands out its slices of the weights."""
        if self.sharded and checkpoint:
            self.sharded.save(Path(self.team.all_of("")[0]), self.optimizer)
        if self.sharded:
            self.write(None)

    @property
    def base_name(self) -> str:
        """What an adapter says it belongs to: the hub's name, or the folder."""
        return str(self.ready.base.resolve()) if Path(self.config.model).exists() else self.config.model

    @property
    def settings_text(self) -> str:
        """run.yaml: the same run again, or its resumption with --resume."""
        return to_yaml(dataclasses.replace(self.config, resume=""))

    def write(self, folder: Path | None) -> None:
        """What was learned, as other programs open it, with its tokenizer and template. None: another process writes,
        and this one gives its part."""
        whole = self.sharded.tensors() if self.sharded else None
        if self.decoder.lora_config is not None:
            with self.sharded.gathered() if self.sharded else nullcontext():
                if folder is not None:
                    adapter.save_adapter(self.decoder, folder, self.base_name)
                    copy_tokenizer(self.ready.base, folder)
        elif folder is not None:
            save_hub_folder(self.decoder, self.ready.base, folder, whole)
        else:
            deque(whole or (), maxlen=0)
        if folder is not None:
            self.ready.template.save(folder)

    def restore(self, folder: Path | None) -> None:
        """Puts the run back where its checkpoint stood; None: at its beginning."""
        if folder is None:
            self.report.resume(0)
            self.report.say(f"{self.config.output}: no checkpoint yet; beginning at the first step")
            return
        state = resume.read_state(folder)
        notes = check_same(folder, state, self.config, self.ready)
        self.load_weights(folder)
        (self.sharded or Alone(self.decoder)).load(folder, state["optimizer"], self.optimizer)
        if self.step.loss_scale and state["loss_scale"]:
            self.step.loss_scale.load_state_dict(state["loss_scale"])
        if "best" in state:
            self.best.load_state_dict(state["best"])
        self.done = self.saved = state["step"]
        self.tokens = state["tokens"]
        self.step.step_index.fill_(self.done)
        self.report.resume(self.done)
        for line in [f"going on from {folder}", *notes]:
            self.report.say(line)

    def load_weights(self, folder: Path) -> None:
        """What was learned, from a checkpoint."""
        if self.sharded:
            self.sharded.load_weights(folder)
        else:
            resume.load_weights(folder, self.decoder)

    def finish(self, started: float) -> dict[str, Any]:
        """Writes the result and summary.json."""
        output = Path(self.config.output)
        self.report.view.busy("writing the result …")
        self.report.picture_begins()
        held, step = self.report.evals[-1][1] if self.report.evals else None, self.done
        if self.config.load_best_model_at_end and self.best.step not in (0, self.done):
            best = output / f"checkpoint-{self.best.step}"
            if (best / resume.STATE).is_file():
                self.load_weights(best)
                held, step = self.best.loss, self.best.step
            else:
                self.report.say(f"note: {best} is gone; {output} holds the weights of step {self.done} instead")
        if not self.team.first:
            self.help_saving(checkpoint=False)
            return {}
        with moved_into(output) as part:
            if self.sharded or not resume.linked(output / f"checkpoint-{step}", part):
                self.write(part)
        if isinstance(self.step, CapturedStep) and (plain := self.step.plain_steps):
            self.report.say(f"note: {plain} steps ran plain: no captured capacity held them")
        self.report.picture()
        summary = {
            "steps": self.done,
            "tokens": self.tokens,
            "seconds": round(time.perf_counter() - started, 2),
            "eval_loss": held,
            "best_step": self.best.step or None,
            "best_eval_loss": self.best.loss,
            "stopped_early": self.best.stop and self.done < self.total,
            "method": self.config.method,
            "dtype": str(self.decoder.dtype).removeprefix("torch."),
            **self.report.summary(),
            **(self.foretold.summary(self.report.timed) if self.foretold else {}),
        }
        write_text(output / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False))
        return summary
