"""What is evaluated: which model, beside which base, on which rows; from the flags and from what the run recorded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitune.checkpoint.adapter import CONFIG as ADAPTER
from minitune.checkpoint.weights import read_json
from minitune.config import TrainConfig, UserError, build, read_yaml
from minitune.data import dataset, records
from minitune.data.records import Conversation
from minitune.data.template import Encoded, Template
from minitune.evaluate.settings import EvaluateConfig

BASE, TUNED = "base", "tuned"


@dataclass(frozen=True)
class Side:
    """One of the two that are compared: a model, and an adapter on it ("" where there is none)."""

    name: str
    model: str
    adapter: str = ""

    @property
    def label(self) -> str:
        return f"{self.model} + {self.adapter}" if self.adapter else self.model


@dataclass(frozen=True)
class Subject:
    """The base alone, or the base and what was made of it; `run`: the settings it was trained with, where known."""

    sides: list[Side]
    run: TrainConfig | None
    run_folder: str = ""


def subject(config: EvaluateConfig) -> Subject:
    """From --model and --adapter; a whole model that a run wrote brings its base. UserError where neither is given."""
    from minitune.infer.chat import which

    whole = next((f for f in (config.adapter, config.model) if f and is_whole_run(f)), "")
    if whole:
        run = read_run(whole)
        assert run is not None
        base = config.model if config.adapter == whole and config.model else run.model
        return Subject([Side(BASE, base), Side(TUNED, whole)], run, whole)
    model, adapter = which(config.model or None, config.adapter or None)
    if not adapter:
        return Subject([Side(BASE, model)], None)
    return Subject([Side(BASE, model), Side(TUNED, model, adapter)], read_run(adapter), adapter)


def is_whole_run(folder: str) -> bool:
    """Whether this is the folder of a run that trained every parameter."""
    place = Path(folder)
    if (place / ADAPTER).is_file() or not (place / "config.json").is_file():
        return False
    run = read_run(folder)
    return run is not None and bool(run.model)


def read_run(folder: str) -> TrainConfig | None:
    """The settings that a run recorded in its folder; None where it has none."""
    path = Path(folder) / "run.yaml"
    if not path.is_file():
        return None
    return build(TrainConfig, read_yaml(path), str(path))


@dataclass
class HeldOut:
    """The rows that are evaluated: `conversations[i]` is what `rows[i]` encodes.

    learned: the rows of the same file that the run learned from, None where the file is another.
    """

    file: str
    rows: Sequence[Encoded]
    conversations: list[Conversation]
    lines: list[str]
    learned: set[int] | None = None

    @property
    def numbers(self) -> list[int]:
        return [conversation.row for conversation in self.conversations]


@dataclass(frozen=True)
class Choice:
    """Where the held-out rows come from. fraction: the part of `file` that the run held out, 0: all of it."""

    file: str
    why: str
    fraction: float = 0.0
    seed: int = 0
    settings: TrainConfig = field(default_factory=TrainConfig)


def choose(config: EvaluateConfig, found: Subject) -> Choice:
    """--data, else what the run held out. UserError where there is neither."""
    run = found.run or TrainConfig()
    if config.max_length:
        run = dataclasses.replace(run, max_length=config.max_length)
    if config.data:
        same = found.run is not None and same_file(config.data, run.data)
        fraction = run.eval_fraction if same else 0.0
        if same and fraction:
            return Choice(config.data, "the rows of it that the run held out", fraction, run.seed, run)
        return Choice(config.data, "all its rows", settings=run)
    if found.run is None:
        where = f": {found.run_folder} has no run.yaml" if found.run_folder else ""
        raise UserError(f"no held-out rows{where}; give --data")
    if run.eval_data:
        return Choice(here(run.eval_data, found), "named by the run", settings=run)
    if run.eval_fraction:
        return Choice(here(run.data, found), f"held out by the run, {run.eval_fraction:g} of it at seed {run.seed}",
                      run.eval_fraction, run.seed, run)  # fmt: skip
    raise UserError(f"{found.run_folder}: the run held nothing out; give --data")


def here(path: str, found: Subject) -> str:
    """A path of run.yaml: as it is written, or beside the run's folder. UserError where it is gone."""
    for place in (Path(path), Path(found.run_folder).parent / path):
        if place.is_file():
            return str(place)
    raise UserError(f"{found.run_folder}: its run.yaml names {path}, which is not here; give --data (or --train_data)")


def same_file(one: str, other: str) -> bool:
    return bool(other) and Path(one).resolve() == Path(other).resolve()


def held_out(choice: Choice, template: Template) -> HeldOut:
    """Reads and encodes the rows as the run did."""
    settings = choice.settings
    data = dataset.load(choice.file, template, settings.max_length, settings.overlong, most=settings.max_samples)
    learned, rows = None, data.rows
    if choice.fraction:
        learn, rows = dataset.split(data, choice.fraction, choice.seed)
        learned = set(learn.numbers.tolist())
    wanted = set(rows.numbers.tolist())
    found = records.stream(choice.file, join=template.config.join)
    conversations = [c for c in found if c.row in wanted]
    lines = [*data.summary(settings.max_length), f"{choice.file}: {len(rows):,} rows are evaluated: {choice.why}"]
    return HeldOut(choice.file, rows, conversations, lines, learned)


def open_template(side: Side, folder: Path, tokenizer: Any) -> Template:
    """As the side was trained, or as its checkpoint is prompted."""
    return Template.recorded(tokenizer, read_json(folder / "config.json"), side.adapter or None, folder)
