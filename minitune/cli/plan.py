"""`minitune plan`: will it fit, and how long will it take; nothing is loaded."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from minitune.cli.parser import accept, declare_settings, translated
from minitune.config import TrainConfig, UserError, build, flat_fields


def declare_plan(parser: argparse.ArgumentParser) -> None:
    from minitune.foreign import tables

    parser.usage = "%(prog)s --model MODEL --data FILE [--method lora|qlora|full] [--card NAME] [settings]"
    group = parser.add_argument_group("plan")
    group.add_argument("--card", default="", metavar="NAME", help="a card by name, such as 4090 [the one here]")
    group.add_argument("--json", action="store_true", help="the plan as JSON")
    group.add_argument("--png", default="", metavar="FILE", help="the bars as a picture")
    declare_settings(parser, TrainConfig, config=True, hidden=("output", "resume"))
    accept(parser, [*tables.TRAIN])


def call_plan(values: dict[str, Any]) -> int:
    """Returns 1 where nothing of what was asked fits."""
    own = {name: values.pop(name) for name in ("card", "json", "png")}
    given = translated(values, flat_fields(TrainConfig), "train")
    config = build(TrainConfig, {"output": "-", **given}, "settings")
    from minitune.train.checks import check_settings

    check_settings(config)
    from minitune.train import across, plan_view

    where = across.Where.of(config, own["card"])
    if where is None:
        if own["png"]:
            raise UserError("--png draws the bars of one card, and this machine has none; name one: --card 4090")
        found = across.all_cards(config, across.rows_of(config), "method" in given)
        if own["json"]:
            print(json.dumps(across.cards_values(found)))
        else:
            plan_view.show_cards(found)
        return int(not any(plan.fits for _, plans in found for plan in plans))
    sheet = across.sheet(config, where, "method" in given)
    if own["png"]:
        plan_view.picture(Path(own["png"]), sheet)
    if own["json"]:
        print(json.dumps(plan_view.values(sheet, where.card), ensure_ascii=False))
    else:
        plan_view.show(sheet)
    if own["png"]:
        print(f"{own['png']}: the bars as a picture", file=sys.stderr)
    return int(not any(plan.fits for plan in sheet.plans))
