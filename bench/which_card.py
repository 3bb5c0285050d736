"""The table of docs/which-card.md: cards, methods, memory and the time of three epochs of the real data.

    python bench/which_card.py [--model FOLDER] [--data ../shared/data/huanhuan.json] [--check]

Nothing is computed on a card: memory and time are the plan's (`minitune plan`). The model is MiniCPM-2B's shape, of
which config.json and the tokenizer are enough; by default a folder with both is made. --check: exit status 1 where
docs/which-card.md does not hold this table.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from train_command import CONFIG, SHARED

from minitune.config import TrainConfig
from minitune.train import across
from minitune.train.plan import methods
from minitune.train.prepare import Prepared

PAGE = Path(__file__).resolve().parents[1] / "docs" / "which-card.md"


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
        cells = [across.cell(plan) for plan in plans] if card.capability >= (7, 5) else ["not served"] * len(plans)
        lines.append(f"| {card.name} | {memory} | {' | '.join(cells)} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="")
    parser.add_argument("--data", default=str(SHARED / "data" / "huanhuan.json"))
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "golden" / "tokenizer-minicpm")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        model = arguments.model or str(folder_of(arguments.tokenizer, Path(work)))
        config = TrainConfig(model=model, data=arguments.data, output="-")
        lines = table(config, across.rows_of(config))
    print("\n".join(lines))
    return int(arguments.check and "\n".join(lines) not in PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
