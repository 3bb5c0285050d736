"""The result as one offline page, and as a folder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from minitune.checkpoint.folder import write_text
from minitune.data import html
from minitune.data.html import Html, Section, tag
from minitune.evaluate import lines

STYLE = """
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: .75rem; }
.pair > div { background: var(--paper); border: 1px solid var(--line); border-radius: .35rem; padding: .5rem .75rem; }
.pair h3, .label { font-size: .8em; margin: 0; color: var(--dim); font-weight: 600; }
"""


def page(result: dict[str, Any]) -> str:
    """The document."""
    sides = lines.names(result)
    models = [f"{name}: {side_label(result['sides'][name])}" for name in sides]
    rows = [(what, *values) for what, values in lines.table(result)]
    numbers = html.table(("", *sides), rows, range(1, len(sides) + 1))
    sections = [Section("", [*models, f"computed in {result['dtype']} on {result['device']}"])]
    sections.append(Section("Numbers", [numbers, *lines.remarks(result)]))
    if "held_out" in result:
        sections.append(_losses(result["held_out"], sides))
    said = result.get("answers", {}).get("rows", [])
    if said:
        several = lines.several_files(result)
        cards = [_answers(row, sides, lines.row_name(row, several)) for row in said]
        sections.append(Section("Answers side by side", cards))
    return html.page("How good is it?", sections, style=STYLE)


def side_label(side: dict[str, Any]) -> str:
    return f"{side['model']} + {side['adapter']}" if side["adapter"] else side["model"]


def _losses(held: dict[str, Any], sides: list[str]) -> Section:
    """How the rows' losses lie, and every row in a list that unfolds."""
    parts: list[object] = []
    values = {side: [row["loss"] for row in held[side]["rows"]] for side in sides}
    high = 4.0 * max(1, math.ceil(max(map(max, values.values())) / 4))  # whole numbers at the axis
    edges = [high * i / 24 for i in range(25)]
    for side in sides:
        counts = [0] * 24
        for value in values[side]:
            counts[min(23, int(value / high * 24))] += 1
        marks = {"mean": round(held[side]["loss"], 3)}
        parts += [tag("p", side, class_="label"), html.bars(edges, counts, "loss of a row, nats a token", marks)]
    rows = zip(*(held[side]["rows"] for side in sides), strict=True)
    several = len(held["files"]) > 1
    listed = [(lines.row_name(of[0], several), of[0]["tokens"], *(f"{one['loss']:.4f}" for one in of)) for of in rows]
    table = html.table(("row", "tokens", *sides), listed, range(1, 2 + len(sides)))
    parts.append(tag("details", tag("summary", f"all {len(listed):,} rows"), table))
    return Section("Held-out rows", parts)


def _answers(row: dict[str, Any], sides: list[str], name: str) -> Html:
    """A card: the question, what was wanted, and the answers beside each other."""
    turns = [(m["role"], m["content"].strip()) for m in row["messages"][:-1]]
    turns += [(name, row["messages"][-1]["content"].strip()), ("wanted", row["wanted"])]
    above = [tag("p", tag("span", name, class_="label"), "\n", text) for name, text in turns]
    said = []
    for side in sides:
        one = row[side]
        marks = [tag("p", mark, class_="warn") for mark in lines.marks(one)]
        said.append(tag("div", tag("h3", side), tag("p", one["text"].strip()), *marks))
    return tag("div", *above, tag("div", *said, class_="pair"), class_="card", lang="zh-CN")


def dumps(value: Any, indent: int | None = None) -> str:
    """JSON that any program reads: what is not finite is null."""
    return json.dumps(finite(value), ensure_ascii=False, indent=indent, allow_nan=False)


def finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_folder(folder: str, result: dict[str, Any]) -> None:
    """evaluation.json (all but the answers), answers.jsonl (a row a line), report.html; each whole or not at all."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    said = result.get("answers", {})
    rows = said.get("rows", [])
    short = result | ({"answers": {k: v for k, v in said.items() if k != "rows"}} if said else {})
    write_text(place / "answers.jsonl", "".join(dumps(row) + "\n" for row in rows))
    write_text(place / "report.html", page(result))
    write_text(place / "evaluation.json", dumps(short, indent=2) + "\n")
