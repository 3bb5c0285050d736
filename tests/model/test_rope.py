"""Rotary angles against the formulas written out in plain Python."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from twins import rope_settings

from minitune.model.rope import Rope, rotate

DIM, BASE, MAX = 16, 5000.0, 64


def angle(kind: str, position: int, pair: int, length: int) -> float:
    """The angle of one pair of dimensions, in double precision."""
    s: dict[str, Any] = rope_settings(kind)
    base = BASE
    if kind == "dynamic" and length > MAX:
        base *= (s["factor"] * length / MAX - (s["factor"] - 1)) ** (DIM / (DIM - 2))
    frequency = base ** (-2 * pair / DIM)
    if kind == "linear":
        frequency /= s["factor"]
    if kind == "longrope":
        frequency /= s["long_factor" if length > s["original_max_position_embeddings"] else "short_factor"][pair]
    if kind == "llama3":
        wavelength = 2 * math.pi / frequency
        old, low, high = s["original_max_position_embeddings"], s["low_freq_factor"], s["high_freq_factor"]
        if wavelength > old / low:
            frequency /= s["factor"]
        elif wavelength >= old / high:
            smooth = (old / wavelength - low) / (high - low)
            frequency = (1 - smooth) * frequency / s["factor"] + smooth * frequency
    return position * frequency


@pytest.mark.parametrize("kind", ["default", "linear", "dynamic", "longrope", "llama3"])
def test_angles(kind: str) -> None:
    """cos and sin of documents of mixed lengths in one pack, each by its own length."""
    rope = Rope(DIM, BASE, MAX, rope_settings(kind))
    lengths = [5, 90, 32, 33, 64, 65, 1]
    positions = [p for n in lengths for p in range(n)]
    of = [n for n in lengths for _ in range(n)]
    cos, sin = rope(torch.tensor(positions), torch.tensor(of))
    amplitude = math.sqrt(1 + math.log(64 / 32) / math.log(32)) if kind == "longrope" else 1.0
    angles = [[angle(kind, p, i, n) for i in range(DIM // 2)] for p, n in zip(positions, of, strict=True)]
    want = torch.tensor(angles, dtype=torch.float64)
    assert cos.dtype == sin.dtype == torch.float32
    torch.testing.assert_close(cos[:, 0].double(), want.cos() * amplitude, atol=2e-5, rtol=0)
    torch.testing.assert_close(sin[:, 0].double(), want.sin() * amplitude, atol=2e-5, rtol=0)


def test_rotate_is_a_complex_product() -> None:
    """The rotate-half pairing: dimension i turns with dimension i + D/2, computed in float32 for bf16 too."""
    torch.manual_seed(0)
    x = torch.randn(7, 3, DIM)
    cos, sin = Rope(DIM, BASE, MAX, None)(torch.arange(7))
    half = DIM // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos, sin)
    torch.testing.assert_close(rotate(x, cos, sin), torch.cat((turned.real, turned.imag), -1))
    low = rotate(x.bfloat16(), cos, sin)
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, rotate(x.bfloat16().float(), cos, sin).bfloat16())


def test_longrope_amplitude() -> None:
    """`attention_factor` wins, then `factor`, then the ratio of the two maxima; an equal maximum is 1."""
    longrope = rope_settings("longrope")
    assert Rope(DIM, BASE, 64, {**longrope, "attention_factor": 1.7}).amplitude == 1.7
    by_factor = Rope(DIM, BASE, 64, {**longrope, "factor": 4.0}).amplitude
    assert by_factor == pytest.approx(math.sqrt(1 + math.log(4) / math.log(32)))
    assert Rope(DIM, BASE, 32, longrope).amplitude == 1.0


def test_names_of_kinds() -> None:
    """transformers 4's `type`, LongRoPE's first name, and a refusal that says what is supported."""
    assert Rope(DIM, BASE, MAX, {"type": "linear", "factor": 2.0}).kind == "linear"
    assert Rope(DIM, BASE, MAX, {**rope_settings("longrope"), "rope_type": "su"}).kind == "longrope"
    with pytest.raises(ValueError, match="'yarn' is not supported.*dynamic"):
        Rope(DIM, BASE, MAX, {"rope_type": "yarn", "factor": 2.0})
    with pytest.raises(ValueError, match="length"):
        Rope(DIM, BASE, MAX, rope_settings("dynamic"))(torch.arange(3))
