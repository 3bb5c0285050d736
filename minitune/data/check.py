"""`minitune data check`: one pass over the file that keeps a few numbers a row, and a second look at what it will show.

Rows are compared by 8-byte hashes, which live as long as the process: a million rows need some 100 MB.
"""

from __future__ import annotations

from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitune.config import TrainConfig
from minitune.data import across, languages, near, records
from minitune.data.findings import TURNS, Finding, Hit, Marks, look, shown
from minitune.data.forms import FORMS, Message
from minitune.data.html import visible
from minitune.data.records import Conversation
from minitune.data.report import Lengths, Report

if TYPE_CHECKING:
    from minitune.data.store import EncodedRows
    from minitune.data.template import Template

# `--near auto` looks for near duplicates as long as their sketches need no more than 128 MB.
NEAR_ROWS = 250_000
FIELDS = frozenset(key for form in FORMS for key in (*form.needed, *form.optional))
Watch = Callable[[str, Callable[[], float], Iterable[Any]], Iterable[Any]]


def unwatched(_: str, __: Callable[[], float], rows: Iterable[Any]) -> Iterable[Any]:
    """No progress is shown."""
    return rows


def row_key(messages: Sequence[Message]) -> int:
    """A hash of everything that is said in a row; white space at the edges does not count."""
    return hash("\x1f".join([f"{m.role}\x1e{m.content.strip()}" for m in messages]))


def question_key(messages: Sequence[Message]) -> int:
    """A hash of everything before the last answer."""
    return row_key(messages[:-1])


class Survey:
    """What one pass over a file collects. Index i is the i-th readable row; `numbers[i]` is its number in the file."""

    def __init__(self, marks: Marks, sketches: near.Sketches | None, most_sketches: int):
        self.marks, self.sketches, self.most_sketches = marks, sketches, most_sketches
        self.numbers, self.row_keys, self.question_keys, self.answer_keys = (array("q") for _ in range(4))
        self.row_characters, self.answer_characters = array("I"), array("I")
        self.writings: tuple[bytearray, bytearray] = (bytearray(), bytearray())
        self.hits: dict[str, array[int]] = {}
        self.shown: dict[str, list[tuple[int, str]]] = {}
        self.details: dict[str, Counter[str]] = {}
        self.empty: dict[str, array[int]] = {}
        self.several_turns = self.with_system = 0

    def over(self, outcomes: Iterable[Any]) -> Iterator[Conversation]:
        """Hands on the readable rows, each when it has been looked at."""
        for number, row, found in outcomes:
            if isinstance(found, Conversation):
                self.fields(number, row)
                self.add(found)
                yield found

    def fields(self, number: int, row: Any) -> None:
        """Counts the fields of a row, as it stands in the file, that hold nothing."""
        for key, value in row.items():
            if (value is None or isinstance(value, str) and not value.strip()) and key in FIELDS:
                self.empty.setdefault(key, array("q")).append(number)

    def add(self, row: Conversation) -> None:
        messages = row.messages
        answer = messages[-1].content.strip()
        self.numbers.append(row.row)
        self.with_system += messages[0].role == "system"
        self.several_turns += len(messages) > 3 or len(messages) == 3 and messages[0].role != "system"
        self.row_keys.append(row_key(messages))
        self.question_keys.append(question_key(messages))
        self.answer_keys.append(hash(answer))
        self.row_characters.append(sum(len(m.content) for m in messages))
        self.answer_characters.extend(len(m.content) for m in messages if m.learn)
        self.writings[0].append(languages.writing(messages[-2].content))
        self.writings[1].append(languages.writing(answer))
        for hit in look(messages, self.marks):
            self.hit(row.row, hit)
        if self.sketches:
            self.sketches.add(said(messages))
            if self.sketches.count > self.most_sketches:
                self.sketches = None

    def hit(self, number: int, hit: Hit) -> None:
        if hit.detail:
            self.details.setdefault(hit.kind, Counter())[visible(hit.detail)[:30]] += 1
        rows = self.hits.setdefault(hit.kind, array("q"))
        if rows and rows[-1] == number:  # once a row
            return
        rows.append(number)
        if len(rows) <= across.EXAMPLES:
            self.shown.setdefault(hit.kind, []).append((number, shown(hit.text, hit.start, hit.end)))


def said(messages: Sequence[Message]) -> str:
    """What a row is compared by for nearness."""
    return "\n".join(m.content for m in messages)


class Held:
    """The held-out file: its rows and questions as hashes, and its texts among the sketches, before the others."""

    def __init__(self, path: str, join: str, sketches: near.Sketches | None, watch: Watch):
        self.path, self.join = path, join
        self.stream = records.stream(path, join)
        self.numbers, self.row_keys, self.question_keys = array("q"), array("q"), array("q")
        for row in watch("reading the held-out rows", lambda: self.stream.fraction, self.stream):
            self.numbers.append(row.row)
            self.row_keys.append(row_key(row.messages))
            self.question_keys.append(question_key(row.messages))
            if sketches:
                sketches.add(said(row.messages))
        records.refuse(self.stream)


def check(
    config: TrainConfig,
    tokenizer: Any = None,
    hub_config: dict[str, Any] | None = None,
    near_duplicates: str = "auto",
    watch: Watch = unwatched,
    kept: Path | None = None,
) -> Report:
    """Reads config.data (and config.eval_data, held out) and says what a person should know of it.

    tokenizer, hub_config: the model's; without them lengths are in characters. near_duplicates: auto, true or false.
    watch: (what, share done, rows) -> rows, shows progress. kept: the folder of encoded rows, as in `dataset.load`.
    UserError: the file can't be read, or no row of it can.
    """
    template = None
    marks = Marks.of()
    if tokenizer is not None:
        from minitune.data.template import Template

        template = Template.choose(tokenizer, config.template, hub_config or {})
        turns = TURNS if template.config.name == "minicpm" else ()
        marks = Marks.of(turns, [*template.specials, tokenizer.eos_token])
    wanted = near_duplicates != "false" and near.available()
    sketches = near.Sketches() if wanted else None
    most = NEAR_ROWS if near_duplicates == "auto" else 1 << 40
    held = Held(config.eval_data, config.template.join, sketches, watch) if config.eval_data else None
    stream = records.stream(config.data, config.template.join)
    survey = Survey(marks, sketches, most)
    passing = survey.over(watch("reading", lambda: stream.fraction, stream.outcomes(lenient=True)))
    encoded = None
    if template:
        from minitune.data import tokens

        encoded = tokens.encode(passing, stream, template, kept)
    deque(passing, maxlen=0)  # where nothing was encoded, or all of it was kept from another run
    if not survey.numbers:
        records.refuse(stream)
    report = conclude(config, stream, survey, held, watch)
    if near_duplicates != "false":
        report.notes += near_note(wanted, survey)
    if template and encoded is not None:
        add_tokens(report, encoded, config, template)
    return report


def add_tokens(report: Report, rows: EncodedRows, config: TrainConfig, template: Template) -> None:
    """Lengths in tokens, and what is too long."""
    from minitune.data import tokens

    report.model, report.template, report.max_length = config.model, template.config.name, config.max_length
    report.lengths = [Lengths("a row", "tokens", rows.lengths), Lengths("an answer", "tokens", tokens.answers(rows))]
    report.add(tokens.too_long(rows, config, template.tokenizer))


def near_note(wanted: bool, survey: Survey) -> list[str]:
    """Why near duplicates were not looked for, where they were not."""
    if not wanted:
        return ["near duplicates were not looked for: `pip install rensa`, or --near false"]
    if survey.sketches is None:
        return [f"near duplicates are looked for in up to {NEAR_ROWS:,} rows; --near true looks in any number"]
    return []


def conclude(config: TrainConfig, stream: records.Stream, survey: Survey, held: Held | None, watch: Watch) -> Report:
    """The report of a whole file."""
    import numpy as np

    numbers, rows, questions, answers = (
        np.frombuffer(part, np.int64)
        for part in (survey.numbers, survey.row_keys, survey.question_keys, survey.answer_keys)
    )
    found = [
        across.duplicates(numbers, rows),
        across.conflicts(numbers, questions, answers),
        across.mixed_languages(numbers, survey.writings),
    ]
    if held:
        found.append(across.leaks(held, numbers, rows, questions))
    findings = [finding for some, _ in found for finding in some]
    join = config.template.join
    across.show([wanted for _, many in found for wanted in many], config.data, join)
    near_rows: frozenset[int] = frozenset()
    if survey.sketches:
        before = len(held.numbers) if held else 0
        keys, every = rows, numbers
        if held:
            keys = np.concatenate([np.array(held.row_keys, np.int64), rows])
            every = np.concatenate([np.array(held.numbers, np.int64), numbers])

        def read(wanted: set[int]) -> Iterator[tuple[int, str]]:
            index = {(i >= before, int(every[i])): i for i in wanted}
            for path, here in ((config.eval_data, False), (config.data, True)):
                part = {number for inside, number in index if inside == here}
                for c in across.again(path, join, part):
                    yield index[here, c.row], said(c.messages)

        near_found, near_rows = across.near_duplicates(survey.sketches, keys, every, read, before)
        findings += near_found
    findings += [*faults(stream), *hits(survey), *empty_fields(survey, stream.count)]
    return Report(
        file=config.data,
        form=stream.form,
        kind=stream.kind,
        unit=stream.unit,
        readable=len(numbers),
        counts={
            "different questions": len(np.unique(questions)),
            "answers": len(survey.answer_characters),
            "rows of several turns": survey.several_turns,
            "rows with a system text": survey.with_system,
            "rows that can't be learned from": len(stream.faults),
        },
        lengths=lengths(survey),
        findings=findings,
        notes=stream.notes,
        held=frozenset(held.row_keys) if held else frozenset(),
        near=near_rows,
        marks=survey.marks,
    )


def lengths(survey: Survey) -> list[Lengths]:
    import numpy as np

    return [
        Lengths("a row", "characters", np.frombuffer(survey.row_characters, np.uint32)),
        Lengths("an answer", "characters", np.frombuffer(survey.answer_characters, np.uint32)),
    ]


def faults(stream: records.Stream) -> list[Finding]:
    """The rows that can't be learned from, by what is wrong with them."""
    kinds: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for number, fault in stream.faults:
        kinds.setdefault((fault.problem, fault.mend), []).append((number, fault.at))
    out = []
    for (problem, mend), rows in sorted(kinds.items(), key=lambda kind: -len(kind[1])):
        finding = Finding("blank" if problem.endswith(" is empty") else "unreadable", [n for n, _ in rows],
                          {"problem": visible(problem), "mend": visible(mend)})  # fmt: skip
        finding.examples = [(n, at) for n, at in rows[: across.EXAMPLES] if at]
        out.append(finding)
    return out


def hits(survey: Survey) -> list[Finding]:
    """What was found in the texts of single rows."""
    out = []
    for kind, rows in survey.hits.items():
        counted = survey.details.get(kind, Counter()).most_common(4)
        words = ", ".join(f"{name}: {count:,}" for name, count in counted)
        out.append(Finding(kind, rows.tolist(), {"found": words}, survey.shown[kind]))
    return out


def empty_fields(survey: Survey, count: int) -> list[Finding]:
    out = []
    for name, rows in survey.empty.items():
        share = f"all {count:,} rows" if len(rows) == count else f"{len(rows):,} of {count:,} rows"
        out.append(Finding("empty_field", rows.tolist(), {"field": name, "share": share}))
    return out
