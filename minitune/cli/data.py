"""`minitune data check` and `minitune data preview`."""

from __future__ import annotations

import argparse
from typing import Any

from minitune.cli.parser import MODEL, shown_default
from minitune.config import TrainConfig, UserError, build, flat_fields


def declare_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("check", "preview"), help="check: would it hurt? preview: what is learned")
    parser.add_argument("file", help="conversations: json, jsonl, csv or parquet")
    parser.add_argument("--model", default="", help=MODEL)
    parser.add_argument("--json", action="store_true", help="one JSON object a row: input_ids, labels")
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="rows to show (without --json) [3]")
    parser.add_argument("--max_length", "--cutoff_len", default="512", help="tokens a row at most [512]")
    parser.add_argument(
        "--overlong", default="cut", metavar="cut|drop|error", help="what happens to a longer row [cut]"
    )
    for name, (field, _) in flat_fields(TrainConfig).items():
        if name.startswith("template."):
            text = f"{field.metadata['help']} [{shown_default(field.default)}]"
            extra: dict[str, Any] = {"const": "minicpm", "nargs": "?"} if name == "template.name" else {}
            flags = ["--template", f"--{name}"] if name == "template.name" else [f"--{name}"]
            parser.add_argument(*flags, dest=name, default=argparse.SUPPRESS, help=text, metavar="VALUE", **extra)


def call_data(values: dict[str, Any]) -> int:
    from minitune.data import preview

    action, file, rows, as_json = (values.pop(n) for n in ("action", "file", "rows", "json"))
    config = build(TrainConfig, values | {"data": file}, "data")
    if not config.model:
        if action == "preview":
            raise UserError("data preview: --model is missing (its tokenizer says what a row is)")
        return preview.check(config)
    from minitune.checkpoint import hub
    from minitune.checkpoint.tokenizer import load_tokenizer
    from minitune.checkpoint.weights import read_json

    base = hub.resolve(config.model)
    tokenizer, hub_config = load_tokenizer(base), read_json(base / "config.json")
    if action == "check":
        return preview.check(config, tokenizer, hub_config)
    return preview.show(config, tokenizer, hub_config, rows, as_json)
