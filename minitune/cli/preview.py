"""`minitune data preview`: its own flags and its call; `cli/data.py` declares what it shares with check."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from minitune.config import TrainConfig, UserError, flat_fields

# Settings that decide how rows share a step.
PACKING = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "tokens_per_step",
    "tokens_per_pack",
    "eval_fraction",
    "seed",
    "device",
)


def declare_preview(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("preview")
    group.add_argument("--rows", type=int, default=3, metavar="N", help="the first N rows [3]")
    group.add_argument("--row", type=int, action="append", default=[], metavar="N", help="this row; can be repeated")
    group.add_argument("--packed", action="store_true", help="which rows share a step's packs, and where they begin")
    group.add_argument("--step", type=int, default=1, metavar="N", help="the step that --packed shows [1]")
    fields = flat_fields(TrainConfig)
    for name in PACKING:
        group.add_argument(f"--{name}", default=argparse.SUPPRESS, metavar=name.rpartition("_")[2].upper(),
                           help=f"for --packed: {fields[name][0].metadata['help']}")  # fmt: skip


def call_preview(config: TrainConfig, values: dict[str, Any]) -> int:
    """values: rows, row, packed, step, json, html. Raises UserError, one line."""
    if not config.model:
        raise UserError("data preview: --model is missing (its tokenizer says what a row is)")
    if values["rows"] < 1:
        raise UserError(f"--rows is {values['rows']}; it is at least 1")
    from minitune.checkpoint import hub
    from minitune.checkpoint.embedded import rows_cache
    from minitune.checkpoint.tokenizer import load_tokenizer
    from minitune.checkpoint.weights import read_json
    from minitune.data import preview, progress

    base = hub.resolve(config.model)
    tokenizer = load_tokenizer(base)

    def packed(data: Any) -> Any:
        """The step as training makes it, of the rows that training learns from."""
        from minitune.checkpoint.weights import choose_device
        from minitune.data import dataset, preview_packs
        from minitune.train.checks import check_settings
        from minitune.train.steps import make_loader

        check_settings(dataclasses.replace(config, output="-"))
        learn = dataset.split(data, config.eval_fraction, config.seed)[0] if config.eval_fraction else data.rows
        loader = make_loader(config, learn, choose_device(config.device))
        loader.pin = False  # nothing is computed here
        return preview_packs.view(loader, values["step"], learn.numbers.tolist(), tokenizer)

    return preview.show(
        config,
        tokenizer,
        read_json(base / "config.json"),
        values["rows"],
        values["json"],
        numbers=values["row"],
        html=values.get("html") or "",
        packed=packed if values["packed"] else None,
        kept=rows_cache(),
        watch=progress.watch,
    )
