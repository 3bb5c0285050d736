"""Keys and values while decoding: static slots, so that nothing is allocated from token to token.

Legend: T new tokens, N query heads, K key/value heads, D head width, S slots, C capacity (tokens a slot),
M = start + T tokens that a slot holds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minitune.model.attention import sdpa
from minitune.model.decoder import DecoderConfig


class KVCache:
    """Keys and values [layers, S, K, C, D] of S conversations of at most C tokens."""

    def __init__(self, config: DecoderConfig, slots: int, capacity: int, device: torch.device, dtype: torch.dtype):
        shape = (config.num_hidden_layers, slots, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.capacity = capacity


@dataclass(frozen=True)
class CachedLayout:
    """T new tokens of one slot at positions start, …, start + T - 1: a prompt, a later turn, or one token."""

    cache: KVCache
    slot: int
    start: int
    layer: int = 0
    kernel = "cached"

    def for_layer(self, index: int) -> CachedLayout:
        return replace(self, layer=index)

    def length_T(self, tokens: int) -> Tensor:
        """The length of the conversation with all new tokens, for each of them, [T]."""
        return torch.full((tokens,), self.start + tokens, device=self.cache.keys.device)

    def attend(self, q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, scale: float) -> Tensor:
        """Keeps the new keys and values, attends to all that the slot holds -> [T, N, D]."""
        tokens = q_TND.shape[0]
        stop = self.start + tokens
        k_KCD, v_KCD = self.cache.keys[self.layer, self.slot], self.cache.values[self.layer, self.slot]
        k_KCD[:, self.start : stop] = k_TKD.transpose(0, 1)
        v_KCD[:, self.start : stop] = v_TKD.transpose(0, 1)
        at_M = torch.arange(stop, device=q_TND.device)
        mask_TM = at_M <= at_M[self.start :, None]
        return sdpa(q_TND, k_KCD[:, :stop].transpose(0, 1), v_KCD[:, :stop].transpose(0, 1), scale, mask_TM)
