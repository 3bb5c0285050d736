"""What a run is made of, read and checked before its first step: data, decoder, optimizer, steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from minitune.checkpoint import hub
from minitune.checkpoint.embedded import rows_cache
from minitune.checkpoint.tokenizer import load_tokenizer
from minitune.checkpoint.weights import choose_dtype, read_config, read_json
from minitune.config import TrainConfig, UserError, files_of
from minitune.data import dataset, progress
from minitune.data.loader import Loader
from minitune.data.store import EncodedRows
from minitune.data.template import Template
from minitune.model.attention import choose_kernel
from minitune.model.decoder import Decoder
from minitune.model.fused import FusedStack
from minitune.model.lora import LoraConfig, attach
from minitune.model.quantized import PER_WORD, is_packed, packed_linears
from minitune.train import ahead, fast, full, plan
from minitune.train.full_step import FullStep
from minitune.train.memory import Choice
from minitune.train.optim import AdamW, LossScale
from minitune.train.optim8 import AdamW8
from minitune.train.parallel import ALONE, Team
from minitune.train.replicas import Replicas
from minitune.train.sharded import Sharded
from minitune.train.step import Sharing, TrainStep, recompute_layers


@dataclass
class Prepared:
    """What a run needs of its input, read and checked before anything is written."""

    base: Path
    tokenizer: Any
    template: Template
    learn: EncodedRows
    held_out: EncodedRows
    lines: list[str]
    fraction: float = 0.0  # of the rows that are held out, however that was asked for

    @cached_property
    def fingerprint(self) -> str:
        """Names the rows' ids and labels: a resumed run must see the same."""
        return self.learn.digest()


def prepare(config: TrainConfig, found: Callable[[Path], object] = read_config, base: Path | None = None) -> Prepared:
    """Reads the model's folder and the data. found: called with the folder before anything slow is read. base: the
    folder, where it needs no weights."""
    base = base or hub.resolve(config.model, source=config.source)
    found(base)  # a model that can't be used is said first
    ahead.imported()
    tokenizer = load_tokenizer(base)
    template = Template.choose(tokenizer, config.template, read_json(base / "config.json"))

    def load(paths: str) -> dataset.Dataset:
        length, most = config.max_length, config.max_samples
        kept, watch = rows_cache(), progress.watch
        return dataset.together(
            [
                dataset.load(path, template, length, config.overlong, most=most, kept=kept, watch=watch)
                for path in files_of(paths)
            ],
            length,
        )

    data = load(config.data)
    lines = data.summary(config.max_length)
    learn, held_out = data.rows, data.rows[:0]
    fraction = config.eval_fraction or config.eval_rows / len(data.rows)
    if config.eval_data:
        other = load(config.eval_data)
        held_out = other.rows
        lines += other.summary(config.max_length)
    elif fraction:
        if fraction >= 1:
            raise UserError(f"{data.file}: {len(data.rows)} rows are too few to hold out {config.eval_rows}")
        learn, held_out = dataset.split(data, fraction, config.seed)
        lines.append(f"held out: {len(held_out):,} of {len(data.rows):,} rows")
    return Prepared(base, tokenizer, template, learn, held_out, lines, fraction)


def resolved(config: TrainConfig, ready: Prepared, device: torch.device) -> TrainConfig:
    """The settings with what was left to the data and the machine: what run.yaml says."""
    return dataclasses.replace(
        config,
        template=ready.template.config,
        learning_rate=config.resolved_learning_rate,
        eval_fraction=ready.fraction,
        eval_rows=0,
        dtype=str(training_dtype(config, device)).removeprefix("torch."),  # type: ignore[arg-type]
    )


def training_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 where the hardware multiplies it; float32 on other CPUs, and for every parameter on any."""
    if config.dtype == "auto" and device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast and config.method != "full" else torch.float32
    return choose_dtype(config.dtype, device)


def build(
    config: TrainConfig, ready: Prepared, decoder: Decoder, team: Team = ALONE, choice: Choice | None = None
) -> tuple[Decoder, AdamW | AdamW8, TrainStep]:
    """The decoder of the base weights with what learns, its optimizer, and the step."""
    decoder.train()
    highest = max(ready.learn.highest, ready.held_out.highest)
    if highest >= decoder.config.vocab_size:
        raise UserError(
            f"{ready.base}: the tokenizer gives id {highest}, the weights have {decoder.config.vocab_size} rows"
        )
    return (decoder, *equip(config, decoder, ready.learn, team, choice))


def equip(
    config: TrainConfig, decoder: Decoder, rows: EncodedRows, team: Team = ALONE, choice: Choice | None = None
) -> tuple[AdamW | AdamW8, TrainStep]:
    """What the decoder learns with: adapters where they are asked for, layers by hand where they serve, optimizer and
    step. choice: what was planned; None: it is planned now."""
    choice = choice or plan.choose(config, decoder, rows, team.size == 1 and not config.deepspeed)
    optimizer, step = _equip(config, decoder, team, choice)
    step.chunk = choice.chunk or step.chunk
    return optimizer, step


def _equip(config: TrainConfig, decoder: Decoder, team: Team, choice: Choice) -> tuple[AdamW | AdamW8, TrainStep]:
    every, alone = config.method == "full", team.size == 1 and not config.deepspeed
    recompute = choice.whole < len(decoder.layers) or config.gradient_checkpointing == "true"
    fast.settle_memory(sparing=recompute)
    if every and alone:
        return full.equip(dataclasses.replace(config, optim=choice.optim), decoder, choice.whole)  # type: ignore[arg-type]
    try:
        parameters = attach(decoder, lora_of(config), config.seed) if not every else []
    except ValueError as error:
        raise UserError(str(error)) from None
    if every:
        decoder.requires_grad_(True)
    matrices: list[torch.Size] = []
    if not every and not config.deepspeed and not fast.why_plain(decoder):
        matrices = [p.shape for p in parameters]
        decoder.stack = FusedStack(decoder, keep=not recompute)
        parameters = [decoder.stack.flat]
    elif recompute:
        recompute_layers(decoder)
    if config.deepspeed:
        return by_deepspeed(config, decoder, team)
    sharing = share(config, decoder, team)
    if isinstance(sharing, Sharded):
        parameters = sharing.parameters
    optimizer = AdamW(parameters, config, matrices)
    step = TrainStep(
        decoder,
        optimizer,
        dropout=0.0 if every else config.lora_dropout,
        seed=config.seed,
        max_grad_norm=config.max_grad_norm,
        loss_scale=LossScale(decoder.device) if decoder.dtype == torch.float16 else None,
        sharing=sharing,
    )
    return optimizer, step


def by_deepspeed(config: TrainConfig, decoder: Decoder, team: Team) -> tuple[AdamW, TrainStep]:
    """The same with DeepSpeed's engine."""
    from minitune.train.zero import Zero, ZeroOptimizer, ZeroStep

    zero = Zero(team, decoder, config)
    optimizer = ZeroOptimizer(zero)
    return optimizer, ZeroStep(zero, optimizer, 0.0 if config.method == "full" else config.lora_dropout, config.seed)


def share(config: TrainConfig, decoder: Decoder, team: Team) -> Sharing | None:
    """How several processes make a step: adapters are small, so each has them whole; all parameters are sharded."""
    if team.size == 1:
        return None
    return Sharded(team, decoder) if config.method == "full" else Replicas(team)


def lora_of(config: TrainConfig) -> LoraConfig:
    """The adapters that the settings ask for."""
    try:
        return LoraConfig(
            config.lora_r, config.lora_alpha, config.lora_dropout, config.lora_target_modules, config.use_rslora
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def describe(config: TrainConfig, decoder: Decoder, step: TrainStep, total: int, loader: Loader) -> list[str]:
    """What is going to happen, a line each."""
    every = sum(getattr(p, "ds_numel", p.numel()) for p in decoder.parameters())  # of DeepSpeed's slices too
    learn = every
    if config.method != "full":
        learn = sum(getattr(p, "ds_numel", p.numel()) for p in step.optimizer.parameters)
        every += sum(n.weight_packed.numel() * PER_WORD for n in packed_linears(decoder)) - learn
    kernel = choose_kernel(decoder.device, decoder.dtype, decoder.config.head_dim, loader.rows.longest)
    size = f"{config.tokens_per_step} tokens" if config.tokens_per_step else f"{config.rows_per_step} rows"
    kind = str(decoder.dtype).removeprefix("torch.")
    lines = [
        f"{config.method}: {learn:,} of {every:,} parameters learn; {total} steps of {size}; "
        f"learning rate {config.resolved_learning_rate:g}; {kind} on {decoder.device}; {kernel} attention"
    ]
    if loader.ranks > 1 and not config.deepspeed:
        how, step_kind = "adapters' gradients added up", ""
        if config.method == "full":
            how, step_kind = "every parameter sharded (FSDP2)", "; plain steps, not captured"
        lines.append(f"{loader.ranks} processes, {how}; a step's rows are dealt to them{step_kind}")
    if isinstance(step, FullStep):
        lines.append(full.said(config, step))
    if is_packed(decoder) and not step.by_hand:
        lines.append("4-bit weights in plain layers: each is formed anew wherever it is used, which is slow")
    if config.method != "full" and decoder.config.family == "MiniCPMForCausalLM":
        lines.append(
            "note: stock transformers 5 can't open a MiniCPM base; `minitune export --format hf` writes one it opens"
        )
    return lines
