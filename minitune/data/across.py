"""What only shows when all rows are seen: copies, conflicting answers, leaks, the norm of languages.

The rows are compared by their hashes, in numpy; the few that a person is shown are read again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from os.path import commonprefix
from typing import Any

from minitune.data import languages, near, records
from minitune.data.findings import Finding, shown
from minitune.data.records import Conversation

EXAMPLES = 3
# A file has a norm where nine rows of ten follow it.
NORM = 0.9
# What an example needs: the finding, its row, the rows to read again, and what is made of them.
Wanted = tuple[Finding, int, tuple[int, ...], Callable[[list[Conversation]], str]]


def again(path: str, join: str, numbers: set[int]) -> Iterator[Conversation]:
    """The conversations of these row numbers, read from the file, no further than the last of them."""
    left = len(numbers)
    for _, _, found in records.stream(path, join).outcomes(lenient=True) if left else ():
        if isinstance(found, Conversation) and found.row in numbers:
            yield found
            left -= 1
            if not left:
                return


def copies(keys: Any) -> tuple[Any, Any]:
    """(indices of rows whose key came before, rising; the index of the first of each)."""
    import numpy as np

    order = np.argsort(keys, kind="stable")
    same = keys[order][1:] == keys[order][:-1]
    first = np.maximum.accumulate(np.where(np.concatenate([[False], same]), 0, np.arange(len(order))))
    later, earlier = order[1:][same], order[first][1:][same]
    rising = np.argsort(later)
    return later[rising], earlier[rising]


def duplicates(numbers: Any, keys: Any) -> tuple[list[Finding], list[Wanted]]:
    """Rows that repeat an earlier one; also the worked-out wish for examples."""
    later, earlier = copies(keys)
    if not len(later):
        return [], []
    finding = Finding("duplicates", numbers[later].tolist(), of=numbers[earlier].tolist())
    pairs = list(zip(finding.rows, finding.of, strict=True))[:EXAMPLES]
    return [finding], [(finding, row, (row,), partial(_short, lead=f"as {of}: ")) for row, of in pairs]


def conflicts(numbers: Any, questions: Any, answers: Any) -> tuple[list[Finding], list[Wanted]]:
    """Questions (with all that stands before them) that have several answers."""
    import numpy as np

    _, first = np.unique(np.stack([questions, answers]), axis=1, return_index=True)
    distinct = np.sort(first)  # the first row of each answer of each question
    keys, at, counts = np.unique(questions[distinct], return_inverse=True, return_counts=True)
    several = keys[counts > 1]
    if not len(several):
        return [], []
    every = numbers[np.isin(questions, several)]
    most = np.argsort(-counts, kind="stable")[:EXAMPLES]
    finding = Finding("conflicts", every.tolist(), {"most": ""}, count=len(several))
    wanted: list[Wanted] = []
    for place, which in enumerate(most[counts[most] > 1]):
        mine = distinct[at == which]
        rows = tuple(numbers[mine[:EXAMPLES]].tolist())
        wanted.append((finding, rows[0], rows, _conflict(finding, place, int(counts[which]))))
    return [finding], wanted


def _conflict(finding: Finding, place: int, count: int) -> Callable[[list[Conversation]], str]:
    def text(found: list[Conversation]) -> str:
        question = shown(found[0].messages[-2].content, most=20)
        if place == 0:
            finding.words["most"] = f" (“{question}” has {count})"
        said = " / ".join(shown(c.messages[-1].content, most=16) for c in found)
        return f"“{question}” {count}: {said}"

    return text


def leaks(held: Any, numbers: Any, rows: Any, questions: Any) -> tuple[list[Finding], list[Wanted]]:
    """Held-out rows that are learned from, word for word; and held-out questions that are, with another answer."""
    import numpy as np

    held_rows, held_questions, held_numbers = (
        np.array(part, dtype=np.int64) for part in (held.row_keys, held.question_keys, held.numbers)
    )
    inside = np.isin(held_rows, rows)
    asked = np.isin(held_questions, questions) & ~inside
    out: list[Finding] = []
    wanted: list[Wanted] = []
    if inside.any():
        sorter = np.argsort(rows, kind="stable")
        of = numbers[sorter[np.searchsorted(rows, held_rows[inside], sorter=sorter)]]
        out.append(Finding("leaked", held_numbers[inside].tolist(), of=of.tolist(), unit="row"))
        for number, of_row in list(zip(out[0].rows, out[0].of, strict=True))[:EXAMPLES]:
            wanted.append((out[0], number, (of_row,), partial(_short, lead=f"as {of_row}: ")))
    if asked.any():
        out.append(Finding("same_question", held_numbers[asked].tolist(), unit="row"))
    return out, wanted


def near_duplicates(
    sketches: near.Sketches, keys: Any, numbers: Any, read: Callable[[set[int]], Iterator[tuple[int, str]]], held: int
) -> tuple[list[Finding], frozenset[int]]:
    """Rows nearly the same as an earlier one, and held-out rows nearly the same as a learned one.

    keys, numbers: of the held-out rows (the first `held`) and then of the others. Copies are not looked at again.
    """
    import numpy as np

    later, _ = copies(keys)
    keep = np.setdiff1d(np.arange(len(keys)), later)
    texts: dict[int, str] = {}

    def reading(wanted: set[int]) -> Iterator[tuple[int, str]]:
        for index, text in read(wanted):
            if len(texts) < 1000:
                texts[index] = text[:2000]
            yield index, text

    found = near.confirmed(sketches.candidates(keep), reading)
    out: list[Finding] = []
    for kind, pairs in (
        ("near", [p for p in found if p[0] >= held]),
        ("near_leaked", [p for p in found if p[0] < held <= p[1]]),
    ):
        if not pairs:
            continue
        if kind == "near_leaked":  # told by the held-out row
            pairs = [(later, earlier, score) for earlier, later, score in pairs]
        finding = Finding(kind, [int(numbers[b]) for _, b, _ in pairs], of=[int(numbers[a]) for a, _, _ in pairs])
        finding.unit = "row" if kind == "near_leaked" else ""
        finding.examples = [
            (int(numbers[b]), f"{score:.0%} as {int(numbers[a])}: {differing(texts[b], texts[a])}")
            for a, b, score in pairs[:EXAMPLES]
            if a in texts and b in texts
        ]
        out.append(finding)
    return out, frozenset(int(numbers[p[1]]) for p in found if p[1] >= held)


def differing(text: str, other: str, most: int = 24) -> str:
    """Two texts side by side, where they begin to differ."""
    at = len(commonprefix((text, other)))
    return " ≠ ".join(shown(t, min(at, max(0, len(t) - 1)), min(at + 1, len(t)), most) for t in (text, other))


def mixed_languages(numbers: Any, writings: tuple[Any, Any]) -> tuple[list[Finding], list[Wanted]]:
    """Rows that are answered in another language than asked, where the file does otherwise; traditional Chinese."""
    import numpy as np

    asked, answered = (np.frombuffer(w, np.uint8) for w in writings)
    names = len(languages.NAMES)
    differing = np.array([[languages.differ(q, a) for a in range(names)] for q in range(names)])
    other = differing[asked, answered]
    told = (asked > 0) & (answered > 0)
    out: list[Finding] = []
    if other.any() and other.sum() <= (1 - NORM) * told.sum():
        pairs = sorted({(int(q), int(a)) for q, a in zip(asked[other], answered[other], strict=True)})
        words = ", ".join(f"{languages.NAMES[q]} → {languages.NAMES[a]}" for q, a in pairs[:3])
        out.append(Finding("languages", numbers[other].tolist(), {"pairs": words}))
    old = answered == languages.TRADITIONAL
    if old.any() and old.sum() <= (1 - NORM) * ((answered == languages.CHINESE).sum() + old.sum()):
        out.append(Finding("traditional", numbers[old].tolist()))
    return out, [(f, row, (row,), _short) for f in out for row in f.rows[:EXAMPLES]]


def _short(found: list[Conversation], lead: str = "") -> str:
    """A row's last question and answer on one line."""
    question, answer = found[0].messages[-2:]
    return f"{lead}{shown(question.content, most=24)} → {shown(answer.content, most=32)}"


def show(wanted: Sequence[Wanted], path: str, join: str) -> None:
    """Reads again the rows that examples need, and hangs each example on its finding."""
    needed = {row for _, _, rows, _ in wanted for row in rows}
    found = {c.row: c for c in again(path, join, needed)}
    for finding, label, rows, text in wanted:
        if all(row in found for row in rows):
            finding.examples.append((label, text([found[row] for row in rows])))
