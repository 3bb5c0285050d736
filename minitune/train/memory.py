"""What a step holds on a card beyond the weights, by arithmetic; measured beside it in tests/train/test_memory.py.

Legend: T tokens, H hidden, F FFN width, N heads, K key/value heads, D head width.
"""

from __future__ import annotations

from minitune.model import kernels
from minitune.model.attention import Kernel
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
