"""A conversation with a model: the session that holds it, and how one is opened from what is on disk."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from minitune.config import UserError
from minitune.data.template import Template
from minitune.infer.engine import Engine
from minitune.infer.request import Request
from minitune.infer.sampling import Sampling
from minitune.infer.session import open_model

ADAPTER = "adapter"  # its name within the engine


@dataclass(frozen=True)
class Message:
    """One turn; `role` is system, user or assistant."""

    role: str
    content: str
    learn: bool = False  # the template's word for training; nothing is learned here


class Chat:
    """A session. `ask` streams an answer; `messages` is the history, `system` the text in front of it.

    The prompt is always the template's, built from the messages anew, so that what is served is what was
    trained; what it has in common with the turns before is in the engine's cache and not computed again. `finish`
    says why the last answer ended (`request.Handle`), or broken off by whoever read it.
    """

    def __init__(
        self,
        engine: Engine,
        template: Template,
        sampling: Sampling | None = None,
        system: str = "",
        adapter: str = "",
    ):
        self.engine, self.template, self.adapter = engine, template, adapter
        self.sampling = sampling or Sampling()
        self.system = system
        self.messages: list[Message] = []
        self.finish = ""

    def clear(self) -> None:
        """Forgets the conversation; system text and settings stay."""
        self.messages.clear()

    def ask(self, text: str) -> Iterator[str]:
        """Yields the answer's text as it comes; the turn enters the history as it was read, whole or not.

        Raises UserError for an empty question and for a conversation that is too long for the model; the
        history is then as before.
        """
        question = Message("user", printable(text))
        if not question.content.strip():
            raise UserError("the question is empty")
        system = [Message("system", printable(self.system))] if self.system.strip() else []
        prompt_ids = self.template.prompt_ids([*system, *self.messages, question])
        answer: list[str] = []
        self.finish = "broken off"
        try:
            for piece in self._pieces(prompt_ids):
                answer.append(piece)
                yield piece
        finally:
            if answer or self.finish != "broken off":
                self.messages += [question, Message("assistant", "".join(answer))]

    def _pieces(self, prompt_ids: list[int]) -> Iterator[str]:
        request = Request(tuple(prompt_ids), self.sampling, frozenset(self.template.stop_ids), adapter=self.adapter)
        handle = self.engine.submit(request)
        for piece in handle:
            if piece.text:
                yield piece.text
        self.finish = handle.finish


def printable(text: str) -> str:
    """`text` without the lone surrogates that bytes outside UTF-8 leave in arguments and on stdin."""
    return text.encode("utf-8", "replace").decode("utf-8")


def base_of(adapter: str | Path) -> str:
    """The model that an adapter's own adapter_config.json names; "" where it names none."""
    from minitune.checkpoint.adapter import CONFIG
    from minitune.checkpoint.weights import read_json

    return str(read_json(Path(adapter) / CONFIG).get("base_model_name_or_path") or "")


def same_model(one: str, other: str) -> bool:
    """Whether two names mean one model: equal, one folder, or a folder called as the hub's model is."""
    if one == other or os.path.realpath(one) == os.path.realpath(other):
        return True
    both_local = os.path.isdir(one) and os.path.isdir(other)
    return not both_local and Path(one).name == Path(other).name


def which(model: str | None, adapter: str | None) -> tuple[str, str | None]:
    """(model, adapter): the model defaults to the adapter's base; an adapter may be given as the model."""
    from minitune.checkpoint.adapter import CONFIG

    model, adapter = (os.path.expanduser(name) if name else name for name in (model, adapter))
    if model and not adapter and (Path(model) / CONFIG).is_file() and not (Path(model) / "config.json").is_file():
        model, adapter = None, model
    if not adapter:
        if not model:
            raise UserError("no model; give --model (a folder, a hub name, or smollm2) or --adapter")
        return model, None
    if not (Path(adapter) / CONFIG).is_file():
        raise UserError(f"{adapter}: no adapter there ({CONFIG} is missing); give the folder that a run wrote")
    base = base_of(adapter)
    if not model and not base:
        raise UserError(f"{Path(adapter) / CONFIG}: base_model_name_or_path is missing; give --model")
    if model and base and not same_model(model, base):
        print(f"minitune: {adapter} was trained on {base}, not on {model}", file=sys.stderr)
    return model or base, adapter


def load(
    model: str,
    adapter: str | None = None,
    *,
    system: str = "",
    sampling: Sampling | None = None,
    dtype: str = "auto",
    device: str = "auto",
    source: str = "modelscope",
) -> Chat:
    """A session with a model (a folder, a hub name, or smollm2) and an adapter, prompted as it was trained.

    Raises UserError, one line, for what is missing or does not fit.
    """
    adapters = {ADAPTER: adapter} if adapter else {}
    session = open_model(model, adapters, dtype=dtype, device=device, source=source, slots=1)
    name = ADAPTER if adapter else ""
    return Chat(session.engine, session.templates[name], sampling, system, name)


def main(
    model: str | None = None,
    adapter: str | None = None,
    prompt: str | None = None,
    system: str | None = None,
    sampling: Sampling | None = None,
    dtype: str = "auto",
    device: str = "auto",
    source: str = "modelscope",
) -> int:
    """`minitune chat`: with `prompt` one answer, else a conversation at the terminal. Returns the exit code.

    stdout holds answers and nothing else; all else goes to stderr. Raises UserError, one line.
    """
    from minitune.infer import terminal

    terminal.tolerate_bytes()
    model, adapter = which(model, adapter)
    chat = load(model, adapter, system=system or "", sampling=sampling, dtype=dtype, device=device, source=source)
    if prompt is not None:
        return terminal.answer(chat, prompt)
    return terminal.converse(chat, f"{model} + {adapter}" if adapter else model)
