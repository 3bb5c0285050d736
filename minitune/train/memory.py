"""What a step holds on a card beyond the weights, by arithmetic; measured beside it in tests/train/test_memory.py.

Legend: T tokens, H hidden, F FFN width, N heads, K key/value heads, D head width.
"""

from __future__ import annotations

from typing import NamedTuple

from minitune.model import full, kernels
from minitune.model.attention import Kernel, choose_kernel
from minitune.model.decoder import Decoder, Linear
from minitune.model.fused import strip_width
from minitune.model.fused_ops import Slot
from minitune.train.step import chunk_of

OVERHEAD = 1 << 28  # strips, matrix workspaces, what the allocator rounds up


def layer_bytes(decoder: Decoder, index: int, kernel: Kernel, by_hand: bool) -> int:
    """Bytes a token that one layer keeps for its backward. by_hand: as `model.fused` computes it."""
    config, size = decoder.config, decoder.dtype.itemsize
    H, F, D = config.hidden_size, config.intermediate_size, config.head_dim
    N, K = config.num_attention_heads, config.num_key_value_heads
    loras = [decoder.of_kind(kind)[index].lora for kind in Slot.KINDS]
    inputs = (H, N * D, H, F)
    qkv, out = (N + 2 * K) * D, N * D
    # q and k, rotated; keys and values as many as queries, see `attention.alike`
    rotated = 0 if kernel == "short" else N * D + (K * D if K == N else 2 * N * D)
    statistics = 4 * N  # float32 log-sum-exp
    if by_hand:
        strips = [strip_width(lora.A.shape[0]) if lora is not None else 0 for lora in loras]
        if decoder.lora_config is None:  # `model.full` computes norms again
            kept = 2 * H + qkv + out + 2 * F + (0 if kernel == "short" else rotated + out)
            return kept * size + statistics
        kept = 2 * H + (H + strips[0]) + qkv + (out + strips[1]) + 2 * F  # x1, x2, norm, attention, gate | up
        kept += H + strips[2] if strips[2] else 0  # the second norm's result
        kept += 0 if kernel == "short" else rotated + out  # autograd has a result of its own
        return kept * size + statistics + 8
    kept = qkv + rotated + out + 3 * F  # gate | up, silu(gate)
    if decoder.lora_config is None:
        kept += 4 * H + F  # norms without and with their weight, what down multiplies
    else:  # dropout's mask, and what it leaves
        kept += sum(2 * width for lora, width in zip(loras, inputs, strict=True) if lora is not None)
    norms = 2 * H * 4  # their inputs in float32
    return kept * size + statistics + norms


def _attention(decoder: Decoder) -> list[Linear]:
    return decoder.of_kind("attn.qkv") + decoder.of_kind("attn.o")


def beyond_weights(decoder: Decoder, tokens: int, kernel: Kernel, by_hand: bool, recompute: bool = False) -> int:
    """Bytes that a step of one pack of so many tokens needs beside the weights: activations, logits, what the
    optimizer holds. recompute: layers keep their inputs alone."""
    config, size = decoder.config, decoder.dtype.itemsize
    H, F = config.hidden_size, config.intermediate_size
    layers = [layer_bytes(decoder, i, kernel, by_hand) for i in range(len(decoder.layers))]
    kept, working = sum(layers), (2 * F + 3 * H) * size  # working: what the backward of one layer makes
    if recompute:
        strips = sum(strip_width(n.lora.A.shape[0]) for n in _attention(decoder) if n.lora is not None) * by_hand
        kept, working = (len(layers) * H + strips) * size, working + max(layers)
    chunk, width = 512 if by_hand and recompute else chunk_of(decoder), config.vocab_size + decoder.padding
    if kernels.why_not(decoder.device):
        logits = min(tokens, chunk) * width * (size + 8)  # and in float32, twice
    else:
        logits = min(tokens, chunk) * width * size
    mask = tokens * tokens * (size + 1) if kernel == "masked" else 0
    learning = 0
    for parameter in decoder.parameters():
        if parameter.requires_grad:  # gradient and two moments; below float32 a master and its gradient
            half = parameter.element_size() < 4
            learning += parameter.numel() * (parameter.element_size() + 8 + (8 if half else 0))
    return tokens * (kept + working) + logits + mask + learning + OVERHEAD


class Load(NamedTuple):
    """The largest pack of a run: its tokens, supervised positions, longest document. several: a step may be more."""

    tokens: int
    positions: int
    longest: int
    several: bool = False


def beyond_weights_full(decoder: Decoder, load: Load, optim: str, whole: int) -> int:
    """The same where every parameter learns by `optim` and so many layers keep their activations."""
    config, size = decoder.config, decoder.dtype.itemsize
    H, F = config.hidden_size, config.intermediate_size
    count = sum(p.numel() for p in decoder.parameters())
    by_hand = not full.why_not(decoder) and decoder.device.type == "cuda"
    kernel = choose_kernel(decoder.device, decoder.dtype, config.head_dim, load.longest)
    layer = layer_bytes(decoder, 0, kernel, by_hand)
    layers = len(decoder.layers)
    kept = whole * layer + (layers - whole) * H * size
    working = (2 * F + 4 * H) * size + (layer if whole < layers else 0)
    head = (config.vocab_size + decoder.padding) * size
    learning = count * 2 + count // 32  # codes and scales
    if optim == "adamw":
        learning = count * (size + 8 + (8 if size < 4 else 0))
    elif optim == "adamw_8bit":
        learning += count * size
    chunk = min(load.positions, 512 if whole < layers else chunk_of(decoder)) * head
    if optim != "adamw_8bit_in_backward":
        return load.tokens * (kept + working) + chunk + learning + OVERHEAD
    # two gradients are at hand; the smaller of the logits' and the head's is kept (the latter comes late, or at once)
    learning += 2 * size * max(linear.weight.numel() for linear in decoder.linears())
    if load.positions > H:
        return load.tokens * (kept + working) + head * H + chunk + learning + OVERHEAD
    return max(load.tokens * (kept + working), head * H) + load.positions * head + learning + OVERHEAD
