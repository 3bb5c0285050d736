"""`minitune demo` and `minitune download`: how one begins."""

from __future__ import annotations

import argparse
from typing import Any

from minitune.cli.parser import MODEL


def declare_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", default="minitune-demo", help="the demo's folder [minitune-demo]")


def call_demo(values: dict[str, Any]) -> int:
    from minitune.demo.tour import tour

    return tour(values["output"])


def declare_download(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=MODEL)
    parser.add_argument("--source", choices=("modelscope", "huggingface"), default="modelscope", help="asked first")
    parser.add_argument("--revision", help="a branch, tag or commit")
    parser.add_argument("--cache_dir", help="where the hub's files are kept")


def call_download(values: dict[str, Any]) -> int:
    from minitune.checkpoint.hub import download

    name = values.pop("model")
    download(name, **values)
    return 0
