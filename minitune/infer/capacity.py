"""How many requests at once, and how many tokens of them: what a person asked for, or what memory allows."""

from __future__ import annotations

from pathlib import Path

import torch

from minitune.model.cache import PAGE, PagedCache
from minitune.model.decoder import Decoder

SLOTS = {"cpu": 16, "cuda": 64}


def choose(decoder: Decoder, slots: int, cache_tokens: int) -> tuple[int, int]:
    """(slots, pages of the cache); 0 asks for what fits. All slots at full length is the most that is of use."""
    config, device = decoder.config, decoder.device
    slots = slots or SLOTS.get(device.type, 16)
    if not cache_tokens:
        most = slots * (config.max_position_embeddings + PAGE)
        cache_tokens = min(most, memory_budget(device) // PagedCache.token_bytes(config, decoder.dtype))
    return slots, max(1, -(-cache_tokens // PAGE))


def memory_budget(device: torch.device) -> int:
    """Bytes that the cache may take: most of what a card has free, a quarter of what the machine has."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * 0.8)
    meminfo = Path("/proc/meminfo")
    for line in meminfo.read_text(encoding="utf-8").splitlines() if meminfo.exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 // 4
    return 2 << 30
