"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864), rotate-half kind, in float32.

Legend: T packed tokens, N heads, D head width, F = D / 2 frequencies.
Scalings that depend on a length (dynamic NTK, LongRoPE) take each token's own document's length, so that a
document in a pack is rotated as it would be by itself.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
SUPPORTED = tuple(NEEDS)


class Rope:
    """cos and sin of each position. `scaling` is the hub config's `rope_scaling` (or None).

    Raises ValueError for a scaling type that is not supported, or that lacks a key.
    """

    def __init__(self, head_dim: int, theta: float, max_positions: int, scaling: dict[str, Any] | None):
        self.head_dim, self.theta, self.max_positions = head_dim, theta, max_positions
        self.scaling = dict(scaling or {})
        self.kind = str(self.scaling.get("rope_type", self.scaling.get("type", "default")))
        if self.kind == "su":  # LongRoPE's first name
            self.kind = "longrope"
        if self.kind not in SUPPORTED:
            raise ValueError(f"rope_scaling type {self.kind!r} is not supported (supported: {', '.join(SUPPORTED)})")
        for key in NEEDS[self.kind]:
            if self.scaling.get(key) is None:
                raise ValueError(f"rope_scaling of type {self.kind!r} lacks {key}")
            if self.kind == "longrope" and len(self.scaling[key]) != head_dim // 2:
                raise ValueError(f"{key} has {len(self.scaling[key])} numbers, not {head_dim // 2}")
        self.amplitude = 1.0
        if self.kind == "longrope":
            self.original_max = int(self.scaling.get("original_max_position_embeddings") or max_positions)
            self.amplitude = self._longrope_amplitude()
        self._tables: dict[torch.device, tuple[Tensor, ...]] = {}

    def _longrope_amplitude(self) -> float:
        given = self.scaling.get("attention_factor")
        if given is not None:
            return float(given)
        factor = self.scaling.get("factor") or self.max_positions / self.original_max
        return math.sqrt(1 + math.log(factor) / math.log(self.original_max)) if factor > 1 else 1.0

    def _plain(self) -> Tensor:
        return self.theta ** (-torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim)

    def _llama3(self, inv_F: Tensor) -> Tensor:
        """Llama 3.1's: long wavelengths divided by `factor`, short ones kept, a ramp between."""
        factor = self.scaling["factor"]
        low, high = self.scaling["low_freq_factor"], self.scaling["high_freq_factor"]
        original = self.scaling["original_max_position_embeddings"]
        ramp_F = ((original * inv_F / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        return inv_F / factor * (1 - ramp_F) + inv_F * ramp_F

    def _frequencies(self, device: torch.device) -> tuple[Tensor, ...]:
        if device not in self._tables:
            inv_F = self._plain()
            if self.kind == "linear":
                inv_F = inv_F / float(self.scaling["factor"])
            elif self.kind == "llama3":
                inv_F = self._llama3(inv_F)
            tables: tuple[Tensor, ...] = (inv_F,)
            if self.kind == "longrope":
                short, long = (
                    torch.tensor(self.scaling[k], dtype=torch.float32) for k in ("short_factor", "long_factor")
                )
                tables = (inv_F / short, inv_F / long)
            self._tables[device] = tuple(t.to(device) for t in tables)
        return self._tables[device]

    @property
    def needs_length(self) -> bool:
        """Whether the angles depend on the length of the document."""
        return self.kind in ("dynamic", "longrope")

    def regime(self, length: int) -> int:
        """Prompts of one regime have the same angles at the same positions, and so have their continuations."""
        return int(self.kind == "longrope" and length > self.original_max)

    def _inverse_frequencies(self, length_T: Tensor | None, device: torch.device) -> Tensor:
        tables = self._frequencies(device)
        if not self.needs_length:
            return tables[0]
        if length_T is None:
            raise ValueError(f"{self.kind} RoPE needs the length of each token's document")
        if self.kind == "longrope":
            return torch.where((length_T > self.original_max)[:, None], tables[1], tables[0])
        factor, dim = float(self.scaling["factor"]), self.head_dim
        stretch_T = factor * length_T.clamp(min=self.max_positions) / self.max_positions - (factor - 1)
        base_T = self.theta * stretch_T.float() ** (dim / (dim - 2))
        return base_T[:, None] ** (-torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)

    def __call__(self, position_ids_T: Tensor, length_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(cos_T1F, sin_T1F) in float32; `length_T` is the length of each token's document."""
        inv = self._inverse_frequencies(length_T, position_ids_T.device)
        angle_TF = position_ids_T.float()[:, None] * inv
        return (angle_TF.cos() * self.amplitude)[:, None], (angle_TF.sin() * self.amplitude)[:, None]


def rotate(x_TND: Tensor, cos_T1F: Tensor, sin_T1F: Tensor) -> Tensor:
    """`x` rotated by its position's angles; computed in float32, returned in x's dtype."""
    a, b = x_TND.float().chunk(2, dim=-1)
    return torch.cat((a * cos_T1F - b * sin_T1F, b * cos_T1F + a * sin_T1F), dim=-1).to(x_TND.dtype)
