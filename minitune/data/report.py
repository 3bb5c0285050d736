"""What a person should know of the data before training on it: the findings and the lengths, for a program or a page.

`screen` shows the same in a terminal.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from minitune.data.findings import KINDS, Finding, Marks
from minitune.data.html import Html, Section, bars, page, table, tag

SEVERITIES = ("error", "warning", "note")
COLOURS = {"error": "bad", "warning": "warn", "note": "dim"}


@dataclass(frozen=True)
class Lengths:
    """The lengths of rows or of answers. `values`: an array, one each; unit: tokens or characters."""

    of: str
    unit: str
    values: Any

    def summary(self) -> dict[str, float]:
        """mean, median, p90, p99, longest and total."""
        import numpy as np

        if not len(self.values):
            return dict.fromkeys(("mean", "p50", "p90", "p99", "longest", "total"), 0)
        p50, p90, p99 = (int(v) for v in np.percentile(self.values, (50, 90, 99), method="inverted_cdf"))
        mean = round(float(self.values.mean()), 1)
        return {"mean": mean, "p50": p50, "p90": p90, "p99": p99, "longest": int(self.values.max()),
                "total": int(self.values.sum())}  # fmt: skip

    def histogram(self, most: int = 40) -> tuple[list[int], list[int]]:
        """(edges, counts) of at most `most` equal bins; the last bin also holds the few far longer ones."""
        import numpy as np

        if not len(self.values):
            return [0, 1], [0]
        longest = int(self.values.max())
        end = min(longest, max(1, int(1.25 * np.percentile(self.values, 99.5))))
        width = max(1, -(-(end + 1) // most))
        bins = -(-(end + 1) // width)
        counts = np.bincount(np.minimum(self.values // width, bins - 1).astype(np.int64), minlength=bins)
        return [i * width for i in range(bins + 1)], [int(c) for c in counts]


@dataclass
class Report:
    """What `data check` found.

    readable: rows that can be learned from. unit: what a number counts, `row` or `line`. counts: a few totals.
    For `mend`: held, the rows of the held-out file as hashes of this process; near, the numbers of near duplicates;
    marks, the template's.
    """

    file: str
    form: str
    kind: str
    unit: str
    readable: int
    lengths: list[Lengths]
    findings: list[Finding]
    notes: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    model: str = ""
    template: str = ""
    max_length: int = 0
    held: frozenset[int] = frozenset()
    near: frozenset[int] = frozenset()
    marks: Marks | None = None

    def __post_init__(self) -> None:
        self.add(())

    def add(self, findings: Iterable[Finding]) -> None:
        """More findings; they stay sorted, the worst first."""
        self.findings.extend(findings)
        order = list(KINDS)
        self.findings.sort(key=lambda f: (SEVERITIES.index(f.severity), order.index(f.kind)))

    def count(self, severity: str) -> int:
        return sum(finding.severity == severity for finding in self.findings)

    @property
    def hurts(self) -> bool:
        return any(finding.severity == "error" for finding in self.findings)

    def verdict(self) -> str:
        """One line: whether training on the file would hurt."""
        errors, warnings = self.count("error"), self.count("warning")
        looks = f"{warnings} thing{'s' * (warnings != 1)} to look at" if warnings else ""
        if errors:
            things = f"would hurt: {errors} thing{'s' * (errors != 1)} to mend"
            return f"{things}, {looks}" if looks else things
        return f"nothing here would hurt; {looks}" if looks else "nothing here would hurt"

    def facts(self) -> list[str]:
        """The totals, and what tokens are counted with, a line each."""
        totals = " · ".join(f"{count:,} {what}" for what, count in self.counts.items() if count)
        return [totals, *([f"tokens of {self.model}, template {self.template}"] if self.model else [])]

    def as_json(self) -> dict[str, Any]:
        """Everything, all row numbers included."""
        lengths = {}
        for each in self.lengths:
            edges, counts = each.histogram()
            lengths[each.of] = each.summary() | {"histogram": {"edges": edges, "counts": counts}}
        return {
            "file": self.file,
            "form": self.form,
            "kind": self.kind,
            "rows": self.readable,
            "counts": self.counts,
            "hurts": self.hurts,
            "verdict": self.verdict(),
            "model": self.model or None,
            "template": self.template or None,
            "max_length": self.max_length or None,
            "unit": self.lengths[0].unit,
            "lengths": lengths,
            "findings": [
                {
                    "kind": f.kind,
                    "severity": f.severity,
                    "count": f.count,
                    "what": f.what(self.unit),
                    "mend": f.mend(),
                    "rows": list(f.rows),
                    **({"of": list(f.of)} if len(f.of) else {}),
                    "examples": [{"row": row, "text": text} for row, text in f.examples],
                }
                for f in self.findings
            ],
            "notes": self.notes,
        }

    def as_page(self) -> str:
        """The same as one HTML page."""
        colour = "bad" if self.hurts else "good"
        head = [tag("p", tag("strong", self.verdict(), class_=colour)), "\n".join([*self.notes, *self.facts()])]
        sections = [Section("", head)]
        for each in self.lengths:
            sections.append(Section(f"{each.unit.capitalize()} {each.of}", list(self._picture(each))))
        for severity, heading in zip(SEVERITIES, ("Would hurt", "Worth a look", "Good to know"), strict=True):
            found = [self._card(f) for f in self.findings if f.severity == severity]
            if found:
                sections.append(Section(heading, found))
        return page(f"Data check: {self.file}", sections, lang="zh-CN" if self._chinese() else "en")

    def _picture(self, each: Lengths) -> list[Html]:
        s = each.summary()
        edges, counts = each.histogram(60)
        marks = {"median": s["p50"], "p90": s["p90"], "p99": s["p99"]}
        if each.unit == "tokens" and each.of == "a row" and self.max_length <= edges[-1]:
            marks["max_length"] = self.max_length
        heads = ("mean", "median", "p90", "p99", "longest", "total")
        row = [f"{s['mean']:,.1f}", *(f"{s[k]:,}" for k in ("p50", "p90", "p99", "longest", "total"))]
        label = f"{each.unit} {each.of}"
        if s["longest"] >= edges[-1]:
            label += f"; the last bar is {edges[-2]:,} and more"
        return [bars(edges, counts, label, marks), table(heads, [row], range(6))]

    def _card(self, f: Finding) -> Html:
        what = tag("div", tag("span", f.severity, class_=f"badge {COLOURS[f.severity]}"), f.what(self.unit))
        parts: list[object] = [what, tag("div", f.mend(), class_="dim")]
        if f.examples:
            parts.append(table((f.unit or self.unit, "text"), f.examples, (0,)))
        unit = f.unit or self.unit
        if len(f.rows) > 12:
            numbers = f"{', '.join(map(str, f.rows[:2000]))}{', …' if len(f.rows) > 2000 else ''}"
            parts.append(
                tag("details", tag("summary", f"all {len(f.rows):,} {unit}s"), tag("p", numbers, class_="mono"))
            )
        elif len(f.rows) > len(f.examples):
            parts.append(tag("div", some(f.rows, unit, 12), class_="dim"))
        return tag("div", *parts, class_="card")

    def _chinese(self) -> bool:
        return any("\u4e00" <= c <= "\u9fff" for f in self.findings for _, text in f.examples for c in text)


def some(numbers: Sequence[int], unit: str = "row", most: int = 6) -> str:
    """The first few row numbers, for a person."""
    shown = ", ".join(map(str, numbers[:most]))
    return f"{unit} {shown}" if len(numbers) == 1 else f"{unit}s {shown}{', …' if len(numbers) > most else ''}"
