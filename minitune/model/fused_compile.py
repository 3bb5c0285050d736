"""The kernels of layers by hand compiled while its data and weights are still on their way.

Three layers of the run's shape pass forward and backward on `meta`, where tensors have no memory, and every launch only
has its kernel compiled. What was guessed wrong is compiled when it is first launched, as everything was before.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import replace

import torch
from torch import Tensor, nn

from minitune.model import full, kernels
from minitune.model.attention import PackedLayout
from minitune.model.attention_kernels import LONGEST
from minitune.model.decoder import Decoder, DecoderConfig
from minitune.model.fused import Context, FusedStack
from minitune.model.lora import LoraConfig, attach
from minitune.model.quantized import quantize_linears

TOKENS = 128  # any number: kernels are not compiled for it


def compile_kernels(
    shape: DecoderConfig,
    dtype: torch.dtype,
    lora: LoraConfig,
    documents: int,
    keep: bool,
    pool: Executor,
    group: int = 0,
) -> None:
    """For a step of so many documents of at most `LONGEST` tokens, on this thread's current card, in the pool. group:
    of 4-bit weights, 0 for others."""
    with kernels.compiling(pool), torch.no_grad():
        launch_all(shape, dtype, lora, documents, keep, group)


def launch_all(
    shape: DecoderConfig, dtype: torch.dtype, lora: LoraConfig, documents: int, keep: bool, group: int = 0
) -> None:
    """Every launch of a training step, each kind at least once, on `meta`."""
    with torch.device("meta"):
        decoder = Decoder(replace(shape, num_hidden_layers=3))
        decoder = (quantize_linears(decoder, group) if group else decoder).to(dtype)
    attach(decoder, lora)
    stack = FusedStack(decoder, keep)
    with torch.device("meta"):
        x, cos = torch.empty(TOKENS, shape.hidden_size, dtype=dtype), torch.empty(TOKENS, 1, shape.head_dim // 2)
        cu_seqlens = torch.empty(documents + 1, dtype=torch.int32)
        drop = torch.empty(2 + TOKENS, dtype=torch.int32) if lora.lora_dropout else None
        logits = torch.empty(64, shape.vocab_size + -shape.vocab_size % 64, dtype=dtype)
        targets = torch.empty(64, dtype=torch.int64)
    ctx = Context(cos, cos, PackedLayout(cu_seqlens, LONGEST, (), "short"), drop)
    x, y, _ = stack.layer_forward(0, x, None, ctx)
    for i in (1, 2):
        x, y, kept = stack.layer_forward(i, x, y, ctx)
        stack.layer_backward(i, torch.empty_like(x), kept, ctx)
    kernels.cross_entropy_(logits, targets, shape.vocab_size, grad=True)


class Nowhere:
    """`model.full.Sink` on `meta`."""

    def __init__(self, buffered: bool):
        self.buffered = buffered
        self.matrices: list[nn.Parameter] = []

    def place(self, index: int) -> tuple[Tensor, float]:
        return torch.empty_like(self.matrices[index].data), 0.0

    def ready(self, index: int) -> None:
        pass


def launch_full(shape: DecoderConfig, dtype: torch.dtype, documents: int) -> None:
    """As `launch_all`, where every parameter learns."""
    with torch.device("meta"):
        decoder = Decoder(replace(shape, num_hidden_layers=3)).to(dtype)
        decoder.padding = -shape.vocab_size % 64
        owner = decoder.embed if decoder.lm_head is None else decoder.lm_head
        padded = torch.empty(shape.vocab_size + decoder.padding, shape.hidden_size, dtype=dtype)
        owner.weight = nn.Parameter(padded[: shape.vocab_size])
        ids, positions = torch.empty(TOKENS, dtype=torch.int64), torch.empty(64, dtype=torch.int64)
        layout = PackedLayout(torch.empty(documents + 1, dtype=torch.int32), LONGEST, (), "short")
        stack, sink, share = full.FullStack(decoder, 1), Nowhere(False), torch.empty(())
        sink.matrices = stack.matrices
        _, tape = stack.learn(ids, ids, layout, positions, positions, share, sink, 64)
        stack.backward(tape, sink)
