"""What tests of layers by hand share: small random decoders, and which kernels were launched."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from minitune.model.decoder import Decoder, DecoderConfig
from minitune.model.lora import Choice, LoraConfig, attach, detach, stack
from minitune.model.quantized import Int4Linear, quantize, quantize_linears

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def decoder_of(config: DecoderConfig, dtype: torch.dtype = torch.float32, group: int = 0) -> Decoder:
    """Random weights; with `group` the linears' are of four bits."""
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder.allocate(DEVICE, dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in decoder.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(values * 0.2 + 1 if parameter.ndim == 1 else values * 0.12)
    if group:
        weights = [linear.weight.detach().clone() for linear in decoder.linears()]
        quantize_linears(decoder, group)
        for linear, weight in zip(decoder.linears(), weights, strict=True):
            assert isinstance(linear, Int4Linear)
            linear.weight_packed, linear.weight_scale = quantize(weight, group, dtype, steps=4)
    return decoder.eval()


def adapters_on(decoder: Decoder) -> Choice:
    """Two adapters of other ranks and targets, stacked."""
    loras = []
    for rank, targets in ((4, ("q_proj", "v_proj", "down_proj")), (7, "all-linear")):
        attach(decoder, LoraConfig(r=rank, lora_alpha=9, target_modules=targets), seed=rank)
        for linear in decoder.linears():
            if linear.lora is not None:
                torch.nn.init.normal_(linear.lora.B, std=0.2)
        loras.append([linear.lora for linear in decoder.linears()])
        detach(decoder)
    decoder.requires_grad_(False)
    return stack(decoder, loras)


def launches_of(modules: Iterable[Any], monkeypatch: pytest.MonkeyPatch) -> set[tuple[Any, ...]]:
    """Fills from here on with each launch's kernel, dtypes and constants; what is launched on `meta` does not run."""
    seen: set[tuple[Any, ...]] = set()

    def record(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        kinds = tuple(a.dtype if isinstance(a, Tensor) else type(a) for a in args)
        seen.add((str(kernel.fn.__name__), kinds, tuple(options.items())))
        if all(a.device.type != "meta" for a in args if isinstance(a, Tensor)):
            kernel[grid](*args, **options)

    for module in modules:
        monkeypatch.setattr(module, "launch", record)
    return seen
