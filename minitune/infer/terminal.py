"""The chat at a terminal: lines in, answers out. Works through a pipe too, then without prompts or banner."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import sys
from collections.abc import Generator
from typing import TYPE_CHECKING, TextIO, cast

from minitune.config import UserError, build, canonical, flat_fields
from minitune.infer.sampling import Sampling

if TYPE_CHECKING:
    from minitune.infer.chat import Chat

INTERRUPTED = 130  # the shell's exit code after Ctrl-C
HELP = r"""/clear            begin a new conversation
/system TEXT      set the system text (none: take it away) and begin a new conversation
/set NAME VALUE   set temperature, top_p, top_k, min_p, repetition_penalty, max_new_tokens or seed
/set              show them
/help             this
/exit             leave (or Ctrl-D)
A \ at the end of a line continues the message on the next. Ctrl-C stops an answer."""


def tolerate_bytes() -> None:
    """Bytes that are no text in the streams' encoding become a replacement character, not an exception."""
    for stream in (sys.stdin, sys.stdout):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure:
            reconfigure(errors="replace")


def note(text: object, style: str = "dim") -> None:
    """One line for the person, on stderr."""
    from rich.console import Console

    Console(stderr=True, highlight=False).print(str(text), style=style, markup=False, soft_wrap=True)


def answer(chat: Chat, text: str) -> int:
    """Streams one answer and a newline to stdout; says on stderr what cut it. Returns the exit code."""
    pieces = cast(Generator[str, None, None], chat.ask(text))
    try:
        # Closed on the way out, whatever happened: what was read so far enters the history.
        with contextlib.closing(pieces):
            for piece in pieces:
                sys.stdout.write(piece)
                sys.stdout.flush()
        print(flush=True)
    except KeyboardInterrupt:
        print(flush=True)
        return INTERRUPTED
    except BrokenPipeError:  # the reader has what it wanted (`| head`); leave nothing for the exit to flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if chat.finish == "length":
        note(f"minitune: cut at {chat.sampling.max_new_tokens} tokens (max_new_tokens)")
    elif chat.finish == "context":
        note(f"minitune: cut: the model's {chat.engine.limit} positions are full")
    return 0


def converse(chat: Chat, name: str) -> int:
    """Asks and answers until the end of the input. Returns the exit code.

    At a terminal a mistake is said and the conversation goes on; in a pipe it is raised (UserError).
    """
    tty = sys.stdin.isatty() and sys.stdout.isatty()
    if tty:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  makes input() edit its line, wide characters too, and remember
        note(banner(chat, name))
    while True:
        try:
            text = read(sys.stdin, tty)
            if not text.strip():
                continue
            if re.fullmatch("/[a-z]+", text.split()[0]):
                if not command(chat, text):
                    return 0
            elif answer(chat, text) and not tty:
                return INTERRUPTED
        except EOFError:
            return 0
        except KeyboardInterrupt:  # at the prompt, or a moment after an answer's last piece
            if not tty:
                return INTERRUPTED
            print()
            note("Ctrl-D or /exit leaves")
        except UserError as error:
            if not tty:
                raise
            note(error, "red")


def banner(chat: Chat, name: str) -> str:
    """What one talks to, in one line."""
    template = chat.template.config.name + ("" if chat.template.tuned else ", as published")
    decoder = chat.engine.decoder
    dtype = str(decoder.dtype).removeprefix("torch.")
    return f"{name} | template: {template} | {decoder.device} {dtype} | /help"


def read(stdin: TextIO, tty: bool) -> str:
    r"""One message: a line, and those after it while they end in \. EOFError where there is none."""
    lines: list[str] = []
    while True:
        try:
            line = input("... " if lines else ">>> ") if tty else stdin.readline()
            if not tty and not line:
                raise EOFError
        except EOFError:
            if tty:
                print()
            if not lines:
                raise
            return "\n".join(lines)
        line = line.rstrip("\r\n")
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])


def command(chat: Chat, text: str) -> bool:
    """Carries out a line that begins with a slash; False to leave. Raises UserError for what it can't be."""
    word, rest = (*text.split(maxsplit=1), "")[:2]
    if word in ("/exit", "/quit"):
        return False
    if word == "/help":
        note(HELP)
    elif word == "/clear":
        chat.clear()
        note("new conversation")
    elif word == "/system":
        chat.system = rest.strip()
        chat.clear()
        note("system text set, new conversation" if chat.system else "no system text, new conversation")
    elif word == "/set":
        set_sampling(chat, rest)
    else:
        raise UserError(f"{word}: no such command; /help lists them")
    return True


def set_sampling(chat: Chat, text: str) -> None:
    """`temperature 0.7` or `temperature=0.7`; nothing: shows all."""
    parts = text.replace("=", " ").split()
    if len(parts) == 2:
        name = canonical(parts[0], flat_fields(Sampling), "/set")
        chat.sampling = build(Sampling, {**dataclasses.asdict(chat.sampling), name: parts[1]}, "/set")
    elif parts:
        raise UserError("/set takes a name and a value, as in /set temperature 0.7")
    note("  ".join(f"{name}={value}" for name, value in dataclasses.asdict(chat.sampling).items()))
