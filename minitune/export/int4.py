"""Four-bit linears for `--format hf --quant int4`: what each linear is given, and the group size that fits."""

from __future__ import annotations

import torch
from torch import Tensor

from minitune.config import UserError
from minitune.export.report import Report
from minitune.export.source import Source
from minitune.model import quantized

Moments = dict[str, Tensor]


class Watcher:
    """The mean square of each input of each linear, by the hub name of its weight: `stream.hidden`'s `watch`."""

    def __init__(self) -> None:
        self.moments: Moments = {}

    def __call__(self, name: str, x_TI: Tensor) -> None:
        self.moments[name] = x_TI.float().square().mean(0)


def group_size(source: Source, report: Report) -> int:
    """The group size for this model; UserError, one line, where four bits don't fit it."""
    if source.group:
        return source.group  # what the adapter leaves alone then keeps its numbers
    columns = {linear.weight.shape[1] for linear in source.decoder.linears()}
    try:
        group = quantized.group_size(columns)
    except ValueError as error:
        raise UserError(f"{source.shards.folder}: {error}; use --format gguf --quant q8_0") from None
    if group != quantized.GROUPS[0]:
        odd = min(width for width in columns if width % quantized.GROUPS[0])
        report.notes.append(f"rows of {odd} weights are no multiple of {quantized.GROUPS[0]}: groups of {group}")
    return group


def rest_dtype(source: Source, dtype: torch.dtype | None) -> torch.dtype:
    """What is not packed, the scales too: as asked, else the base's own 16 bits, bfloat16 where that has 32."""
    return dtype or (torch.bfloat16 if source.dtype == torch.float32 else source.dtype)
