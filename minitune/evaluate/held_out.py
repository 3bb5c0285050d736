"""Which rows are evaluated, and which were learned: what a run held out is found again, row for row."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from minitune.checkpoint.embedded import rows_cache
from minitune.config import TrainConfig, UserError
from minitune.data import dataset, records
from minitune.data.records import Conversation
from minitune.data.store import EncodedRows
from minitune.data.template import Encoded, Template
from minitune.evaluate.settings import EvaluateConfig
from minitune.evaluate.subject import Subject, here
from minitune.settings import files_of

Place = tuple[str, int]  # (file, the row's number in it)


@dataclass(frozen=True)
class Choice:
    """Where the held-out rows come from.

    run: the settings that the rows are encoded with. split: whether they are the part of the files that the run held
    out; else all rows. most: of each file, 0: all. max_length: tokens a row at most.
    """

    files: list[str]
    why: str
    max_length: int
    run: TrainConfig = field(default_factory=TrainConfig)
    split: bool = False
    most: int = 0


def choose(config: EvaluateConfig, found: Subject) -> Choice:
    """--data, else what the run held out. UserError where there is neither."""
    run = found.run or TrainConfig()
    length = config.max_length or run.max_length
    if config.data:
        files = files_of(config.data)
        if found.run is not None and run.eval_fraction and same_files(files, files_of(run.data)):
            return Choice(files, "the rows that the run held out", length, run, True, run.max_samples)
        return Choice(files, "all of them", length, run)
    if found.run is None:
        where = f": {found.run_folder} has no run.yaml" if found.run_folder else ""
        raise UserError(f"no held-out rows{where}; give --data")
    if run.eval_data:
        files = [here(file, found) for file in files_of(run.eval_data)]
        return Choice(files, "named by the run", length, run, most=run.max_samples)
    if run.eval_fraction:
        files = [here(file, found) for file in files_of(run.data)]
        why = f"held out by the run, {run.eval_fraction:.3g} of them at seed {run.seed}"
        return Choice(files, why, length, run, True, run.max_samples)
    raise UserError(f"{found.run_folder}: the run held nothing out; give --data")


def same_files(some: Sequence[str], others: Sequence[str]) -> bool:
    return [Path(file).resolve() for file in some] == [Path(file).resolve() for file in others]


@dataclass(frozen=True)
class HeldOut:
    """The rows that are evaluated: `conversations[i]`, of `places[i]`, is what `rows[i]` encodes.

    learned: what the run learned of the same files; None where they are others.
    """

    files: list[str]
    rows: Sequence[Encoded]
    places: list[Place]
    conversations: list[Conversation]
    lines: list[str]
    learned: frozenset[Place] | None = None


def read(choice: Choice, template: Template) -> HeldOut:
    """Reads and encodes the rows as the run did."""
    held = learned = None
    if choice.split:
        learned, held = split(choice, template)
    data = [load(file, choice, choice.max_length, template) for file in choice.files]
    rows, places, conversations = [], [], []
    for file, part in zip(choice.files, data, strict=True):
        numbers = {int(n): i for i, n in enumerate(part.rows.numbers) if held is None or (file, int(n)) in held}
        found = [c for c in records.stream(file, join=template.config.join) if c.row in numbers]
        rows.append(part.rows.select([numbers[c.row] for c in found]))
        places += [(file, c.row) for c in found]
        conversations += found
    lines = [line for part in data for line in part.summary(choice.max_length)]
    lines.append(f"{len(places):,} rows are evaluated: {choice.why}")
    return HeldOut(choice.files, EncodedRows.joined(rows), places, conversations, lines, learned)


def load(file: str, choice: Choice, max_length: int, template: Template) -> dataset.Dataset:
    return dataset.load(file, template, max_length, choice.run.overlong, most=choice.most, kept=rows_cache())


def split(choice: Choice, template: Template) -> tuple[frozenset[Place], frozenset[Place]]:
    """(learned, held out) as the run chose them: at its own length, which decides what there is to choose from."""
    data = [load(file, choice, choice.run.max_length, template) for file in choice.files]
    places = [(file, int(n)) for file, part in zip(choice.files, data, strict=True) for n in part.rows.numbers]
    whole = dataset.together(data, choice.run.max_length)
    rows = whole.rows
    counted = EncodedRows(rows.ids, rows.learned, rows.starts, rows.lengths, rows.supervised, np.arange(len(rows)))
    whole.rows = counted  # numbered through all files
    parts = dataset.split(whole, choice.run.eval_fraction, choice.run.seed)
    learned, held = (frozenset(places[i] for i in part.numbers) for part in parts)
    return learned, held


@dataclass(frozen=True)
class Learned:
    """The training answers that an answer may recite. places: those that were learned, None: all of the files."""

    files: list[str]
    join: str = ""
    most: int = 0
    places: frozenset[Place] | None = None

    @staticmethod
    def of(config: EvaluateConfig, held: HeldOut, found: Subject, notes: list[str]) -> Learned | None:
        """--train_data, else what the run learned from; None where there is neither."""
        run = found.run or TrainConfig()
        files, most = files_of(config.train_data or run.data), 0
        if not files:
            return None
        if not config.train_data:
            most = run.max_samples
            try:
                files = [here(file, found) for file in files]
            except UserError:
                notes.append(f"{run.data} is not here: what is recited from it is not counted; give --train_data")
                return None
        known = same_files(files, held.files)
        # the same names, so that a row's place in both is one
        return Learned(held.files if known else files, run.template.join, most, held.learned if known else None)

    def conversations(self) -> Iterator[tuple[Place, Conversation]]:
        for file in self.files:
            stream = records.stream(file, join=self.join)
            for conversation in itertools.islice(stream, self.most or None):
                place = (file, conversation.row)
                if self.places is None or place in self.places:
                    yield place, conversation

    def answers(self) -> Iterator[tuple[Place, str]]:
        return ((place, m.content) for place, c in self.conversations() for m in c.messages if m.role == "assistant")

    def repeated(self, places: Sequence[Place], conversations: Sequence[Sequence[str]]) -> list[Place]:
        """Those of these conversations (their contents) that stand in the training data as another row, whole."""
        whole: dict[tuple[str, ...], list[Place]] = {}
        for place, contents in zip(places, conversations, strict=True):
            whole.setdefault(tuple(text.strip() for text in contents), []).append(place)
        found: set[Place] = set()
        for place, conversation in self.conversations():
            key = tuple(m.content.strip() for m in conversation.messages)
            found |= {own for own in whole.get(key, ()) if own != place}
        return sorted(found)
