"""Plans as a person sees them: a table of parts and bars in a terminal, a picture, plain values for --json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from minitune.train import cards, speed
from minitune.train.cards import Card
from minitune.train.memory import GIB, Parts
from minitune.train.plan import Plan

NAMES = [f.name for f in fields(Parts)]
GLYPHS = dict(zip(NAMES, "█▓▒░▞·▚", strict=True))  # told apart without colours too
STYLES = dict(zip(NAMES, ("blue", "magenta", "red", "green", "yellow", "white", "cyan"), strict=True))
COLOURS = dict(zip(NAMES, ("#1f4e89", "#7b4b94", "#c8553d", "#588157", "#e9c46a", "#8d99ae", "#457b9d"), strict=True))


@dataclass(frozen=True)
class Sheet:
    """What plans are of. where: the card's name. mends: what to type, by method, where a plan does not fit."""

    title: str
    where: str
    plans: Sequence[Plan]
    mends: dict[str, str]
    advised: str
    measured: bool = False  # whether the card is this machine's

    @property
    def room(self) -> int:
        return self.plans[0].room or 0


def gib(value: float) -> str:
    return f"{value / GIB:.2f}" if value < 10 * GIB else f"{value / GIB:.1f}"


def how(plan: Plan) -> str:
    """What was chosen."""
    text = cards.describe(plan.choice, plan.method, plan.layers)
    return f"{text}, packs of {plan.walk.load.tokens:,} tokens"


def when(plan: Plan) -> str:
    """Its time, as far as the card is known."""
    if plan.seconds is None or plan.run_seconds is None:
        return "time not known for this card"
    return f"{speed.seconds_said(plan.seconds)} a step, {speed.seconds_said(plan.run_seconds)} in all"


def bar(plan: Plan, width: int, full: int) -> list[tuple[str, str]]:
    """(characters, style) of a bar of `width` columns that stand for `full` bytes; each part ends where the sum of all
    parts up to it does."""
    out, at, total = [], 0, 0
    for name in NAMES:
        total += getattr(plan.parts, name)
        end = min(width, round(width * total / full))
        out.append((GLYPHS[name] * (end - at), STYLES[name]))
        at = max(at, end)
    return [*out, (" " * (width - at), "")]


def cell(plan: Plan) -> str:
    """A plan in a table's cell."""
    if not plan.fits:
        return "–"
    kept = "" if plan.choice.whole >= plan.layers else ", recomputed"
    name = f" {plan.choice.optim}" if plan.method == "full" else ""
    time = "" if plan.run_seconds is None else f", {speed.seconds_said(plan.run_seconds)}"
    return f"{plan.parts.total / GIB:.1f} GiB{name}{kept}{time}"


def show_cards(found: Sequence[tuple[Card, list[Plan]]]) -> None:
    """Where there is no card here and none was named: which cards would do, as wide as the terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, emoji=False)
    console.print("no card here; what others would do, predicted (one by itself: --card NAME):")
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("card", no_wrap=True)
    table.add_column("GB", justify="right", no_wrap=True)
    for plan in found[0][1]:
        table.add_column(plan.method, overflow="fold")
    for card, plans in found:
        if card.served:
            table.add_row(card.name, f"{card.memory:g}", *map(cell, plans))
    console.print(table)
    if not any(plan.fits for _, plans in found for plan in plans):
        console.print("nothing of this fits any of them: raise --memory, or take a smaller --model")


def show(sheet: Sheet, console: Any = None) -> None:
    """Prints it, as wide as the terminal, 110 columns at most."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console(highlight=False, emoji=False)
    width = min(console.width, 110)
    console.print(Text(sheet.title, "bold", overflow="fold"))
    console.print(Text(f"{sheet.where}: {gib(sheet.room)} GiB for a run, the driver's part included", "dim"))
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("GiB", style="bold")
    for plan in sheet.plans:
        table.add_column(plan.method, justify="right")
    for name in NAMES:
        values = [gib(getattr(plan.parts, name)) for plan in sheet.plans]
        table.add_row(Text.assemble((GLYPHS[name] * 2, STYLES[name]), f" {name}"), *values)
    table.add_row("   reserved", *(gib(plan.parts.reserved) for plan in sheet.plans), style="dim")
    table.add_row("   in all", *(gib(plan.parts.total) for plan in sheet.plans), style="bold")
    console.print(table)
    full = max(sheet.room, *(plan.parts.total for plan in sheet.plans))
    room = max(20, width - 30)
    edge = round(room * sheet.room / full)
    for plan in sheet.plans:
        sign = ("✓ fits", "bold green") if plan.fits else ("✗ does not fit", "bold red")
        line = Text(f"{plan.method:<6}▕")
        for characters, style in bar(plan, room, full):
            line.append(characters, style)
        if not plan.fits and 0 < edge < room:
            line.stylize("on red", 7 + edge)
        console.print(line + Text.assemble("▏ ", sign), soft_wrap=True)
        note = sheet.mends.get(plan.method, "")
        text = f"{how(plan)}; {when(plan)}" if plan.fits else note
        console.print(Text(f"       {text}", "dim", overflow="fold"))
    console.print(Text(sheet.advised, "bold"))
    known = "predicted with the shares of an H100's measured steps" if sheet.plans[0].seconds is not None else ""
    if known:
        console.print(Text(f"times are {known}; `minitune train` says the true one after its first steps", "dim"))


def values(sheet: Sheet, card: Card | None) -> dict[str, Any]:
    """For --json."""
    return {
        "title": sheet.title,
        "card": sheet.where,
        "known_card": card.name if card else None,
        "room_gib": round(sheet.room / GIB, 3),
        "advised": sheet.advised,
        "plans": [values_of(plan, sheet.mends.get(plan.method, "")) for plan in sheet.plans],
    }


def values_of(plan: Plan, mend: str = "") -> dict[str, Any]:
    """One plan as plain values."""
    return {
        "method": plan.method,
        "fits": plan.fits,
        "mend": mend,
        "gib": {name: round(getattr(plan.parts, name) / GIB, 4) for name in NAMES},
        "reserved_gib": round(plan.parts.reserved / GIB, 3),
        "total_gib": round(plan.parts.total / GIB, 3),
        "optim": plan.choice.optim,
        "whole_layers": plan.choice.whole,
        "layers": plan.layers,
        "tokens_per_pack": plan.choice.pack,
        "steps": plan.walk.total,
        "step_seconds": plan.seconds,
        "run_seconds": plan.run_seconds,
    }


def picture(path: Path, sheet: Sheet) -> None:
    """The bars as a PNG, in place of an earlier one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from minitune.train.picture import fonts_for, save

    figure, axes = plt.subplots(figsize=(8, 1.4 + 0.6 * len(sheet.plans)), dpi=120, layout="constrained")
    names = [plan.method for plan in sheet.plans]
    left = [0.0] * len(names)
    for part in NAMES:
        sizes = [getattr(plan.parts, part) / GIB for plan in sheet.plans]
        axes.barh(names, sizes, left=left, color=COLOURS[part], label=part, height=0.6)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    axes.axvline(sheet.room / GIB, color="black", linewidth=1, linestyle="--")
    axes.invert_yaxis()
    axes.set(xlabel="GiB, as the driver counts")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, ncols=4, fontsize=8, loc="outside lower center")
    if families := fonts_for(title := f"{sheet.title}\n{sheet.where}"):
        axes.set_title(title, fontfamily=families, fontsize=10, parse_math=False)
    save(figure, path)
