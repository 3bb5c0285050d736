"""Keys and values while decoding, in pages that sequences take and give back.

A sequence's tokens lie in pages of PAGE tokens; position p is in its page p // PAGE. Nothing is allocated from token
to token, and sequences that begin alike may share their first pages.

Legend: T new tokens, B rows of one new token each, N query heads, K key/value heads, D head width, P pages of a
sequence, M = P · PAGE tokens that they hold, G = N / K query heads a key head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minitune.model.attention import sdpa
from minitune.model.decoder import DecoderConfig

PAGE = 64  # tokens: 3 MB of SmolLM2-135M, 47 MB of MiniCPM-2B in float32


class PagedCache:
    """Keys and values, each [layers, pages + 1, PAGE, K, D]. Page 0 belongs to nobody: idle rows write there."""

    def __init__(self, config: DecoderConfig, pages: int, device: torch.device, dtype: torch.dtype):
        shape = (config.num_hidden_layers, pages + 1, PAGE, config.num_key_value_heads, config.head_dim)
        self.keys, self.values = _zeros(shape, device, dtype), _zeros(shape, device, dtype)

    @staticmethod
    def token_bytes(config: DecoderConfig, dtype: torch.dtype) -> int:
        """What one token costs."""
        width = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        return 2 * width * dtype.itemsize

    def copy(self, source: int, target: int) -> None:
        """A page's contents into another."""
        for held in (self.keys, self.values):
            held[:, target] = held[:, source]

    def write(self, layer: int, at_T: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """`at_T`: page · PAGE + place in the page, of each token."""
        for held, new in ((self.keys, k_TKD), (self.values, v_TKD)):
            held[layer].flatten(0, 1).index_copy_(0, at_T, new)

    def read(self, layer: int, pages_BP: Tensor) -> tuple[Tensor, Tensor]:
        """(keys, values), each [B, M, K, D], copied."""
        rows, flat = pages_BP.shape[0], pages_BP.flatten()
        keys, values = self.keys[layer].index_select(0, flat), self.values[layer].index_select(0, flat)
        return keys.view(rows, -1, *keys.shape[2:]), values.view(rows, -1, *values.shape[2:])


def _zeros(shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Zeros: what is masked must be finite. On a CPU memory is taken when it is first written to."""
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    import numpy as np

    count = dtype.itemsize
    for size in shape:
        count *= size
    return torch.from_numpy(np.zeros(count, dtype=np.uint8)).view(dtype).view(shape)  # torch.zeros writes to it all


@dataclass(frozen=True)
class Part:
    """The next tokens, at positions start, …, stop - 1, of the sequence that holds `pages`."""

    pages: Sequence[int]
    start: int
    stop: int


class PrefillLayout:
    """The next tokens of several sequences laid end to end: whole prompts, or chunks of them.

    length_T: the length of each token's document, for a RoPE that needs it.
    """

    kernel = "cached"

    def __init__(self, cache: PagedCache, parts: Sequence[Part], length_T: Tensor):
        self.cache, self.length, self.layer = cache, length_T, 0
        device = cache.keys.device
        at: list[int] = []
        for part in parts:
            at += [part.pages[p // PAGE] * PAGE + p % PAGE for p in range(part.start, part.stop)]
        self.at_T = torch.tensor(at, device=device)
        self.lengths = [part.stop - part.start for part in parts]
        self.stops = [part.stop for part in parts]
        # A sequence that begins here needs nothing that was kept, and its mask is the plain causal one.
        self.pages: list[Tensor | None] = []
        self.masks: list[Tensor | None] = []
        for part in parts:
            held = torch.tensor([part.pages[: -(-part.stop // PAGE)]], device=device)
            at_M = torch.arange(part.stop, device=device)
            self.pages.append(held if part.start else None)
            self.masks.append(at_M <= at_M[part.start :, None] if part.start else None)

    def for_layer(self, index: int) -> PrefillLayout:
        self.layer = index
        return self

    def length_T(self, tokens: int) -> Tensor:
        return self.length

    def attend(self, q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, scale: float) -> Tensor:
        """Keeps the new keys and values; each token attends to its sequence up to itself -> [T, N, D]."""
        self.cache.write(self.layer, self.at_T, k_TKD, v_TKD)
        out = []
        new = zip(*(t.split(self.lengths) for t in (q_TND, k_TKD, v_TKD)), strict=True)
        for (q, k, v), pages, stop, mask in zip(new, self.pages, self.stops, self.masks, strict=True):
            if pages is not None:
                k, v = (t[0, :stop] for t in self.cache.read(self.layer, pages))
            out.append(sdpa(q, k, v, scale, mask))
        return torch.cat(out)


class DecodeLayout:
    """One new token of each of B sequences, row b at `position_B[b]` of the sequence whose pages are `table_BP[b]`.

    groups: (rows, pages read) of parts of the batch; (None, P) is all of it. Shapes depend on the groups alone, so a
    step with the one group of all rows has static shapes. Rows of unequal length are cheaper in groups of their own.
    """

    kernel = "cached"

    def __init__(
        self,
        cache: PagedCache,
        table_BP: Tensor,
        position_B: Tensor,
        length_B: Tensor,
        groups: Sequence[tuple[Tensor | None, int]],
    ):
        self.cache, self.length, self.layer = cache, length_B, 0
        page_B = table_BP.gather(1, (position_B // PAGE)[:, None])[:, 0]
        self.at_B = page_B * PAGE + position_B % PAGE
        self.groups: list[tuple[Tensor | None, Tensor, Tensor]] = []
        for rows, pages in groups:
            table, position = (table_BP, position_B) if rows is None else (table_BP[rows], position_B[rows])
            at_M = torch.arange(pages * PAGE, device=table.device)
            # Whole pages, and a mask of numbers: then padding to more pages adds exact zeros, and changes no bit.
            mask = torch.zeros((), device=table.device, dtype=cache.keys.dtype)
            mask_BM = torch.where(at_M <= position[:, None], mask, -torch.inf)
            self.groups.append((rows, table[:, :pages], mask_BM[:, None, None]))

    def for_layer(self, index: int) -> DecodeLayout:
        self.layer = index
        return self

    def length_T(self, tokens: int) -> Tensor:
        return self.length

    def attend(self, q_BND: Tensor, k_BKD: Tensor, v_BKD: Tensor, scale: float) -> Tensor:
        """Keeps the new keys and values; each row attends to all that its sequence holds -> [B, N, D]."""
        self.cache.write(self.layer, self.at_B, k_BKD, v_BKD)
        if len(self.groups) == 1 and self.groups[0][0] is None:
            return self._attend(q_BND, *self.groups[0][1:], scale)
        out_BND = torch.empty_like(q_BND)
        for rows, table, mask in self.groups:
            out_BND[rows] = self._attend(q_BND[rows], table, mask, scale)
        return out_BND

    def _attend(self, q_BND: Tensor, table_BP: Tensor, mask_B11M: Tensor, scale: float) -> Tensor:
        k_BKMD, v_BKMD = (t.transpose(1, 2) for t in self.cache.read(self.layer, table_BP))
        # the query heads of a key head as if they were places: keys are read once for all of them
        q_BKGD = q_BND.unflatten(1, (k_BKMD.shape[1], -1))
        groups = q_BKGD.shape[2]
        if q_BND.device.type == "cpu":
            if groups == 1 and q_BND.dtype != torch.float32:  # torch's 16-bit kernel for one query is very slow
                q_BKGD, k_BKMD, v_BKMD, mask_B11M = (t.float() for t in (q_BKGD, k_BKMD, v_BKMD, mask_B11M))
            if groups % 2:  # odd, a second thread's buffer would lie at an odd address, where MKL rounds otherwise
                q_BKGD = torch.cat((q_BKGD, q_BKGD[:, :, -1:]), dim=2)
        out_BKGD = F.scaled_dot_product_attention(q_BKGD, k_BKMD, v_BKMD, attn_mask=mask_B11M, scale=scale)
        return out_BKGD[:, :, :groups].flatten(1, 2).to(q_BND.dtype)
