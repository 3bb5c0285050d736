"""What a full run learns with: which optimizer, and which layers keep their activations, where that is not said."""

from __future__ import annotations

import torch

from minitune.config import TrainConfig, UserError
from minitune.model import full
from minitune.model.decoder import Decoder
from minitune.train.fast import why_not_on
from minitune.train.full_step import FullStep
from minitune.train.optim import AdamW, LossScale
from minitune.train.optim8 import AdamW8
from minitune.train.step import recompute_layers


def why_plain(decoder: Decoder) -> str:
    """Why every parameter of this decoder learns through autograd; "" where `model.full` does it by hand."""
    return why_not_on(decoder.device) or full.why_not(decoder)


def equip(
    config: TrainConfig, decoder: Decoder, whole: int, by_hand: bool = True, beside: bool = True
) -> tuple[AdamW | AdamW8, FullStep]:
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
    return optimizer, FullStep(
        decoder, optimizer, stack, max_grad_norm=config.max_grad_norm, loss_scale=scale, beside=beside
    )
