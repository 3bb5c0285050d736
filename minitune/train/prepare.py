"""What a run is made of, read and checked before its first step: data, decoder, optimizer, steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minitune.checkpoint import hub
from minitune.checkpoint.embedded import rows_cache
from minitune.checkpoint.tokenizer import load_tokenizer
from minitune.checkpoint.weights import choose_dtype, read_config, read_json
from minitune.config import TrainConfig, UserError, files_of
from minitune.data import dataset, progress
from minitune.data.loader import Loader
from minitune.data.store import EncodedRows
from minitune.data.template import Encoded, Template
from minitune.model.attention import choose_kernel
from minitune.model.decoder import Decoder
from minitune.model.fused import FusedStack
from minitune.model.lora import LoraConfig, attach
from minitune.train import ahead, fast, full, memory
from minitune.train.full_step import FullStep
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


def prepare(config: TrainConfig, found: Callable[[Path], object] = read_config) -> Prepared:
    """Reads the model's folder and the data. found: called with the folder before anything slow is read."""
    base = hub.resolve(config.model, source=config.source)
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
    config: TrainConfig, ready: Prepared, decoder: Decoder, team: Team = ALONE
) -> tuple[Decoder, AdamW | AdamW8, TrainStep]:
    """The decoder of the base weights with what learns, its optimizer, and the step."""
    decoder.train()
    highest = max(ready.learn.highest, ready.held_out.highest)
    if highest >= decoder.config.vocab_size:
        raise UserError(
            f"{ready.base}: the tokenizer gives id {highest}, the weights have {decoder.config.vocab_size} rows"
        )
    return (decoder, *equip(config, decoder, ready.learn, team))


def equip(
    config: TrainConfig, decoder: Decoder, rows: EncodedRows, team: Team = ALONE
) -> tuple[AdamW | AdamW8, TrainStep]:
    """What the decoder learns with: adapters where they are asked for, layers by hand where they serve, optimizer and
    step."""
    every = config.method == "full"
    if every and team.size == 1 and not config.deepspeed:
        whole = full.choose(config, decoder, full.load_of(config, rows))[1]
        fast.settle_memory(sparing=whole < len(decoder.layers))
        return full.equip(config, decoder, whole)
    try:
        parameters = attach(decoder, lora_of(config), config.seed) if not every else []
    except ValueError as error:
        raise UserError(str(error)) from None
    if every:
        decoder.requires_grad_(True)
    matrices: list[torch.Size] = []
    recompute = wants_recompute(config, decoder, rows)
    fast.settle_memory(sparing=recompute)
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
    return optimizer, ZeroStep(zero, optimizer, config.lora_dropout if config.method == "lora" else 0.0, config.seed)


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


def wants_recompute(config: TrainConfig, decoder: Decoder, rows: EncodedRows) -> bool:
    """`auto`: where a step that keeps its activations would not fit the card's free memory. The adapters are attached,
    the optimizer is not made yet."""
    if config.gradient_checkpointing != "auto" or decoder.device.type != "cuda":
        return config.gradient_checkpointing == "true"
    step = config.tokens_per_step or int(np.sort(rows.lengths)[-config.rows_per_step :].sum())
    tokens = max(rows.longest, min(config.tokens_per_pack, step))
    kernel = choose_kernel(decoder.device, decoder.dtype, decoder.config.head_dim, rows.longest)
    by_hand = decoder.lora_config is not None and not config.deepspeed and not fast.why_plain(decoder)
    needed = memory.beyond_weights(decoder, tokens, kernel, by_hand)
    return needed > 0.9 * torch.cuda.mem_get_info(decoder.device)[0]


def make_loader(
    config: TrainConfig, rows: Sequence[Encoded], device: torch.device, shuffle: bool = True, team: Team = ALONE
) -> Loader:
    # Small packs keep the CPU's caches and memory; a card wants long ones.
    whole = device.type != "cpu" or config.optim == "adamw_8bit_in_backward"
    pack = config.tokens_per_pack if whole else min(config.tokens_per_pack, 1024)
    return Loader(
        rows,
        rows_per_step=config.rows_per_step,
        tokens_per_step=config.tokens_per_step,
        tokens_per_pack=pack,
        seed=config.seed,
        shuffle=shuffle,
        pin=device.type == "cuda",
        rank=team.rank,
        ranks=team.size,
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


def describe(config: TrainConfig, decoder: Decoder, step: TrainStep, total: int, loader: Loader) -> list[str]:
    """What is going to happen, a line each."""
    every = sum(getattr(p, "ds_numel", p.numel()) for p in decoder.parameters())  # of DeepSpeed's slices too
    learn = every
    if config.method == "lora":
        learn = sum(getattr(p, "ds_numel", p.numel()) for p in step.optimizer.parameters)
        every -= learn
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
    if config.method == "lora" and decoder.config.family == "MiniCPMForCausalLM":
        lines.append(
            "note: stock transformers 5 can't open a MiniCPM base; `minitune export --format hf` writes one it opens"
        )
    return lines
