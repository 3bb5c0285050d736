"""Sample prompts, answered now and then by the weights as they are. The run itself does not notice.

`train` may not import `infer`: whoever calls hands in an `Answer` (see `cli/train.py`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitune.config import TrainConfig, UserError
from minitune.data.forms import Message
from minitune.data.template import Template

if TYPE_CHECKING:
    from minitune.model.decoder import Decoder


@dataclass(frozen=True)
class Ask:
    """Prompts, encoded, and how they are to be answered. temperature 0: the likeliest token always."""

    prompt_ids: Sequence[Sequence[int]]
    stop_ids: Sequence[int]
    max_new_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class Sample:
    """finish: stop (the model ended it), length or context."""

    prompt: str
    answer: str
    finish: str


# (decoder, tokenizer, what is asked) -> (answer, finish) for each prompt
Answer = Callable[["Decoder", Any, Ask], Sequence[tuple[str, str]]]


def read_prompts(path: Path) -> list[list[Message]]:
    """A prompt a line; or, in a .jsonl file, a line of {"messages": [...]}, {"prompt": ...} or a text in quotes.

    Raises UserError, one line, naming the file and the line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; --watch names a file of prompts") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder; --watch names a file of prompts") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; save the file as UTF-8") from None
    read = _messages if path.suffix.lower() in (".jsonl", ".ndjson") else _plain
    prompts = [read(line, f"{path}: line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise UserError(f"{path}: no prompt in it; write one a line")
    return prompts


def _plain(line: str, where: str) -> list[Message]:
    if line.lstrip().startswith(('{"messages"', '{"prompt"')):
        raise UserError(f"{where}: this is JSON; name the file .jsonl")
    return [Message("user", line.strip())]


def _messages(line: str, where: str) -> list[Message]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); a plain text goes into a .txt file") from None
    if isinstance(row, dict) and len(row) == 1:
        row = row.get("messages", row.get("prompt", row))
    turns = [{"role": "user", "content": row}] if isinstance(row, str) else row
    form = 'it takes {"messages": [{"role": "user", "content": "..."}]}, {"prompt": "..."} or "..."'
    good = (
        isinstance(turns, list)
        and turns
        and all(isinstance(t, dict) and t.keys() == {"role", "content"} for t in turns)
    )
    if not good or not all(isinstance(t["content"], str) and t["content"].strip() for t in turns):
        raise UserError(f"{where}: {form}")
    talk = turns[1:] if turns[0]["role"] == "system" else turns
    if [t["role"] for t in talk] != (["user", "assistant"] * len(talk))[: len(talk)] or len(talk) % 2 == 0:
        raise UserError(f"{where}: system (or none), then user and assistant in turn; the last one is user's")
    return [Message(t["role"], t["content"]) for t in turns]  # type: ignore[arg-type]


class Watch:
    """The prompts of a run and their file of answers, watch.jsonl."""

    def __init__(self, config: TrainConfig, template: Template, tokenizer: Any, limit: int, answer: Answer | None):
        """limit: the model's positions. UserError where a prompt can't be answered."""
        self.path = Path(config.output) / "watch.jsonl"
        self.tokenizer = tokenizer
        self.prompts: list[str] = []
        if not config.watch:
            return
        if answer is None:
            raise UserError("watch: pass answer=minitune.cli.train.answer to train(), which may not load it itself")
        self._answer = answer
        talks = read_prompts(Path(config.watch))
        ids = [template.prompt_ids(talk) for talk in talks]
        for i, prompt in enumerate(ids, 1):
            if len(prompt) >= limit:
                raise UserError(
                    f"{config.watch}: prompt {i} has {len(prompt)} tokens, the model reads {limit}; shorten it"
                )
        self.prompts = [talk[-1].content for talk in talks]
        self.ask = Ask(ids, template.stop_ids, config.watch_max_new_tokens, config.watch_temperature, config.seed)

    def take(self, decoder: Decoder) -> list[Sample]:
        """Today's answers. UserError where the scores are not finite; torch.OutOfMemoryError."""
        with undisturbed(decoder):
            answers = self._answer(decoder, self.tokenizer, self.ask)
        return [Sample(p, text, finish) for p, (text, finish) in zip(self.prompts, answers, strict=True)]


@contextmanager
def undisturbed(decoder: Decoder) -> Iterator[None]:
    """The decoder in evaluation; afterwards its mode and all generators of chance are as before."""
    import numpy as np
    import torch

    training, device = decoder.training, decoder.device
    states = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    card = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    decoder.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        decoder.train(training)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if card is not None:
            torch.cuda.set_rng_state(card, device)
