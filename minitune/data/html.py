"""One HTML page in one file: opens offline, light and dark, Chinese right, nothing in it runs.

A page is made of sections, a section of parts. A part that is `Html` is markup and stands as it is; any other
text is escaped, and its control, bidirectional and zero-width characters are made visible, so what a data set or
a model says can neither break the page nor hide in it.

    body = [table(("row", "text"), [(3, "你好")]), "plain text becomes a paragraph"]
    write(path, page("Report", [Section("Rows", body)], lang="zh-CN"))
"""

from __future__ import annotations

import html as markup
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from minitune.config import UserError

# Fonts that hold Chinese on Linux, Windows, macOS and phones; none is fetched.
STYLE = """
:root { color-scheme: light dark; --ink: #1c2127; --dim: #626b76; --paper: #ffffff; --card: #f5f7f9; --line: #dde2e7;
  --main: #2563a8; --good: #1f7a45; --warn: #9a5b00; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --dim: #98a2ad; --paper: #14181c; --card: #1d2328;
  --line: #343c44; --main: #7db4f0; --good: #6fcf97; --warn: #f0b45a; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 64rem; color: var(--ink); background: var(--paper);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC",
  "PingFang SC", "Microsoft YaHei", "WenQuanYi Micro Hei", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .6rem; }
p { margin: .5rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
code, pre, .mono { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "Noto Sans Mono CJK SC", monospace;
  font-size: .9em; overflow-wrap: anywhere; white-space: pre-wrap; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .95em; }
th, td { text-align: left; vertical-align: top; padding: .4rem .75rem .4rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; }
th { color: var(--dim); font-weight: 600; }
td.number, th.number { width: 1%; text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
details { margin: .35rem 0; } summary { cursor: pointer; color: var(--dim); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .75rem 1rem;
  margin: .75rem 0; }
.dim { color: var(--dim); } .good { color: var(--good); } .warn { color: var(--warn); } .bad { color: var(--bad); }
.badge { font-weight: 600; margin-right: .6rem; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--dim); font-size: 12px; }
svg .bar { fill: var(--main); } svg .axis { stroke: var(--line); }
svg .mark { stroke: var(--warn); stroke-dasharray: 3 3; }
svg polyline { fill: none; stroke-width: 2; }
@media print { body { max-width: none; } }
""".strip()
COLOURS = ("var(--main)", "var(--warn)", "var(--good)", "var(--bad)")
# What is not seen, or changes the order of what is: C0 and C1 controls but tab and line feed, soft hyphen, zero
# width, bidirectional marks, BOM, halves of characters. Joiners stay where emoji and scripts need them.
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)


class Html(str):
    """Markup that is ready to stand in a page."""


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it; parts that are not `Html` become escaped paragraphs."""

    heading: str
    parts: Sequence[object] = field(default_factory=tuple)


def visible(text: str) -> str:
    """The text with characters that are not seen spelled as ⟨U+200B⟩."""
    return UNSEEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)


def escape(value: object) -> Html:
    """`value` as it may stand between tags or in an attribute; `Html` is returned unchanged."""
    return value if isinstance(value, Html) else Html(markup.escape(visible(str(value)), quote=True))


def tag(name: str, *children: object, **attributes: object) -> Html:
    """`<name …>children</name>`; `class_` is written class, and `view_box` viewBox."""
    spelled = {"class_": "class", "view_box": "viewBox", "text_anchor": "text-anchor"}
    inside = "".join(f' {spelled.get(k, k)}="{escape(v)}"' for k, v in attributes.items() if v is not None)
    return Html(f"<{name}{inside}>{''.join(map(escape, children))}</{name}>")


def table(head: Sequence[object], rows: Iterable[Sequence[object]], numbers: Sequence[int] = ()) -> Html:
    """A table; `numbers` are the columns (from 0) that are set to the right."""
    kind = {i: "number" for i in numbers}

    def line(cell: str, row: Sequence[object]) -> Html:
        return tag("tr", *(tag(cell, value, class_=kind.get(i)) for i, value in enumerate(row)))

    body = tag("tbody", *(line("td", row) for row in rows))
    return tag("div", tag("table", tag("thead", line("th", head)), body), class_="wide")


def bars(edges: Sequence[float], counts: Sequence[int], label: str, marks: Mapping[str, float] | None = None) -> Html:
    """A histogram as inline SVG: `counts[i]` lies in edges[i]…edges[i + 1]; `marks` are named places on the x axis."""
    width, height, left, floor = 720, 220, 56, 180
    low, high = edges[0], max(edges[-1], edges[0] + 1e-9)
    most = max(max(counts, default=0), 1)

    def at(x: float) -> float:
        return left + (min(max(x, low), high) - low) / (high - low) * (width - left - 16)

    out = []
    for start, end, count in zip(edges[:-1], edges[1:], counts, strict=True):
        tall = count / most * (floor - 24)
        title = tag("title", f"{start:g}…{end:g}: {count:,}")
        if count:
            wide = max(at(end) - at(start) - 1, 1)
            out.append(tag("rect", title, class_="bar", x=f"{at(start):.1f}", y=f"{floor - max(tall, 1):.1f}",
                           width=f"{wide:.1f}", height=f"{max(tall, 1):.1f}"))  # fmt: skip
    for i, (name, x) in enumerate((marks or {}).items()):
        line = {"x1": f"{at(x):.1f}", "x2": f"{at(x):.1f}", "y1": 8, "y2": floor}
        near_end = at(x) > width - 110
        out.append(tag("line", class_="mark", **line))
        out.append(tag("text", f"{name} {x:g}", x=f"{at(x) + (-4 if near_end else 4):.1f}", y=16 + 14 * (i % 4),
                       text_anchor="end" if near_end else None))  # fmt: skip
    out.append(tag("line", class_="axis", x1=left, x2=width - 16, y1=floor, y2=floor))
    out.append(tag("text", f"{most:,}", x=left - 6, y=30, text_anchor="end"))
    for i in range(5):
        x = low + (high - low) * i / 4
        out.append(tag("text", f"{x:,.0f}", x=f"{at(x):.1f}", y=floor + 16, text_anchor="end" if i == 4 else None))
    out.append(tag("text", label, x=(left + width) / 2, y=height - 6, text_anchor="middle"))
    return tag("svg", *out, view_box=f"0 0 {width} {height}", role="img", **{"aria-label": label})


def lines(series: Mapping[str, Sequence[tuple[float, float]]], label: str) -> Html:
    """Curves as inline SVG: name -> points (x, y); `label` names the x axis."""
    width, height, left, floor, top = 720, 280, 64, 232, 28
    points = [p for curve in series.values() for p in curve] or [(0.0, 0.0)]
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*points, strict=True))
    x_span, y_span = (x1 - x0) or 1, (y1 - y0) or 1
    out = [tag("line", class_="axis", x1=left, x2=width - 16, y1=floor, y2=floor)]
    for i, (name, curve) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        placed = (
            f"{left + (x - x0) / x_span * (width - left - 16):.1f},{floor - (y - y0) / y_span * (floor - top):.1f}"
            for x, y in curve
        )
        out.append(tag("polyline", points=" ".join(placed), style=f"stroke: {colour}"))
        out.append(tag("text", name, x=left + 8 + i * 160, y=16, style=f"fill: {colour}"))
    for part in range(5):
        x, y = x0 + x_span * part / 4, y0 + y_span * part / 4
        right = left + part / 4 * (width - left - 16)
        out.append(tag("text", f"{x:g}", x=f"{right:.1f}", y=floor + 16, text_anchor="end" if part == 4 else None))
        out.append(
            tag("text", f"{y:.4g}", x=left - 6, y=f"{floor - part / 4 * (floor - top) + 4:.1f}", text_anchor="end")
        )
    out.append(tag("text", label, x=(left + width) / 2, y=height - 8, text_anchor="middle"))
    return tag("svg", *out, view_box=f"0 0 {width} {height}", role="img", **{"aria-label": label})


def page(title: str, sections: Iterable[Section], lang: str = "en", style: str = "") -> str:
    """The whole document. lang: BCP 47 (`en`, `zh-CN`), it chooses the glyphs of shared characters; style: more CSS.

    The page asks for nothing outside itself and its Content-Security-Policy forbids scripts.
    """
    body = [tag("h1", title)]
    for section in sections:
        parts = (part if isinstance(part, Html) else tag("p", part) for part in section.parts)
        body.append(tag("section", *([tag("h2", section.heading)] if section.heading else []), *parts))
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        f'<!doctype html>\n<html lang="{escape(lang)}">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE}\n{style}\n</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def write(path: str | Path, document: str) -> None:
    """Writes the page as UTF-8, whole or not at all; a page that is there already is replaced."""
    with writing(Path(path)) as file:
        file.write(document)


def check_target(path: Path) -> None:
    """Refuses a path where no file can be written, before the work is done."""
    if path.is_dir():
        raise UserError(f"{path}: a folder; name a file")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}")


@contextmanager
def writing(path: Path) -> Iterator[TextIO]:
    """A UTF-8 text file that appears under its name when the block ends well, and not at all otherwise."""
    check_target(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8", newline="") as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
