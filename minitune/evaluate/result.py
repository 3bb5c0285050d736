"""What is made of the measurements: plain values, as evaluation.json holds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from minitune.config import UserError
from minitune.data import records
from minitune.data.template import Encoded, Template
from minitune.evaluate import answers, general, habits, loss, scores, subject
from minitune.evaluate.answers import Answer, Question
from minitune.evaluate.settings import EvaluateConfig
from minitune.evaluate.subject import HeldOut, Side, Subject


@dataclass
class Measured:
    """What was measured of one side."""

    side: Side
    held_out: loss.Losses | None = None
    general: loss.Losses | None = None
    answers: list[Answer | None] = field(default_factory=list)
    tasks: dict[str, Any] = field(default_factory=dict)


@dataclass
class Prepared:
    """What is evaluated, read and checked before a weight is loaded. tasks: lm-eval's names and its task manager."""

    subject: Subject
    folders: dict[str, Path]
    templates: dict[str, Template]
    held: HeldOut | None
    windows: list[Encoded]
    asked: list[Question]
    tasks: tuple[list[str], Any] | None
    device: torch.device
    dtype: str
    lines: list[str]


def compare(measured: Sequence[Measured], ready: Prepared, config: EvaluateConfig) -> dict[str, Any]:
    """The result: plain values, a key for each part that was asked for."""
    found = ready.subject
    out: dict[str, Any] = {
        "sides": {m.side.name: {"model": m.side.model, "adapter": m.side.adapter or None} for m in measured},
        "dtype": ready.dtype,
        "device": str(ready.device),
        "notes": [],
    }
    if ready.held:
        out["held_out"] = held_out_part(measured, ready.held)
    if ready.windows:
        out["general"] = general_part(measured, config.general)
    if ready.asked:
        out["answers"] = answers_part(measured, ready, config, found, out["notes"])
    if ready.tasks:
        out["tasks"] = {m.side.name: m.tasks for m in measured}
    return out


def held_out_part(measured: Sequence[Measured], held: HeldOut) -> dict[str, Any]:
    """loss: nats a supervised token, over all of them; rows: the same of each."""
    part: dict[str, Any] = {"file": held.file}
    for m in measured:
        assert m.held_out is not None
        rows = [
            {"row": n, "tokens": count, "loss": total / count}
            for n, (total, count) in zip(held.numbers, m.held_out.rows, strict=True)
        ]
        part[m.side.name] = {
            "loss": m.held_out.mean,
            "perplexity": m.held_out.perplexity,
            "tokens": m.held_out.tokens,
            "rows": rows,
        }
    return part


def general_part(measured: Sequence[Measured], file: str) -> dict[str, Any]:
    part: dict[str, Any] = {"file": file}
    losses = [m.general for m in measured if m.general is not None]
    for m, found in zip(measured, losses, strict=True):
        part[m.side.name] = {"loss": found.mean, "perplexity": found.perplexity, "tokens": found.tokens}
    if len(losses) == 2:
        said = general.verdict(*losses)
        part |= {"rise": said.rise, "standard_error": said.error, "verdict": said.text}
    return part


def answers_part(
    measured: Sequence[Measured], ready: Prepared, config: EvaluateConfig, found: Subject, notes: list[str]
) -> dict[str, Any]:
    """summary and scores of each side; rows with the question, the wanted answer and both answers."""
    given = [i for i in range(len(ready.asked)) if all(m.answers[i] is not None for m in measured)]
    if len(given) < len(ready.asked):
        notes.append(f"{len(ready.asked) - len(given)} questions are longer than the model reads; left out")
    asked = [ready.asked[i] for i in given]
    part: dict[str, Any] = {"sampling": dataclasses.asdict(answers.sampling_of(config)), "rows": []}
    if not asked:
        return part
    learned = Learned.of(config, ready, found, notes)
    part["rows"] = [
        {"row": q.row, "messages": [{"role": t.role, "content": t.content} for t in q.messages], "wanted": q.wanted}
        for q in asked
    ]
    for m in measured:
        said = [a for a in (m.answers[i] for i in given) if a is not None]
        recited = habits.recitals([a.text for a in said], learned.own(asked), learned.answers()) if learned else None
        part[m.side.name] = answers.summary(said, recited)
        for i, (row, answer) in enumerate(zip(part["rows"], said, strict=True)):
            row[m.side.name] = {"text": answer.text, "finish": answer.finish, "tokens": len(answer.ids)}
            if recited and (recited[i].common or recited[i].equal):
                row[m.side.name]["shared"] = dataclasses.asdict(recited[i]) | {"recited": recited[i].recited}
        try:
            part[m.side.name]["scores"] = dataclasses.asdict(
                scores.score([a.text.strip() for a in said], [q.wanted for q in asked])
            )
        except UserError as missing:
            if str(missing) not in notes:
                notes.append(str(missing))
    if learned:
        part["train_data"] = learned.file
        part["also_learned"] = learned.leaked(asked)
    return part


@dataclass(frozen=True)
class Learned:
    """The training answers that an answer may recite. rows: those that were learned, None: all of the file."""

    file: str
    join: str
    rows: set[int] | None
    same: bool

    @staticmethod
    def of(config: EvaluateConfig, ready: Prepared, found: Subject, notes: list[str]) -> Learned | None:
        """--train_data, else what the run learned from; None where there is neither."""
        held, run = ready.held, found.run
        assert held is not None
        path = config.train_data or (run.data if run else "")
        if not path:
            return None
        if not config.train_data:
            try:
                path = subject.here(path, found)
            except UserError:
                notes.append(f"{path} is not here: what is recited from it is not counted; give --train_data")
                return None
        same = subject.same_file(path, held.file)
        join = run.template.join if run else ""
        return Learned(path, join, held.learned if same else None, same)

    def conversations(self) -> Iterator[records.Conversation]:
        return (c for c in records.stream(self.file, join=self.join) if self.rows is None or c.row in self.rows)

    def answers(self) -> Iterator[tuple[int, str]]:
        return ((c.row, m.content) for c in self.conversations() for m in c.messages if m.role == "assistant")

    def own(self, asked: Sequence[Question]) -> list[int | None]:
        """The asked rows' own numbers in the training data, where they stand there."""
        return [q.row if self.same else None for q in asked]

    def leaked(self, asked: Sequence[Question]) -> list[int]:
        """Rows of the questions that stand in the training data word for word, answer included, as another row."""
        whole: dict[tuple[str, ...], list[int]] = {}
        for q in asked:
            whole.setdefault((*(m.content.strip() for m in q.messages), q.wanted), []).append(q.row)
        out = set()
        for c in self.conversations():
            key = tuple(m.content.strip() for m in c.messages)
            out |= {row for row in whole.get(key, ()) if not (self.same and row == c.row)}
        return sorted(out)
