"""`minitune train`."""

from __future__ import annotations

import argparse
from typing import Any

from minitune.cli.parser import declare_settings, settings_of
from minitune.config import TrainConfig


def declare_train(parser: argparse.ArgumentParser) -> None:
    declare_settings(parser, TrainConfig)


def call_train(values: dict[str, Any]) -> int:
    config = settings_of(values, TrainConfig)
    from minitune.train.run import train

    summary = train(config)
    loss = "none" if summary["loss"] is None else f"{summary['loss']:.4f}"
    held = "" if summary["eval_loss"] is None else f", held out {summary['eval_loss']:.4f}"
    print(
        f"done: {summary['steps']} steps in {summary['seconds']:.0f} s, loss {loss}{held}, "
        f"peak {summary['peak_memory_gib']:.1f} GiB -> {config.output}"
    )
    adapter = f" --adapter {config.output}" if config.method != "full" else ""
    model = config.output if config.method == "full" else config.model
    print(f"talk to it: minitune chat --model {model}{adapter}")
    return 0
