"""How flags are declared and read: argparse from dataclasses, one line an error."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn, get_args, get_origin

from minitune.config import ALIASES, UserError, build, canonical, flat_fields, read_yaml

MODEL = "a folder, a hub name (openbmb/MiniCPM-2B-sft-bf16), or smollm2, the embedded default"


class Parser(argparse.ArgumentParser):
    """argparse with one line an error, exit code 2, and hyphens or underscores as the user likes."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `{self.prog} --help`)")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = {o.lstrip("-"): o for a in self._actions for o in a.option_strings}
            if unknown[0].startswith("--"):
                canonical(unknown[0].split("=")[0], known, self.prog.removeprefix("minitune "))
            self.error(f"{unknown[0]!r} is one word too many")
        return parsed


class Help(argparse.HelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=42, width=110)


def hyphens(argument: str) -> str:
    """--learning-rate -> --learning_rate; values are left alone."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}"


def declare_settings(parser: argparse.ArgumentParser, cls: type) -> None:
    """A flag for each setting of a dataclass, grouped, with its default and its reason."""
    spellings: dict[str, list[str]] = {}
    for alias, name in ALIASES.items():
        spellings.setdefault(name, []).append(alias)
    groups: dict[str, Any] = {}
    for name, (field, kind) in flat_fields(cls).items():
        title = field.metadata.get("group") or name.partition(".")[0]
        group = groups.setdefault(title, parser.add_argument_group(title))
        shown = (
            ""
            if field.metadata.get("required") or field.default in ("", None)
            else f" [{shown_default(field.default)}]"
        )
        options = get_args(kind) if get_origin(kind) not in (None, tuple) else ()
        words = [str(o) for o in options if isinstance(o, str)]
        metavar = "|".join(words) if words else name.rpartition(".")[2].upper()
        extra: dict[str, Any] = {"nargs": "?", "const": "auto"} if name == "resume" else {}
        if kind is bool:
            extra = {"nargs": "?", "const": "true"}
            metavar = "true|false"
        flags = [f"--{name}", *(f"--{a}" for a in spellings.get(name, []) if len(a) > 1)]
        action = group.add_argument(
            flags[0],
            dest=name,
            default=argparse.SUPPRESS,
            metavar=metavar,
            help=field.metadata["help"] + shown,
            **extra,
        )
        for alias in flags[1:]:  # accepted, not shown
            parser._option_string_actions[alias] = action
    parser.add_argument("--config", default=argparse.SUPPRESS, metavar="YAML", help="settings from a file; flags win")


def shown_default(default: Any) -> str:
    return (
        str(default).lower()
        if isinstance(default, bool)
        else (
            ",".join(default)
            if isinstance(default, tuple)
            else f"{default:g}"
            if isinstance(default, float)
            else str(default)
        )
    )


def settings_of(values: dict[str, Any], cls: type) -> Any:
    """YAML first, flags on top."""
    config = values.pop("config", None)
    merged: dict[str, Any] = {}
    if config:
        known = flat_fields(cls)
        merged = {canonical(k, known, config): v for k, v in read_yaml(config).items()}
        build(cls, merged, config)  # a bad value is named with its file
    return build(cls, merged | values, "settings")
