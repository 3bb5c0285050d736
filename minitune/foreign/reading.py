"""Settings from a file and from the command line, in whatever program's words, -> settings of ours and what was done.

A name is ours, another name of ours (`config.ALIASES`), or one that a rule of `tables` speaks of; any other is refused.
The later source wins. Two names for one setting with different values in one source are a fault. Where the names show
whose file it is, that program's defaults fill what it leaves out: a file means here what it means there.
"""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from minitune.config import ALIASES, UserError, canonical, parse_value
from minitune.foreign import tables
from minitune.foreign.rules import NoEffect, Only, Refused, Rule, Wrong, is_fine, plain, shown


@dataclass(frozen=True)
class Source:
    """Where settings were given: a file's path or "the command line", and {name as spelled: value}."""

    name: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Item:
    """One given setting; `rank` is its source's place: the higher wins."""

    spelling: str
    value: Any
    rank: int


@dataclass
class Reading:
    """`values`: settings of ours. `notes`: what was translated and what has no effect, for a person; may be empty."""

    values: dict[str, Any]
    notes: list[str]


@dataclass
class Said:
    """What was done with each name."""

    renamed: list[str] = field(default_factory=list)
    converted: list[str] = field(default_factory=list)
    defaults: list[str] = field(default_factory=list)
    same: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    moot: dict[str, list[str]] = field(default_factory=dict)
    ranks: set[int] = field(default_factory=set)


class Context:
    """The reading of one command's settings: what was given, what it became. Rules and `finish` see it."""

    def __init__(self, sources: Iterable[Source], known: dict[str, Any], command: str):
        self.sources, self.known, self.command = list(sources), known, command
        self.table = tables.TABLES[command]
        self.items: dict[str, Item] = {}
        self.given: dict[str, Item] = {}  # of ours: the item that decided
        self.values: dict[str, Any] = {}
        self.said = Said()
        for rank, source in enumerate(self.sources):
            for spelling, value in source.values.items():
                self._take(Item(spelling, value, rank))
        self.program = tables.program(self.items) if command == "train" else ""

    def _take(self, item: Item) -> None:
        name = plain_name(item.spelling)
        before = self.items.get(name)
        if before and before.rank == item.rank and before.value != item.value:
            raise self.fault(item, f"{before.spelling} and {item.spelling} are one setting with two values; keep one")
        self.items[name] = item

    def where(self, item: Item) -> str:
        return self.sources[item.rank].name

    def fault(self, item: Item, text: str) -> UserError:
        return UserError(f"{self.where(item)}: {text}")

    def raw(self, name: str, default: Any = None) -> Any:
        """Another given setting's value, in its own words."""
        value = plain(self.items[name].value) if name in self.items else None
        return default if value is None else value

    def option(self, name: str, value: str) -> bool:
        """Whether a setting of ours exists and, where it is a choice, has this value."""
        return name in self.known and (not value or value in getattr(self.known[name][1], "__args__", ()))

    def set(self, name: str, value: Any, item: Item) -> None:
        """One setting of ours, from `item`; a later source wins, a different value in the same source is a fault."""
        kind = self.known[name][1]
        if plain(value) is None and kind is not str and "none" not in getattr(kind, "__args__", ()):
            return  # nothing: the default
        parsed = parse_value(item.spelling if item.spelling in ALIASES else name, value, kind, self.where(item))
        before = self.given.get(name)
        if before and before.rank == item.rank and self.values[name] != parsed:
            one, other = (f"{i.spelling} ({shown(i.value)})" for i in (before, item))
            raise self.fault(item, f"{one} and {other} both say what {name} is; keep one")
        if before is None or before.rank <= item.rank:
            self.given[name], self.values[name] = item, parsed

    def decided(self, name: str, item: Item) -> bool:
        """Whether a later source than `item`'s has given this setting of ours."""
        return name in self.given and self.given[name].rank > item.rank

    def value(self, name: str) -> Any:
        """A setting of ours as it stands, the default where nothing was said."""
        return self.values.get(name, self.known[name][0].default)

    def fill(self, name: str, value: Any) -> None:
        """A program's default, said where it differs from ours."""
        if value != self.known[name][0].default:
            self.values[name] = value
            if not (name.startswith("lora_") and self.value("method") == "full"):
                self.said.defaults.append(f"{name} {shown(value) if value != chr(10) else 'a line break'}")

    def remark(self, text: str) -> None:
        """Something that a person should know of what was read."""
        self.said.remarks.append(text)

    def converted(self, item: Item, became: str) -> None:
        self.said.converted.append(f"{item.spelling} {shown(item.value)} → {became}")
        self.said.ranks.add(item.rank)

    def same(self, item: Item) -> None:
        self.said.same.append(f"{item.spelling} {shown(item.value)}")
        self.said.ranks.add(item.rank)

    def moot(self, item: Item, reason: str) -> None:
        self.said.moot.setdefault(reason, []).append(item.spelling)
        self.said.ranks.add(item.rank)


def plain_name(spelling: str) -> str:
    """The name with underscores, without the section that a script or a file may put around it."""
    name = spelling.strip().lstrip("-").replace("-", "_")
    head, dot, tail = name.partition(".")
    return tail if dot and head in tables.SECTIONS else name


def read(sources: Iterable[Source], known: dict[str, Any], command: str = "train") -> Reading:
    """The settings that the sources give, of those that are `known` (as `flat_fields` has them).

    UserError, one line, for what is unknown, contrary or refused.
    """
    context = Context(sources, known, command)
    refused: list[tuple[Item, Refused]] = []
    for name, item in context.items.items():
        try:
            _one(context, name, item)
        except Refused as why:
            refused.append((item, why))
    if not refused:
        for finish in tables.FINISH.get(command, ()):
            try:
                finish(context)
            except Refused as why:
                refused.append((why.args[1], why))
    if refused:
        raise _refusal(context, refused)
    return Reading(context.values, notes(context))


def _one(context: Context, name: str, item: Item) -> None:
    """What one given setting is."""
    rule = _rule(context, name)
    if name in context.known and not callable(rule):
        return context.set(name, item.value, item)
    if isinstance(rule, NoEffect):
        return context.moot(item, rule.reason)
    if isinstance(rule, Only):
        if not is_fine(item.value, rule.fine):
            raise Refused(rule.mend)
        return context.same(item)
    if rule is not None:
        became = rule(item, context)
        for ours, value in (became or {}).items():
            context.set(ours, value, item)
        if became == {} and name not in context.known:
            context.same(item)
        elif became == {ALIASES.get(name): item.value}:
            context.said.renamed.append(f"{item.spelling} → {ALIASES[name]}")
        elif became and became != {name: item.value}:
            context.converted(item, ", ".join(f"{n} {shown(v)}" for n, v in became.items()))
        return
    near = difflib.get_close_matches(name, context.table, n=1, cutoff=0.85)
    if name not in ALIASES and near:
        raise context.fault(item, f"unknown setting {item.spelling!r}; did you mean {near[0]}?")
    ours = canonical(name, context.known, context.where(item))
    context.set(ours, item.value, item)
    if ours != name:
        context.said.renamed.append(f"{item.spelling} → {ours}")


def _rule(context: Context, name: str) -> Rule | None:
    """The rule of a name, of the mapping that it is a part of, or of its family."""
    if name in context.table:
        return context.table[name]
    head = name.partition(".")[0]
    if not any(ours.startswith(f"{head}.") for ours in context.known) and head in context.table:
        return context.table[head]
    reason = next((reason for prefix, reason in tables.FAMILIES.items() if name.startswith(prefix)), None)
    return NoEffect(reason) if reason and name not in context.known else None


def _refusal(context: Context, refused: list[tuple[Item, Refused]]) -> UserError:
    item, why = refused[0]
    verdict = ":" if isinstance(why, Wrong) else " is not supported;"
    others = ", ".join(i.spelling for i, _ in refused[1:5]) + (", …" if len(refused) > 5 else "")
    more = f" (refused too: {others})" if others else ""
    return context.fault(item, f"{item.spelling}: {shown(item.value)}{verdict} {why.args[0]}{more}")


def notes(context: Context, width: int = 100) -> list[str]:
    """One line a name, in paragraphs: what it became, what stands in for what was left out, what has no effect."""
    said = context.said
    if not (said.ranks or said.defaults):
        return []
    places = " and ".join(context.sources[rank].name for rank in sorted(said.ranks)) or context.sources[0].name
    whose = f"{context.program}'s settings" if context.program else "other programs' settings"
    lines = [f"{places}: {whose}, in minitune's words (a run's run.yaml holds them all):"]
    moot = [f"{', '.join(names)} ({reason})" for reason, names in said.moot.items()]
    for head, parts in (
        ("renamed", said.renamed),
        ("converted", said.converted),
        (f"{context.program}'s defaults where nothing is said", said.defaults),
        ("what minitune does anyway", said.same),
        ("no effect here", moot),
        ("note", said.remarks),
    ):
        if parts:
            text = f"{head}: " + ("; " if head in ("no effect here", "note") else ", ").join(parts)
            lines += textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
    return lines
