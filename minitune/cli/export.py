"""`minitune export`."""

from __future__ import annotations

import argparse
from typing import Any

from minitune.cli.parser import MODEL


def declare_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", "--model_name_or_path", required=True, help=MODEL)
    parser.add_argument("--adapter", "--adapter_name_or_path", help="merged into the weights")
    parser.add_argument("--format", choices=("hf", "minicpm"), default="hf", help="hf: what stock transformers opens")
    parser.add_argument("--output", "--output_dir", required=True, help="a new folder")
    parser.add_argument("--dtype", default="auto", help="auto (as the base is), float32, bfloat16, float16")


def call_export(values: dict[str, Any]) -> int:
    from minitune.export import export

    export(**values)
    return 0
