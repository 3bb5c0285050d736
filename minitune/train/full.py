"""What a full run learns with: which AdamW, and how many layers keep their activations, where that is not said."""

from __future__ import annotations

from typing import Literal

import torch

from minitune.config import TrainConfig, UserError
from minitune.data.loader import Loader
from minitune.data.store import EncodedRows
from minitune.model import full
from minitune.model.decoder import Decoder
from minitune.train import memory
from minitune.train.fast import one_pack_steps, why_plain
from minitune.train.full_step import FullStep
from minitune.train.memory import Load
from minitune.train.optim import AdamW, LossScale
from minitune.train.optim8 import AdamW8
from minitune.train.step import recompute_layers

Optim = Literal["adamw", "adamw_8bit", "adamw_8bit_in_backward"]
CHOICES: tuple[Optim, ...] = ("adamw", "adamw_8bit", "adamw_8bit_in_backward")  # from the most memory to the least


def choose(config: TrainConfig, decoder: Decoder, load: Load) -> tuple[Optim, int]:
    """(the optimizer, how many layers keep their activations): as the settings say; where they leave it open, the first
    optimizer that fits the card's free memory with recomputed layers, and as many whole layers as fit with it."""
    layers, names = len(decoder.layers), [name for name in CHOICES if config.optim in ("auto", name)]
    least, most = {"true": (1, 1), "false": (layers, layers)}.get(config.gradient_checkpointing, (1, layers))
    if decoder.device.type != "cuda":
        return names[0], most
    if decoder.dtype == torch.float16:
        names = names[:1]
    if load.several and config.optim == "auto":  # inside backward a step is one pack
        names = names[:2]
    free = 0.9 * torch.cuda.mem_get_info(decoder.device)[0]

    def fits(name: Optim, whole: int) -> bool:
        return memory.beyond_weights_full(decoder, load, name, whole) <= free

    name = next((name for name in names if fits(name, least)), names[-1])
    counts = [most] if why_plain(decoder) else range(most, least, -1)
    return name, next((whole for whole in counts if fits(name, whole)), least)


def optim_of(config: TrainConfig, decoder: Decoder, rows: EncodedRows, alone: bool) -> Optim:
    """The optimizer; of several processes, or DeepSpeed's, that with all its bits."""
    return choose(config, decoder, load_of(config, rows))[0] if alone else "adamw"


def load_of(config: TrainConfig, rows: EncodedRows) -> Load:
    """The largest step that these rows can make."""
    lengths, supervised = rows.lengths, rows.supervised
    order = lengths.argsort()[-config.rows_per_step :]
    step = config.tokens_per_step or int(lengths[order].sum())
    tokens = max(rows.longest, min(config.tokens_per_pack, step))
    share = max(float(supervised.sum() / lengths.sum()), float(supervised[order].sum() / lengths[order].sum()))
    return Load(tokens, min(tokens, int(1.2 * share * tokens) + 1), rows.longest, step > tokens)


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
