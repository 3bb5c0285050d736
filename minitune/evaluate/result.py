"""What is made of the measurements: plain values, as evaluation.json holds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from minitune.config import UserError
from minitune.data.template import Encoded, Template
from minitune.evaluate import answers, general, habits, loss, scores
from minitune.evaluate.answers import Answer, Question
from minitune.evaluate.held_out import HeldOut, Learned
from minitune.evaluate.settings import EvaluateConfig
from minitune.evaluate.subject import Side, Subject


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
    part: dict[str, Any] = {"files": held.files}
    for m in measured:
        assert m.held_out is not None
        rows = [
            {"file": file, "row": row, "tokens": count, "loss": total / count}
            for (file, row), (total, count) in zip(held.places, m.held_out.rows, strict=True)
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
    assert ready.held is not None
    learned = Learned.of(config, ready.held, found, notes)
    own = [q.place for q in asked]
    for q in asked:
        messages = [{"role": t.role, "content": t.content} for t in q.messages]
        part["rows"].append({"file": q.place[0], "row": q.place[1], "messages": messages, "wanted": q.wanted})
    for m in measured:
        said = [a for a in (m.answers[i] for i in given) if a is not None]
        recited = habits.recitals([a.text for a in said], own, learned.answers()) if learned else None
        part[m.side.name] = answers.summary(said, asked, recited)
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
        part["train_data"] = learned.files
        whole = [[*(m.content for m in q.messages), q.wanted] for q in asked]
        part["also_learned"] = [{"file": file, "row": row} for file, row in learned.repeated(own, whole)]
    return part
