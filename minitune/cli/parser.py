"""How flags are declared and read: argparse from dataclasses, one line an error, a help page that a person likes."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import field
from typing import Any, NoReturn, get_args, get_origin
from unicodedata import east_asian_width

from minitune.config import ALIASES, UserError, build, canonical, flat_fields, read_yaml, version, written_by

MODEL = "a folder, a hub name (openbmb/MiniCPM-2B-sft-bf16), or smollm2, the embedded default"
COMMAND_LINE = "the command line"


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
            if "config" in known and unknown[0].endswith((".yaml", ".yml", ".json")):
                self.error(f"write --config {unknown[0]}")
            self.error(f"{unknown[0]!r} is one word too many")
        return parsed


class Help(argparse.HelpFormatter):
    """As wide as the terminal, to 110 columns; long flags get a line of their own."""

    def __init__(self, prog: str):
        width = max(60, min(shutil.get_terminal_size((110, 24)).columns, 110))
        super().__init__(prog, max_help_position=32 if width > 90 else 24, width=width)

    def _split_lines(self, text: str, width: int) -> list[str]:
        """A Chinese character is two columns wide: it is wrapped with a mark beside it."""
        marked = "".join(c + "\0" * (east_asian_width(c) in "WF") for c in text)
        return [line.replace("\0", "") for line in super()._split_lines(marked, width)]

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return f"{action.metavar} ..." if action.nargs == "+" else super()._format_args(action, default_metavar)


def hyphens(argument: str) -> str:
    """--learning-rate -> --learning_rate; values are left alone."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}"


class Spelled(argparse.Action):
    """Keeps a value under the name that was typed, so that two names for one setting can be compared."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if isinstance(values, list):
            values = values[0] if len(values) == 1 else values or "true"
        setattr(namespace, (option_string or self.dest).lstrip("-"), values)


def declare_settings(
    parser: argparse.ArgumentParser, cls: type, title: str = "", config: bool = False, hidden: Sequence[str] = ()
) -> None:
    """A flag for each setting of a dataclass, grouped, with its default and its reason; other names are accepted and
    not shown, `hidden` ones too. `title`: the heading of settings without a group. `config`: with --config, in the
    first group."""
    groups: dict[str, Any] = {}
    for name, (one, kind) in flat_fields(cls).items():
        heading = one.metadata.get("group") or name.partition(".")[0] * ("." in name) or title
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        text = f"{one.metadata['help']} [{shown_default(one)}]".replace("%", "%%")
        action = groups[heading].add_argument(
            f"--{name}",
            action=Spelled,
            dest=name,
            default=argparse.SUPPRESS,
            metavar=metavar(name, kind),
            help=argparse.SUPPRESS if name in hidden else text,
            **words_taken(name, kind),
        )
        for other in (o for o, ours in ALIASES.items() if ours == name):
            parser._option_string_actions.setdefault(f"--{other}", action)
    if config:
        declare_config(next(iter(groups.values())))


def declare_config(group: Any) -> None:
    text = "settings from a file, ours or another program's; flags win over it"
    group.add_argument("--config", default=argparse.SUPPRESS, metavar="YAML", help=text)


def accept(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """Flags that are read and not shown: other programs' names."""
    for name in names:
        if f"--{name}" not in parser._option_string_actions:
            action = Spelled([f"--{name}"], dest=name, nargs="*", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
            parser._option_string_actions[f"--{name}"] = action


def words_taken(name: str, kind: Any) -> dict[str, Any]:
    """How many words follow a flag: a list takes several, a switch none or one."""
    if name == "resume":
        return {"nargs": "?", "const": "auto"}
    if kind is bool:
        return {"nargs": "?", "const": "true"}
    return {"nargs": "+"} if is_list(kind) else {}


def is_list(kind: Any) -> bool:
    return any(get_origin(k) is tuple for k in (kind, *get_args(kind)))


def metavar(name: str, kind: Any) -> str:
    """What a value is: its words, N for a whole number, X for a number, else what it names."""
    options = [str(o) for o in get_args(kind) if isinstance(o, str)]
    if options or kind is bool:
        return "|".join(options or ("true", "false"))
    kinds = (kind, *get_args(kind))
    if is_list(kind):
        return "NAME"
    return "N" if int in kinds else "X" if float in kinds else NOUNS.get(name, "TEXT")


NOUNS = {"model": "MODEL", "data": "FILE", "eval_data": "FILE", "output": "DIR", "resume": "DIR", "device": "DEVICE"}
NOUNS |= {"watch": "FILE", "general": "FILE", "train_data": "FILE", "html": "FILE"}
NOUNS |= {"adapter": "DIR", "task_path": "DIR", "memory": "SIZE"}


def shown_default(setting: Any) -> str:
    """A setting's default, as a person would type it."""
    default = setting.default
    if setting.metadata.get("required"):
        return "required"
    if default is None:
        return setting.metadata["unset"]
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, tuple):
        return ",".join(default) or "none"
    return f"{default:g}" if isinstance(default, float) else str(default) or "none"


def texts_named(*names: str) -> dict[str, Any]:
    """Settings that are plain texts, as `flat_fields` would have them."""
    return {name: (field(default=""), str) for name in names}


def settings_of(values: dict[str, Any], cls: type) -> Any:
    """YAML first, flags on top, both in any program's words."""
    return build(cls, translated(values, flat_fields(cls), "train"), "settings")


def translated(values: dict[str, Any], known: dict[str, Any], command: str) -> dict[str, Any]:
    """The settings that --config and the flags give, by our names; what was translated is said on stderr."""
    from minitune.foreign.reading import Source, read

    file = values.pop("config", None)
    sources = [Source(file, read_yaml(file))] if file else []
    other = written_by(file) if file else ""
    other = other if other != version() else ""
    try:
        reading = read([*sources, Source(COMMAND_LINE, values)], known, command)
    except UserError as error:
        more = f" ({file} was written by minitune {other}, this is {version()})" if other else ""
        raise UserError(f"{error}{more}") from None
    if other:
        print(f"{file}: written by minitune {other}, this is {version()}: numbers may differ", file=sys.stderr)
    for note in reading.notes:
        print(note, file=sys.stderr)
    return reading.values
