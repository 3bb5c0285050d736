"""What a full run learns with: its AdamW and its step."""

from __future__ import annotations

import torch

from minitune.config import TrainConfig, UserError
from minitune.data.loader import Loader
from minitune.model import full
from minitune.model.decoder import Decoder
from minitune.train.fast import one_pack_steps, why_plain
from minitune.train.full_step import FullStep
from minitune.train.optim import AdamW, LossScale
from minitune.train.optim8 import AdamW8
from minitune.train.step import recompute_layers


def equip(config: TrainConfig, decoder: Decoder, whole: int, by_hand: bool = True) -> tuple[AdamW | AdamW8, FullStep]:
    """The optimizer and the step. whole: layers that keep their activations, from the last; the others are computed
    again. by_hand: where it can be."""
    parameters = list(decoder.requires_grad_(True).parameters())
    optimizer: AdamW | AdamW8
    try:
        if config.optim in ("adamw", "auto"):
            optimizer = AdamW(parameters, config)
        else:
            optimizer = AdamW8(parameters, config, config.optim == "adamw_8bit_in_backward")
    except ValueError as error:
        raise UserError(str(error)) from None
    stack = full.FullStack(decoder, whole) if by_hand and not why_plain(decoder) else None
    if stack is None and whole < len(decoder.layers):
        recompute_layers(decoder)
    scale = LossScale(decoder.device) if decoder.dtype == torch.float16 else None
    return optimizer, FullStep(decoder, optimizer, stack, max_grad_norm=config.max_grad_norm, loss_scale=scale)


def check_packs(config: TrainConfig, loader: Loader, per_epoch: list[int], total: int) -> None:
    """UserError where a step is several packs and the optimizer takes only whole ones."""
    if config.optim == "adamw_8bit_in_backward" and (several := total - len(one_pack_steps(loader, per_epoch, total))):
        raise UserError(
            f"optim {config.optim} adds no packs up, and {several:,} of {total:,} steps are several; "
            f"raise --tokens_per_pack, take smaller steps, or use --optim adamw_8bit"
        )


def said(config: TrainConfig, step: FullStep) -> str:
    """A line about both."""
    layers = len(step.decoder.layers)
    whole = layers if step.stack is None else step.stack.wholes
    line = {
        "adamw": "moments of 32 bits, float32 masters",
        "adamw_8bit": "moments of 8 bits, gradients in a buffer",
        "adamw_8bit_in_backward": "moments of 8 bits, stepped inside backward; each gradient clipped by itself",
    }[config.optim]
    kept = f"; {whole} of {layers} layers keep their activations" if whole < layers else ""
    return f"{config.optim}: {line}{kept}"
