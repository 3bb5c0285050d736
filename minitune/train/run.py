"""The loop: read this first. Data -> model -> steps -> folder; LoRA and every parameter differ in what learns."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minitune.checkpoint import adapter, hub, resume
from minitune.checkpoint.folder import copy_tokenizer, moved_into, save_hub_folder, write_text
from minitune.checkpoint.tokenizer import load_tokenizer
from minitune.checkpoint.weights import choose_device, choose_dtype, load_decoder, read_config, read_json
from minitune.config import TrainConfig, UserError, to_yaml
from minitune.data import dataset
from minitune.data.loader import Loader, StepBatch
from minitune.data.template import Encoded, Template
from minitune.model.attention import choose_kernel
from minitune.model.decoder import Decoder
from minitune.model.lora import LoraConfig, attach
from minitune.train.checks import check_output, check_settings
from minitune.train.optim import AdamW, LossScale, learning_rate_at
from minitune.train.report import Interrupt, Report, Stopped, peak_memory_gib
from minitune.train.step import TrainStep, held_out_loss, recompute_layers

# Settings that may differ between a run and its resumption: none of them changes what is computed.
FREE_ON_RESUME = {"resume", "output", "logging_steps", "save_steps", "save_total_limit", "eval_steps", "source"}


@dataclass
class Prepared:
    """What a run needs of its input, read and checked before anything is written."""

    base: Path
    tokenizer: Any
    template: Template
    learn: list[Encoded]
    held_out: list[Encoded]
    lines: list[str]

    @property
    def fingerprint(self) -> str:
        """Names the rows' ids and labels: a resumed run must see the same."""
        digest = hashlib.sha256()
        for row in self.learn:
            digest.update(repr((row.input_ids, row.labels)).encode())
        return digest.hexdigest()


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


def prepare(config: TrainConfig) -> Prepared:
    """Reads the model's folder and the data."""
    base = hub.resolve(config.model, source=config.source)
    read_config(base)  # an architecture that is not supported is said first
    tokenizer = load_tokenizer(base)
    template = Template.choose(tokenizer, config.template, read_json(base / "config.json"))
    data = dataset.load(config.data, template, config.max_length, config.overlong)
    lines = data.summary(config.max_length)
    learn, held_out = data.rows, []
    if config.eval_data:
        other = dataset.load(config.eval_data, template, config.max_length, config.overlong)
        held_out = other.rows
        lines += other.summary(config.max_length)
    elif config.eval_fraction:
        learn, held_out = dataset.split(data, config.eval_fraction, config.seed)
        lines.append(f"held out: {len(held_out):,} of {len(data.rows):,} rows")
    return Prepared(base, tokenizer, template, learn, held_out, lines)


def training_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 where the hardware multiplies it; float32 on other CPUs, and for every parameter on any."""
    if config.dtype == "auto" and device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast and config.method != "full" else torch.float32
    return choose_dtype(config.dtype, device)


def build(config: TrainConfig, ready: Prepared, device: torch.device) -> tuple[Decoder, AdamW, TrainStep]:
    """The decoder with what learns, its optimizer, and the step."""
    decoder = load_decoder(ready.base, config.dtype, str(device)).train()
    highest = max(max(r.input_ids) for r in [*ready.learn, *ready.held_out])
    if highest >= decoder.config.vocab_size:
        raise UserError(
            f"{ready.base}: the tokenizer gives id {highest}, the weights have {decoder.config.vocab_size} rows"
        )
    if config.method == "full":
        parameters = list(decoder.requires_grad_(True).parameters())
    else:
        try:
            lora = LoraConfig(
                config.lora_r, config.lora_alpha, config.lora_dropout, config.lora_target_modules, config.use_rslora
            )
            parameters = attach(decoder, lora, config.seed)
        except ValueError as error:
            raise UserError(str(error)) from None
    if wants_recompute(config, decoder, ready.learn):
        recompute_layers(decoder)
    optimizer = AdamW(parameters, config)
    step = TrainStep(
        decoder,
        optimizer,
        dropout=config.lora_dropout if config.method == "lora" else 0.0,
        seed=config.seed,
        max_grad_norm=config.max_grad_norm,
        loss_scale=LossScale(device) if decoder.dtype == torch.float16 else None,
    )
    return decoder, optimizer, step


def wants_recompute(config: TrainConfig, decoder: Decoder, rows: list[Encoded]) -> bool:
    """`auto`: where a pack's activations, roughly 10 hidden and 4 FFN widths a token and layer, would not fit half of
    the card's free memory."""
    if config.gradient_checkpointing != "auto" or decoder.device.type != "cuda":
        return config.gradient_checkpointing == "true"
    shape = decoder.config
    longest = max(len(row.input_ids) for row in rows)
    step = config.tokens_per_step or config.rows_per_step * longest
    tokens = max(longest, min(config.tokens_per_pack, step))
    width = 10 * shape.hidden_size + 4 * shape.intermediate_size
    bytes_ = tokens * shape.num_hidden_layers * width * decoder.dtype.itemsize
    return bytes_ > torch.cuda.mem_get_info(decoder.device)[0] / 2


def make_loader(config: TrainConfig, rows: list[Encoded], device: torch.device, shuffle: bool = True) -> Loader:
    # Small packs keep the CPU's caches and memory; a card wants long ones.
    pack = config.tokens_per_pack if device.type != "cpu" else min(config.tokens_per_pack, 512)
    return Loader(
        rows,
        rows_per_step=config.rows_per_step,
        tokens_per_step=config.tokens_per_step,
        tokens_per_pack=pack,
        seed=config.seed,
        shuffle=shuffle,
        pin=device.type == "cuda",
    )


def count_steps(config: TrainConfig, loader: Loader) -> tuple[int, list[int]]:
    """(steps of the run, steps of each epoch)."""
    per_epoch: list[int] = []
    if config.max_steps > 0:
        while sum(per_epoch) < config.max_steps:
            per_epoch.append(len(loader.steps(len(per_epoch))))
        return config.max_steps, per_epoch
    whole, part = int(config.num_train_epochs), config.num_train_epochs % 1
    per_epoch = [len(loader.steps(e)) for e in range(whole + (part > 0))]
    last = math.ceil(per_epoch[-1] * part) if part else per_epoch[-1]
    return sum(per_epoch[:-1]) + last, per_epoch


def describe(config: TrainConfig, decoder: Decoder, optimizer: AdamW, total: int, loader: Loader) -> list[str]:
    """What is going to happen, a line each."""
    learn = sum(p.numel() for p in optimizer.parameters)
    every = sum(p.numel() for p in decoder.parameters()) - (learn if config.method == "lora" else 0)
    kernel = choose_kernel(decoder.device, decoder.dtype, decoder.config.head_dim, max(loader.lengths))
    size = f"{config.tokens_per_step} tokens" if config.tokens_per_step else f"{config.rows_per_step} rows"
    kind = str(decoder.dtype).removeprefix("torch.")
    lines = [
        f"{config.method}: {learn:,} of {every:,} parameters learn; {total} steps of {size}; "
        f"learning rate {config.resolved_learning_rate:g}; {kind} on {decoder.device}; {kernel} attention"
    ]
    if config.method == "lora" and decoder.config.family == "MiniCPMForCausalLM":
        lines.append(
            "note: stock transformers 5 can't open a MiniCPM base; `minitune export --format hf` writes one it opens"
        )
    return lines


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
