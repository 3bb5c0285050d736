"""`minitune data check`: its own flags and its call; `cli/data.py` declares what it shares with preview."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from minitune.config import TrainConfig, UserError


def declare_check(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("check")
    group.add_argument(
        "--eval_data", default="", metavar="FILE", help="held-out conversations: do they leak into FILE?"
    )
    group.add_argument("--near", default="auto", metavar="auto|true|false",
                       help="look for near duplicates; auto: in up to 250,000 rows [auto]")  # fmt: skip
    group.add_argument(
        "--fix", default="", metavar="OUT", help="write a mended copy, and OUT.log.jsonl, a line a change"
    )
    group.add_argument("--fix_also", default="", metavar="LIST",
                       help="mend also what takes judgement: near,conflicts,personal,markers,unreadable")  # fmt: skip


def call_check(config: TrainConfig, values: dict[str, Any]) -> int:
    """values: json, html, near, fix, fix_also. Returns 1 where training on the file would hurt."""
    from minitune.data import check, html, mend, progress, screen

    near = str(values["near"]).lower()
    near = {"1": "true", "yes": "true", "on": "true", "0": "false", "no": "false", "off": "false"}.get(near, near)
    if near not in ("auto", "true", "false"):
        raise UserError(f"--near is {values['near']!r}; it takes auto, true or false")
    also = mend.parse_also(values["fix_also"])
    if also and not values["fix"]:
        raise UserError("--fix_also needs --fix OUT, the file for the mended copy")
    if values["html"]:
        html.check_target(Path(values["html"]))
    if values["fix"]:
        mend.check_target(Path(values["fix"]), Path(config.data))
    tokenizer = hub_config = kept = None
    if config.model:
        from minitune.checkpoint import hub
        from minitune.checkpoint.embedded import rows_cache
        from minitune.checkpoint.tokenizer import load_tokenizer
        from minitune.checkpoint.weights import read_json

        base = hub.resolve(config.model)
        tokenizer, hub_config, kept = load_tokenizer(base), read_json(base / "config.json"), rows_cache()
    report = check.check(config, tokenizer, hub_config, near, progress.watch, kept)
    mended = mend.mend(config, report, Path(values["fix"]), also, progress.watch) if values["fix"] else None
    if values["html"]:
        html.write(values["html"], report.as_page())
    if values["json"]:
        print(json.dumps(report.as_json() | ({"fix": mended.as_json()} if mended else {}), ensure_ascii=False))
    else:
        screen.show(report)
    lines = [f"{values['html']}: the report as a page; it opens offline"] if values["html"] else []
    for line in [*lines, *(mended.lines() if mended else [])]:
        print(line, file=sys.stderr if values["json"] else sys.stdout)
    return int(report.hurts)
