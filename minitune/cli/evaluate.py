"""`minitune evaluate`."""

from __future__ import annotations

import argparse
from typing import Any

from minitune.cli.parser import declare_settings
from minitune.config import build
from minitune.evaluate.settings import EvaluateConfig


def declare_evaluate(parser: argparse.ArgumentParser) -> None:
    declare_settings(parser, EvaluateConfig)


def call_evaluate(values: dict[str, Any]) -> int:
    config = build(EvaluateConfig, values, "evaluate")
    from minitune.evaluate import page
    from minitune.evaluate.run import evaluate

    result = evaluate(config)
    if config.output:
        page.write_folder(config.output, result)
    if config.html:
        page.html.write(config.html, page.page(result))
    if config.json:
        print(page.dumps(result))
        return 0
    from minitune.evaluate.text import show

    show(result, config.show)
    for path in (config.html, config.output):
        if path:
            print(f"written: {path}")
    return 0
