"""The loop: read this first. Data -> model -> steps -> folder; LoRA and every parameter differ in what learns."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minitune.checkpoint import adapter, resume
from minitune.checkpoint.folder import copy_tokenizer, moved_into, save_hub_folder, write_text
from minitune.checkpoint.weights import choose_device
from minitune.config import TrainConfig, UserError, to_yaml
from minitune.data.loader import Loader, StepBatch
from minitune.model.decoder import Decoder
from minitune.train.checks import check_output, check_settings
from minitune.train.optim import AdamW, learning_rate_at
from minitune.train.prepare import (
    Prepared,
    build,
    count_steps,
    describe,
    make_loader,
    prepare,
    training_dtype,
)
from minitune.train.report import Interrupt, Report, Stopped, peak_memory_gib
from minitune.train.step import TrainStep, held_out_loss

# Settings that may differ between a run and its resumption: none of them changes what is computed.
FREE_ON_RESUME = {"resume", "output", "logging_steps", "save_steps", "save_total_limit", "eval_steps", "source"}


def train(config: TrainConfig, quiet: bool = False) -> dict[str, Any]:
    """Trains as `config` says and returns what summary.json holds. Raises UserError for bad input."""
    started = time.perf_counter()
    check_settings(config)
    output = Path(config.output)
    checkpoint = check_output(output, config)
    device = choose_device(config.device)
    ready = prepare(config)
    config = dataclasses.replace(
        config,
        template=ready.template.config,
        learning_rate=config.resolved_learning_rate,
        dtype=str(training_dtype(config, device)).removeprefix("torch."),  # type: ignore[arg-type]
    )
    decoder, optimizer, step = build(config, ready, device)
    loader = make_loader(config, ready.learn, device)
    total, per_epoch = count_steps(config, loader)
    report = Report(output, total, config.logging_steps, device, step.loss_scale is not None, quiet)
    run = Run(config, ready, decoder, optimizer, step, loader, report, total, per_epoch)
    try:
        if config.resume:
            run.restore(checkpoint)
        for line in [*ready.lines, *describe(config, decoder, optimizer, total, loader)]:
            report.say(line)
        run.loop()
    finally:
        report.close()
    return run.finish(started)


@dataclass
class Run:
    """The run's moving parts."""

    config: TrainConfig
    ready: Prepared
    decoder: Decoder
    optimizer: AdamW
    step: TrainStep
    loader: Loader
    report: Report
    total: int
    per_epoch: list[int]
    done: int = 0
    saved: int = 0
    tokens: int = 0

    def loop(self) -> None:
        """Every step of every epoch, from where the run stands."""
        output = Path(self.config.output)
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / "run.yaml", self.settings_text)
        before = 0
        with Interrupt() as interrupt:
            for epoch, steps in enumerate(self.per_epoch):
                for i in range(max(0, self.done - before), steps):
                    if self.done >= self.total or interrupt.wanted:
                        break
                    self.one(self.loader.batch(epoch, i), epoch + (i + 1) / steps)
                before += steps
        self.report.flush()
        if self.done < self.total:
            self.save()
            raise Stopped(f"stopped at step {self.done}; the same command with --resume goes on from there")

    def one(self, batch: StepBatch, epoch: float) -> None:
        """One step and what is due after it."""
        rate = learning_rate_at(self.done, self.total, self.config)
        result = self.step(batch, rate)
        self.done += 1
        self.tokens += batch.tokens
        self.report.step(self.done, epoch, rate, batch.tokens, result)
        end = epoch == int(epoch) or self.done == self.total
        if self.ready.held_out and (self.done % self.config.eval_steps == 0 if self.config.eval_steps else end):
            self.evaluate()
        if self.done % self.config.save_steps == 0 if self.config.save_steps else end:
            self.save()

    def evaluate(self) -> None:
        """The held-out loss now."""
        self.report.flush()
        device = self.decoder.device
        batches = list(make_loader(self.config, self.ready.held_out, device, shuffle=False).batches())
        self.report.evaluated(self.done, held_out_loss(self.decoder, batches))

    def save(self) -> None:
        """A checkpoint of this step, once; never of weights that a bad value may have reached."""
        if self.saved == self.done:
            return
        self.report.flush()
        state = {
            "step": self.done,
            "tokens": self.tokens,
            "optimizer": self.optimizer.state_dict(),
            "loss_scale": self.step.loss_scale.state_dict() if self.step.loss_scale else None,
            "settings": settings(self.config),
            "data": self.ready.fingerprint,
        }
        with resume.saved(Path(self.config.output), self.done, state, self.config.save_total_limit) as part:
            self.write(part)
            write_text(part / "run.yaml", self.settings_text)
        self.report.picture()
        self.report.pause()
        self.saved = self.done

    @property
    def base_name(self) -> str:
        """What an adapter says it belongs to: the hub's name, or the folder."""
        return str(self.ready.base.resolve()) if Path(self.config.model).exists() else self.config.model

    @property
    def settings_text(self) -> str:
        """run.yaml: the same run again, or its resumption with --resume."""
        return to_yaml(dataclasses.replace(self.config, resume=""))

    def write(self, folder: Path) -> None:
        """What was learned, as other programs open it, with its tokenizer and template."""
        if self.decoder.lora_config is not None:
            adapter.save_adapter(self.decoder, folder, self.base_name)
            copy_tokenizer(self.ready.base, folder)
        else:
            save_hub_folder(self.decoder, self.ready.base, folder)
        self.ready.template.save(folder)

    def restore(self, folder: Path | None) -> None:
        """Puts the run back where its checkpoint stood; None: at its beginning."""
        if folder is None:
            self.report.resume(0)
            self.report.say(f"{self.config.output}: no checkpoint yet; beginning at the first step")
            return
        state = resume.read_state(folder)
        for name, value in settings(self.config).items():
            if state["settings"].get(name) != value:
                raise UserError(f"{folder}: was trained with {name} {state['settings'].get(name)}, now it is {value}")
        if state["data"] != self.ready.fingerprint:
            raise UserError(f"{folder}: was trained on other rows than {self.config.data} gives now")
        resume.load_weights(folder, self.decoder)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.step.loss_scale and state["loss_scale"]:
            self.step.loss_scale.load_state_dict(state["loss_scale"])
        self.done = self.saved = state["step"]
        self.tokens = state["tokens"]
        self.step.step_index.fill_(self.done)
        self.report.resume(self.done)
        self.report.say(f"going on from {folder}")

    def finish(self, started: float) -> dict[str, Any]:
        """Writes the result and summary.json."""
        output = Path(self.config.output)
        with moved_into(output) as part:
            self.write(part)
        self.report.picture()
        losses = [r["loss"] for r in self.report.rows if r["loss"] is not None]
        tail = losses[-max(1, len(losses) // 10) :]
        seconds = time.perf_counter() - started
        summary = {
            "steps": self.done,
            "tokens": self.tokens,
            "seconds": round(seconds, 2),
            "loss": sum(tail) / len(tail) if tail else None,
            "eval_loss": self.report.evals[-1][1] if self.report.evals else None,
            "peak_memory_gib": round(peak_memory_gib(self.decoder.device), 3),
            "method": self.config.method,
            "dtype": str(self.decoder.dtype).removeprefix("torch."),
            "device": self.device_name,
        }
        write_text(output / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False))
        return summary

    @property
    def device_name(self) -> str:
        device = self.decoder.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def settings(config: TrainConfig) -> dict[str, Any]:
    """What must be equal for a resumed run to be the same run, as plain values."""
    plain = json.loads(json.dumps(dataclasses.asdict(config)))
    return {k: v for k, v in plain.items() if k not in FREE_ON_RESUME}
