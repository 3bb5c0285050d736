"""Whole runs in which every parameter learns with moments of 8 bits: what is refused, what is said, what is learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import log_of, with_

from minitune import TrainConfig, UserError, train

EIGHT = ("adamw_8bit", "adamw_8bit_in_backward")


@pytest.fixture(autouse=True)
def quick(undrawn: None) -> None:
    """loss.png is drawn in other tests."""


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optim": "adamw_8bit", "method": "lora"}, "optim adamw_8bit is for --method full"),
        ({"optim": "adamw_8bit_in_backward", "method": "lora"}, "is for --method full"),
        ({"optim": "adamw_8bit", "dtype": "float16"}, "use --dtype bfloat16, or --optim adamw"),
        ({"optim": "adamw_8bit_in_backward", "dtype": "float16"}, "use --dtype bfloat16"),
        ({"optim": "adamw_8bit_in_backward", "tokens_per_pack": 40}, "steps are several; raise --tokens_per_pack"),
    ],
)
def test_what_does_not_go_together_is_one_line(config: TrainConfig, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        train(with_(config, **{"method": "full", **settings}), quiet=True)
    assert "\n" not in str(caught.value)
    assert not Path(config.output).exists()


@pytest.mark.parametrize("optim", EIGHT)
def test_it_learns_what_32_bits_learn(config: TrainConfig, optim: str, capsys: pytest.CaptureFixture[str]) -> None:
    """bfloat16 weights, 12 steps: each step's loss within 3 % of AdamW's in 32 bits with float32 weights; the run says
    how it clips, and its summary what it ran as."""
    losses = {}
    for name, dtype in (("adamw", "float32"), (optim, "bfloat16")):
        out = f"{config.output}-{name}"
        train(with_(config, method="full", optim=name, dtype=dtype, output=out, max_grad_norm=0.0))
        losses[name] = [row["loss"] for row in log_of(out)]
    assert losses[optim] == pytest.approx(losses["adamw"], rel=0.03)
    assert losses[optim][-1] < 0.9 * losses[optim][0]
    said = capsys.readouterr().err
    assert ("each gradient clipped by itself" in said) == (optim == EIGHT[1])


def test_accumulated_packs_are_one_step(config: TrainConfig) -> None:
    """With a buffer, small packs give the run of large ones, nearly: sums are rounded otherwise."""
    losses = []
    for tokens in (8192, 40):
        out = f"{config.output}-{tokens}"
        train(with_(config, method="full", optim="adamw_8bit", tokens_per_pack=tokens, output=out), quiet=True)
        losses.append([row["loss"] for row in log_of(out)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


@pytest.mark.parametrize("optim", EIGHT)
def test_a_checkpoint_holds_moments_scales_and_masters(config: TrainConfig, optim: str) -> None:
    """Codes are bytes, scales one for 256 of them; a checkpoint of before this setting is AdamW's in 32 bits."""
    train(with_(config, method="full", optim=optim, dtype="bfloat16", max_steps=2), quiet=True)
    folder = Path(config.output) / "checkpoint-2"
    state = torch.load(folder / "training_state.pt", weights_only=True)
    held = state["optimizer"]
    assert (held["m"].dtype, held["v"].dtype, held["masters"].dtype) == (torch.int8, torch.uint8, torch.float32)
    assert held["m"].numel() == held["v"].numel() == 256 * held["m_scale"].numel()
    assert held["count"] == 2 and held["m"].any() and held["v"].any()
    assert json.loads((Path(config.output) / "summary.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(UserError, match=f"optim {optim}, now it is adamw"):
        train(with_(config, method="full", dtype="bfloat16", max_steps=2, resume="auto"), quiet=True)
