"""The preview as one offline page: a token's number and id under the pointer, packs drawn to scale."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minitune.config import TrainConfig
from minitune.data import dataset
from minitune.data.html import Html, Section, page, table, tag, write
from minitune.data.preview import Row, Unit, units
from minitune.data.preview_packs import Document, PackView, Step, describe
from minitune.data.template import Template

STYLE = """
.tokens { line-height: 2.1; overflow-wrap: anywhere; }
.t { border-right: 1px solid color-mix(in srgb, var(--ink) 25%, transparent); padding: .15rem .1rem; color: var(--dim);
  white-space: nowrap; }
.t.l { color: var(--good); background: color-mix(in srgb, var(--good) 13%, transparent); }
.t.s { border: 1px solid currentColor; border-radius: .25rem; margin: 0 .1rem; font-size: .85em; }
.t sub { font-size: .65em; color: var(--dim); margin-left: .1em; }
.turn { display: flex; gap: .75rem; } .turn > .at { flex: 0 0 3rem; text-align: right; color: var(--dim);
  font-variant-numeric: tabular-nums; line-height: 2.1; }
.ribbon { display: flex; height: 1.6rem; margin: .75rem 0; border: 1px solid var(--line); }
.ribbon > i { display: block; height: 100%; background: var(--line); }
.ribbon > i.l { background: var(--good); } .ribbon > i.b { border-left: 2px solid var(--ink); }
.ribbon > i.p { background: repeating-linear-gradient(45deg, var(--line) 0 4px, transparent 4px 8px); }
"""


def write_page(
    path: str | Path,
    config: TrainConfig,
    data: dataset.Dataset,
    template: Template,
    rows: Sequence[Row],
    step: Step | None,
) -> None:
    """Writes the page of these rows, and of the packs where a step is given."""
    learned = tag("span", "learned", class_="t l")
    special = tag("span", template.end_token, class_="t l s")
    legend = tag(
        "p", tag("span", "given", class_="t"), " ", learned, " special: ", special,
        " one character of three tokens: ", tag("span", "龘", tag("sub", "×3"), class_="t l"),
        " · space ↵ newline → tab; point at a token for its number and id",
    )  # fmt: skip
    sections = [Section("", [*data.summary(config.max_length), f"template: {template.config.name}", legend])]
    sections += [_row(row, template) for row in rows]
    if step:
        sections.append(Section("A packed step", [step.heading()]))
        sections += [_pack(pack, number) for number, pack in enumerate(step.packs, 1)]
    write(path, page(f"What is learned of {Path(data.file).name}", sections, style=STYLE))


def _row(row: Row, template: Template) -> Section:
    total, learned = len(row.encoded.input_ids), row.encoded.supervised
    cut = "; cut, so no end is learned" if row.cut else ""
    turns: list[list[Unit]] = []
    for unit in units(row.encoded, template.tokenizer):
        if not turns or turns[-1][-1].learned != unit.learned:
            turns.append([])
        turns[-1].append(unit)
    lines = [
        tag("div", tag("div", turn[0].at, class_="at"), tag("div", *map(token, turn)), class_="turn") for turn in turns
    ]
    heading = f"Row {row.number}: {total} tokens, {learned} learned ({learned / total:.0%}){cut}"
    return Section(heading, [tag("div", *lines, class_="tokens card", lang="zh-CN")])


def token(unit: Unit) -> Html:
    """One unit; a newline also breaks the line."""
    numbers = f"{unit.at}" if len(unit.ids) == 1 else f"{unit.at} to {unit.at + len(unit.ids) - 1}"
    title = f"token {numbers}: id {', '.join(map(str, unit.ids))}"
    kind = "t" + " l" * unit.learned + " s" * unit.special
    inside: list[object] = [unit.text]
    if len(unit.ids) > 1:
        inside.append(tag("sub", f"×{len(unit.ids)}"))
    shown = tag("span", *inside, class_=kind, title=title)
    return Html(shown + "<br>") if "↵" in unit.text else shown


def _pack(pack: PackView, number: int) -> Section:
    rows = [
        (
            document.row,
            f"{document.start}…{document.end - 1}",
            f"{document.first}…{document.last}",
            sum(document.learned),
            tag("span", *map(token, document.head), " … " if document.elided else "", *map(token, document.tail),
                lang="zh-CN"),
        )
        for document in pack.documents
    ]  # fmt: skip
    head = ("row", "in the pack", "positions", "learned", "begins and ends")
    bounds = tag("p", "cu_seqlens: " + " ".join(map(str, pack.cu_seqlens)), class_="dim mono")
    return Section("", [describe(pack, number), _ribbon(pack), table(head, rows, (0, 1, 2, 3)), bounds])


def _ribbon(pack: PackView) -> Html:
    """The pack to scale: learned stretches coloured, a bound before each document, padding hatched."""
    parts = []
    for document in pack.documents:
        for i, (learned, length) in enumerate(_stretches(document)):
            kind = " ".join(["l"] * learned + ["b"] * (i == 0 and document.start > 0)) or None
            title = f"row {document.row}: {length} tokens {'learned' if learned else 'given'}"
            parts.append(tag("i", class_=kind, title=title, style=f"width: {length / pack.places:.4%}"))
    if pack.padding:
        parts.append(tag("i", class_="p b", title="padding", style=f"width: {pack.padding:.4%}"))
    return tag("div", *parts, class_="ribbon", role="img", **{"aria-label": "the pack, to scale"})


def _stretches(document: Document) -> list[tuple[bool, int]]:
    out: list[tuple[bool, int]] = []
    for learned in document.learned:
        if out and out[-1][0] == learned:
            out[-1] = (learned, out[-1][1] + 1)
        else:
            out.append((learned, 1))
    return out
