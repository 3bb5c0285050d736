"""One subcommand, one call. Imports lazily, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import atexit
import difflib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

from minitune import __version__
from minitune.cli.data import call_data, declare_data
from minitune.cli.evaluate import call_evaluate, declare_evaluate
from minitune.cli.export import call_export, declare_export
from minitune.cli.parser import Help, Parser, hyphens
from minitune.cli.plan import call_plan, declare_plan
from minitune.cli.start import call_demo, call_download, declare_demo, declare_download
from minitune.cli.talk import call_chat, call_serve, declare_chat, declare_serve
from minitune.cli.train import call_train, declare_train
from minitune.config import UserError


def process() -> int:
    """`main` as a whole process, which ends where its last line is said: the interpreter's own way out frees a card's
    memory and every object one by one, which takes a second or two and serves nobody."""
    code: list[int] = []

    def leave() -> None:
        if not code:  # an error that is a traceback
            return
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except (OSError, ValueError):
            return  # the interpreter says it
        os._exit(code[0])

    atexit.register(leave)  # the first to be registered runs last, behind everything that has to run at the end
    code.append(main())
    return code[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0 done, 1 the data would hurt or the run stopped, 2 bad input."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a C locale must not break 甄嬛
            stream.reconfigure(encoding="utf-8", errors="replace")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        with quiet_but_for_the_first():
            return run(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        if str(error):  # else another process of the run says it
            print(f"minitune: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
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


@contextmanager
def quiet_but_for_the_first() -> Iterator[None]:
    """Of several processes that a launcher started, rank 0 alone speaks; an error of another one is not held back."""
    if os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    with (
        open(os.devnull, "w", encoding="utf-8", errors="replace") as nowhere,
        redirect_stdout(nowhere),
        redirect_stderr(nowhere),
    ):
        yield


def run(argv: list[str]) -> int:
    if argv and argv[0].startswith("--local_rank="):  # DeepSpeed's launcher, which says it by environment too
        argv = argv[1:]
    if argv and not argv[0].startswith("-"):
        name = argv[0]
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            mend = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
            raise UserError(f"no command is called {name!r}; {mend}")
        help_, declare, call = COMMANDS[name]
        parser = Parser(prog=f"minitune {name}", description=help_, formatter_class=Help, allow_abbrev=False)
        declare(parser)
        return call(vars(parser.parse_args([hyphens(a) for a in argv[1:]])))
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


Command = tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[dict[str, Any]], int]]
COMMANDS: dict[str, Command] = {
    "demo": ("the whole story in minutes, on any machine", declare_demo, call_demo),
    "download": ("a model from ModelScope or Hugging Face", declare_download, call_download),
    "data": ("look at conversations before training on them", declare_data, call_data),
    "plan": ("will it fit, and how long will it take", declare_plan, call_plan),
    "train": ("train LoRA or every parameter", declare_train, call_train),
    "evaluate": ("what a model can do before and after", declare_evaluate, call_evaluate),
    "chat": ("talk to a model", declare_chat, call_chat),
    "serve": ("an OpenAI-compatible server and a chat page", declare_serve, call_serve),
    "export": ("merge, and write what other programs open", declare_export, call_export),
}
