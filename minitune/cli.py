"""One subcommand, one call. Imports lazily, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, get_args, get_origin

from minitune import __version__
from minitune.config import ALIASES, TrainConfig, UserError, build, canonical, flat_fields, read_yaml

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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0 done, 1 the data would hurt or the run stopped, 2 bad input."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a C locale must not break 甄嬛
            stream.reconfigure(encoding="utf-8", errors="replace")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        return run(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(f"minitune: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    except KeyboardInterrupt:
        print("minitune: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno in (28, 122):
            print(f"minitune: {error.filename or 'output'}: no space left on the disk", file=sys.stderr)
        elif error.filename:  # a folder where a file is needed, no permission, a disk that can only be read, …
            print(f"minitune: {error.filename}: {(error.strerror or str(error)).lower()}", file=sys.stderr)
        else:
            raise
        return 2


def run(argv: list[str]) -> int:
    if argv and not argv[0].startswith("-"):
        name = argv[0]
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            mend = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
            raise UserError(f"no command is called {name!r}; {mend}")
        help_, declare, call = COMMANDS[name]
        parser = Parser(prog=f"minitune {name}", description=help_, formatter_class=_Help, allow_abbrev=False)
        declare(parser)
        return call(vars(parser.parse_args([_option(a) for a in argv[1:]])))
    lines = "\n".join(f"  {name:<10}{help_}" for name, (help_, _, _) in COMMANDS.items())
    parser = Parser(
        prog="minitune",
        usage="minitune COMMAND [--settings]",
        description="Make a MiniCPM-class chat model your own, on the hardware you have.",
        epilog=f"commands:\n{lines}\n\n`minitune COMMAND --help` says the rest.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"minitune {__version__}")
    parser.parse_args(argv)
    parser.print_help()
    return 0


def _option(argument: str) -> str:
    """--learning-rate -> --learning_rate; values are left alone."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}"


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=42, width=110)


# One declaration and one call a command


def declare_settings(parser: argparse.ArgumentParser, cls: type) -> None:
    """A flag for each setting of a dataclass, grouped, with its default and its reason."""
    spellings: dict[str, list[str]] = {}
    for alias, name in ALIASES.items():
        spellings.setdefault(name, []).append(alias)
    groups: dict[str, Any] = {}
    for name, (field, kind) in flat_fields(cls).items():
        title = field.metadata.get("group") or name.partition(".")[0]
        group = groups.setdefault(title, parser.add_argument_group(title))
        shown = "" if field.metadata.get("required") or field.default in ("", None) else f" [{_shown(field.default)}]"
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


def _shown(default: Any) -> str:
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


def call_train(values: dict[str, Any]) -> int:
    config = settings_of(values, TrainConfig)
    from minitune.train.run import train

    summary = train(config)
    loss = "none" if summary["loss"] is None else f"{summary['loss']:.4f}"
    held = "" if summary["eval_loss"] is None else f", held out {summary['eval_loss']:.4f}"
    print(
        f"done: {summary['steps']} steps in {summary['seconds']:.0f} s, loss {loss}{held}, "
        f"peak {summary['peak_memory_gib']:.1f} GiB -> {config.output}"
    )
    adapter = f" --adapter {config.output}" if config.method != "full" else ""
    model = config.output if config.method == "full" else config.model
    print(f"talk to it: minitune chat --model {model}{adapter}")
    return 0


def declare_download(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=MODEL)
    parser.add_argument("--source", choices=("modelscope", "huggingface"), default="modelscope", help="asked first")
    parser.add_argument("--revision", help="a branch, tag or commit")
    parser.add_argument("--cache_dir", help="where the hub's files are kept")


def call_download(values: dict[str, Any]) -> int:
    from minitune.checkpoint.hub import download

    name = values.pop("model")
    download(name, **values)
    return 0


def declare_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("check", "preview"), help="check: would it hurt? preview: what is learned")
    parser.add_argument("file", help="conversations: json, jsonl, csv or parquet")
    parser.add_argument("--model", default="", help=MODEL)
    parser.add_argument("--json", action="store_true", help="one JSON object a row: input_ids, labels")
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="rows to show (without --json) [3]")
    parser.add_argument("--max_length", "--cutoff_len", default="512", help="tokens a row at most [512]")
    parser.add_argument(
        "--overlong", default="cut", metavar="cut|drop|error", help="what happens to a longer row [cut]"
    )
    for name, (field, _) in flat_fields(TrainConfig).items():
        if name.startswith("template."):
            text = f"{field.metadata['help']} [{_shown(field.default)}]"
            extra: dict[str, Any] = {"const": "minicpm", "nargs": "?"} if name == "template.name" else {}
            flags = ["--template", f"--{name}"] if name == "template.name" else [f"--{name}"]
            parser.add_argument(*flags, dest=name, default=argparse.SUPPRESS, help=text, metavar="VALUE", **extra)


def call_data(values: dict[str, Any]) -> int:
    from minitune.data import preview

    action, file, rows, as_json = (values.pop(n) for n in ("action", "file", "rows", "json"))
    config = build(TrainConfig, values | {"data": file}, "data")
    if not config.model:
        if action == "preview":
            raise UserError("data preview: --model is missing (its tokenizer says what a row is)")
        return preview.check(config)
    from minitune.checkpoint import hub
    from minitune.checkpoint.tokenizer import load_tokenizer
    from minitune.checkpoint.weights import read_json

    base = hub.resolve(config.model)
    tokenizer, hub_config = load_tokenizer(base), read_json(base / "config.json")
    if action == "check":
        return preview.check(config, tokenizer, hub_config)
    return preview.show(config, tokenizer, hub_config, rows, as_json)


def declare_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", "--model_name_or_path", help=f"{MODEL}; with --adapter, its base by default")
    parser.add_argument("--adapter", "--adapter_name_or_path", help="a folder that `minitune train` wrote")
    parser.add_argument("--prompt", help="answer this and leave, for scripts")
    parser.add_argument("--system", help="a system text")
    for name, text in (
        ("temperature", "0: always the likeliest token"),
        ("top_p", "nucleus"),
        ("top_k", "the k likeliest"),
        ("min_p", "relative to the likeliest"),
        ("repetition_penalty", "1: none"),
    ):
        parser.add_argument(f"--{name}", type=float, default=argparse.SUPPRESS, help=text)
    parser.add_argument("--max_new_tokens", type=int, default=argparse.SUPPRESS, help="tokens an answer at most")
    parser.add_argument("--seed", type=int, default=argparse.SUPPRESS, help="the same seed gives the same answer")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16")
    parser.add_argument("--device", default="auto", help="auto, cuda, cpu")


def call_chat(values: dict[str, Any]) -> int:
    from minitune.infer import chat
    from minitune.infer.sampling import Sampling

    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens", "seed")
    given = {n: values.pop(n) for n in names if n in values}
    if "top_k" in given:
        given["top_k"] = int(given["top_k"])
    return chat.main(sampling=Sampling(**given), **values)


def declare_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", "--model_name_or_path", required=True, help=MODEL)
    parser.add_argument("--adapter", "--adapter_name_or_path", help="merged into the weights")
    parser.add_argument("--format", choices=("hf", "minicpm"), default="hf", help="hf: what stock transformers opens")
    parser.add_argument("--output", "--output_dir", required=True, help="a new folder")
    parser.add_argument("--dtype", default="auto", help="auto (as the base is), float32, bfloat16, float16")


def call_export(values: dict[str, Any]) -> int:
    from minitune.export import export

    export(**values)
    return 0


def declare_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", default="minitune-demo", help="the demo's folder [minitune-demo]")


def call_demo(values: dict[str, Any]) -> int:
    from minitune.demo.tour import tour

    return tour(values["output"])


Command = tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[dict[str, Any]], int]]
COMMANDS: dict[str, Command] = {
    "demo": ("the whole story in minutes, on any machine", declare_demo, call_demo),
    "download": ("a model from ModelScope or Hugging Face", declare_download, call_download),
    "data": ("look at conversations before training on them", declare_data, call_data),
    "train": ("train LoRA or every parameter", lambda parser: declare_settings(parser, TrainConfig), call_train),
    "chat": ("talk to a model", declare_chat, call_chat),
    "export": ("merge, and write what other programs open", declare_export, call_export),
}
