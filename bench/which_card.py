"""The table of docs/which-card.md: cards, methods, memory and the time of three epochs of the real data.

    python bench/which_card.py [--model FOLDER] [--data ../shared/data/huanhuan.json] [--write]

Nothing is computed on a card: memory and time are the plan's (`minitune plan`). The model is MiniCPM-2B's shape, of
which config.json and the tokenizer are enough; by default a folder with both is made. --write: puts the table into both
languages' pages.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
from pathlib import Path

from train_command import CONFIG, SHARED

from minitune.config import TrainConfig
from minitune.train import across, plan_view
from minitune.train.plan import methods
from minitune.train.prepare import Prepared

PAGES = sorted((Path(__file__).resolve().parents[1] / "docs").glob("which-card*.md"))


def folder_of(tokenizer: Path, into: Path) -> Path:
    for file in tokenizer.iterdir():
        shutil.copy(file, into / file.name)
    (into / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return into


def table(config: TrainConfig, ready: Prepared) -> list[str]:
    """Lines of Markdown."""
    names = [f"`{name}`" for name in methods()]
    lines = [f"| card | memory | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}"]
    for card, plans in across.all_cards(config, ready):
        memory = f"{card.memory:g} GB"
        cells = [plan_view.cell(plan) for plan in plans] if card.served else ["not served"] * len(plans)
        lines.append(f"| {card.name} | {memory} | {' | '.join(cells)} |")
    return lines


def write(lines: list[str]) -> None:
    """The first table of each page becomes this one."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        old = re.search(r"(?:^\|.*\|$\n)+", text, re.M)
        assert old is not None, page
        page.write_text(text[: old.start()] + "\n".join(lines) + "\n" + text[old.end() :], encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="")
    parser.add_argument("--data", default=str(SHARED / "data" / "huanhuan.json"))
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "golden" / "tokenizer-minicpm")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        model = arguments.model or str(folder_of(arguments.tokenizer, Path(work)))
        config = TrainConfig(model=model, data=arguments.data, output="-")
        lines = table(config, across.rows_of(config))
    print("\n".join(lines))
    if arguments.write:
        write(lines)


if __name__ == "__main__":
    main()
