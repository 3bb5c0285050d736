"""`minitune data check` and `minitune data preview`."""

from __future__ import annotations

import argparse
from typing import Any

from minitune.cli.check import call_check, declare_check
from minitune.cli.parser import MODEL, shown_default
from minitune.cli.preview import call_preview, declare_preview
from minitune.config import TrainConfig, build, flat_fields


def declare_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("check", "preview"), help="check: would it hurt? preview: what is learned")
    parser.add_argument("file", help="conversations: json, jsonl, csv or parquet")
    parser.add_argument("--model", default="", help=MODEL)
    parser.add_argument("--json", action="store_true", help="check: the report; preview: an object a row, all rows")
    parser.add_argument("--html", metavar="FILE", help="write a page that opens offline")
    parser.add_argument("--max_length", "--cutoff_len", default="512", help="tokens a row at most [512]")
    parser.add_argument(
        "--overlong", default="cut", metavar="cut|drop|error", help="what happens to a longer row [cut]"
    )
    for name, (field, _) in flat_fields(TrainConfig).items():
        if name.startswith("template."):
            text = f"{field.metadata['help']} [{shown_default(field)}]"
            extra: dict[str, Any] = {"const": "minicpm", "nargs": "?"} if name == "template.name" else {}
            flags = ["--template", f"--{name}"] if name == "template.name" else [f"--{name}"]
            parser.add_argument(*flags, dest=name, default=argparse.SUPPRESS, help=text, metavar="VALUE", **extra)
    declare_check(parser)
    declare_preview(parser)


def call_data(values: dict[str, Any]) -> int:
    action, file = values.pop("action"), values.pop("file")
    own = {n: values.pop(n) for n in ("rows", "row", "packed", "step", "json", "html", "near", "fix", "fix_also")}
    config = build(TrainConfig, values | {"data": file}, "data")
    return call_preview(config, own) if action == "preview" else call_check(config, own)
