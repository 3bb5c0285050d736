"""The embedded model on real rows: one loss curve, on the CPU in float32 and on a card in bfloat16."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import pytest
from runs import log_of, with_

from minitune.checkpoint.embedded import PACKAGE
from minitune.config import TrainConfig
from minitune.train.run import train

STEPS, LENGTH = 30, 96
STEP_BAND, MEAN_BAND = 0.05, 0.01  # nats


@pytest.fixture
def smollm2() -> str:
    """The embedded model: of its package, or of the GGUF file that $MINITUNE_SMOLLM2_GGUF names."""
    if file := os.environ.get("MINITUNE_SMOLLM2_GGUF"):
        return file
    try:
        importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{PACKAGE} is not installed, and MINITUNE_SMOLLM2_GGUF names no file")
    return "smollm2"


@pytest.mark.gpu
def test_the_card_learns_what_the_cpu_learns(
    smollm2: str, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], undrawn: None
) -> None:
    """30 steps of 16 real rows, LoRA with dropout, the same seed: at every step the losses lie within 0.05 nats of each
    other, and within 0.01 in the mean; they fall by more than that. (Both on a CPU, bfloat16 parted from
    float32 by 0.017 at most and 0.004 in the mean, the losses from 3.31 to 2.71 in the first and last five steps.)"""
    config = TrainConfig(
        model=smollm2, data=str(shared / "data" / "huanhuan.json"), output=str(tmp_path / "cpu"), max_steps=STEPS,
        max_samples=16 * STEPS, max_length=LENGTH, learning_rate=1e-3, device="cpu", dtype="float32",
    )  # fmt: skip
    card = with_(config, output=str(tmp_path / "card"), device="cuda", dtype="bfloat16")
    train(card)
    said = capsys.readouterr().err
    assert "captured: " in said and "plain layers" not in said
    train(config, quiet=True)
    ours, want = ([row["loss"] for row in log_of(c.output)] for c in (card, config))
    apart = [a - b for a, b in zip(ours, want, strict=True)]
    print("card − CPU, nats:", [round(d, 4) for d in apart])
    assert len(apart) == STEPS
    assert max(map(abs, apart)) <= STEP_BAND, apart
    assert abs(sum(apart)) / STEPS <= MEAN_BAND, apart
    for losses in (ours, want):
        assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 10 * MEAN_BAND, losses
