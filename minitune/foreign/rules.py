"""What can be said of another program's setting: it has no effect here, only some values are what we do, or it becomes
settings of ours. Whatever no rule fits is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minitune.foreign.reading import Context, Item


class Refused(Exception):
    """A value that can't be honoured; the message says what to write instead."""


class Wrong(Refused):
    """A value that would be honoured but is at fault: a file that is not there, a word that says nothing."""


@dataclass(frozen=True)
class NoEffect:
    """Says nothing of what is computed here, for this reason."""

    reason: str


@dataclass(frozen=True)
class Only:
    """Understood where the value is one of `fine`, since that is what we do; otherwise refused with `mend`."""

    fine: tuple[Any, ...]
    mend: str


# (item, context) -> settings of ours, {} where it says what we do anyway, None where all is said; may raise Refused
Becomes = Callable[["Item", "Context"], dict[str, Any] | None]
Rule = NoEffect | Only | Becomes


def no_effect(table: dict[str, str]) -> dict[str, Rule]:
    """{reason: names} -> {name: rule}"""
    return {name: NoEffect(reason) for reason, names in table.items() for name in names.split()}


def only(*rows: tuple[tuple[Any, ...], str, str]) -> dict[str, Rule]:
    """(fine values, mend, names) -> {name: rule}; nothing (null, none, empty) is always fine."""
    return {name: Only(fine, mend) for fine, mend, names in rows for name in names.split()}


def plain(value: Any) -> Any:
    """A flag's text or a YAML value as one of None, bool, number, text, list, dict; nothing in any spelling is None."""
    if isinstance(value, str):
        text = value.strip()
        if text.lower() in ("", "none", "null", "~", "[]", "{}"):
            return None
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        try:
            return float(text) if not text.lstrip("+-").isdigit() else int(text)
        except ValueError:
            return text
    return None if value in ([], {}, ()) else value


def is_fine(value: Any, fine: tuple[Any, ...]) -> bool:
    """Whether `value` is nothing or one of `fine`, whatever its case and kind of number."""
    value = plain(value)
    if value is None:
        return True
    if isinstance(value, str):
        return value.lower() in {f.lower() for f in fine if isinstance(f, str)}
    return any(value == f and isinstance(value, bool) == isinstance(f, bool) for f in fine)


def shown(value: Any) -> str:
    """A value as a person would write it, short."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "none"
    if isinstance(value, list | tuple):
        value = ",".join(shown(v) for v in value)
    text = " ".join(f"{value:g}".split() if isinstance(value, float) else str(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def words(value: Any) -> list[str]:
    """`a, b`, `a b`, or a list, as a list of texts."""
    if isinstance(value, list | tuple):
        return [str(v).strip() for v in value]
    return str(value).replace(",", " ").split()
