"""What may be wrong with the texts of one conversation, and how each such finding is called, weighed and mended.

`look` goes through one row; what takes the whole file (duplicates, conflicts, the norm of languages) is in `check`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from minitune.data import personal
from minitune.data.forms import Message
from minitune.data.html import visible

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Kind:
    """One kind of finding. `what` and `mend` are sentences; in `what`, {rows} and [one|many] follow the count.

    fix: `safe` is mended by --fix, a name by --fix_also NAME; `does`: how, where it is not what `mend` says.
    """

    severity: Severity
    what: str
    mend: str
    fix: str = ""
    does: str = "does"


DELETED, FIRST = "deletes the row", "keeps the first"

KINDS: dict[str, Kind] = {
    # Errors: the model would learn what nobody meant, or the file would be refused.
    "blank": Kind("error", "{rows} [has|have] nothing to learn: {problem}", "{mend}", "safe", DELETED),
    "unreadable": Kind("error", "{rows} can't be learned from: {problem}", "{mend}", "unreadable", DELETED),
    "lost_text": Kind("error", "{rows} [holds|hold] U+FFFD, text that was lost in an earlier conversion",
                      "restore the text from its source", "safe", DELETED),
    "mojibake": Kind("error", "{rows} [was|were] decoded with the wrong encoding, like ä½ å¥½ for 你好",
                     "read the source again as what it is, UTF-8 or GBK"),
    "control": Kind("error", "{rows} [holds|hold] control characters, which nobody sees and the model learns",
                    "delete them", "safe"),
    "markers": Kind("error", "{rows} [spells|spell] marks that the template writes ({found}): a false turn, or an "
                    "end that is learned as text", "delete them", "markers"),
    "leaked": Kind("error", "{rows} of the held-out file [is|are] also learned from: its loss will look too good",
                   "take them out of one of the two files", "safe", "takes them out of this one"),
    "cut": Kind("error", "{rows} [is|are] longer than {max_length} tokens, cut at the tail ({lost} tokens lost; no EOS "
                "is learned there)", "give --max_length {longest}, or --overlong drop"),
    "refused": Kind("error", "{rows} [is|are] longer than {max_length} tokens, and --overlong error refuses them",
                    "give --max_length {longest}, or --overlong cut or drop"),
    "unlearnable": Kind("error", "{rows} [has|have] nothing left to learn within {max_length} tokens",
                        "shorten the questions, or give a longer --max_length"),
    # Warnings: worth a look before the hours are spent.
    "duplicates": Kind("warning", "{rows} [repeats|repeat] an earlier row, word for word",
                       "keep one of each: a copy is learned twice", "safe", FIRST),
    "conflicts": Kind("warning", "{count} [question has|questions have] different answers{most}",
                      "fine where talk varies; else keep one", "conflicts", FIRST),
    "near_leaked": Kind("warning", "{rows} of the held-out file [is|are] nearly a row that is learned from",
                        "take them out of one of the two files", "near", "takes them out of this one"),
    "invisible": Kind("warning", "{rows} [holds|hold] zero-width or bidirectional characters", "delete them", "safe"),
    "marker_text": Kind("warning", "{rows} [spells|spell] a special token as text ({found})",
                        "delete it, unless the row is about it", "markers"),
    "languages": Kind("warning", "{rows} [answers|answer] in another language than asked ({pairs}); most do not",
                      "translate one side, or delete the row"),
    "echo": Kind("warning", "{rows} [has|have] an answer that repeats its question",
                 "take the question out of it; delete a row that says nothing else"),
    "personal": Kind("warning", "{rows} [holds|hold] what looks like personal data ({found})",
                     "mask it: models recite what they learn", "personal"),
    "dropped": Kind("warning", "{rows} [is|are] longer than {max_length} tokens, dropped ({lost} tokens)",
                    "give --max_length {longest} to keep them"),
    # Notes: good to know.
    "near": Kind("note", "{rows} [is|are] nearly the same as an earlier row", "keep one of each", "near", FIRST),
    "same_question": Kind("note", "{rows} of the held-out file [asks|ask] a question that is learned, with another "
                          "answer", "fine for talk; else hold out other questions"),
    "traditional": Kind("note", "{rows} [answers|answer] in traditional Chinese, the file in simplified",
                        "convert them, or keep them on purpose"),
    "line_ends": Kind("note", "{rows} [has|have] Windows line ends (CR LF)", "write LF", "safe"),
    "edges": Kind("note", "{rows} [has|have] white space at an edge", "the template strips it", "safe"),
    "empty_field": Kind("note", "`{field}` is empty in {share}", "nothing to do: it may be left out"),
}  # fmt: skip
FIX_ALSO = tuple(dict.fromkeys(kind.fix for kind in KINDS.values() if kind.fix not in ("", "safe")))


@dataclass
class Finding:
    """What was found. rows: every row's number, from 1; examples: (row, text); of: the row that each one repeats."""

    kind: str
    rows: Sequence[int]
    words: dict[str, Any] = field(default_factory=dict)
    examples: list[tuple[int, str]] = field(default_factory=list)
    of: Sequence[int] = ()
    severity: Severity = "note"
    count: int = 0
    unit: str = ""  # what a number counts, where it is no row of the checked file

    def __post_init__(self) -> None:
        self.severity = KINDS[self.kind].severity
        self.count = self.count or len(self.rows)

    def what(self, unit: str = "row") -> str:
        """What was found, in one sentence."""
        unit = self.unit or unit
        one = self.count == 1
        text = re.sub(r"\[([^|\]]*)\|([^\]]*)\]", r"\1" if one else r"\2", KINDS[self.kind].what)
        return text.format(rows=f"{self.count:,} {unit}{'s' * (not one)}", count=f"{self.count:,}", **self.words)

    def mend(self) -> str:
        """What to do, in one line, with the flag that does it."""
        kind = KINDS[self.kind]
        flag = {"": "", "safe": f"; --fix {kind.does}"}.get(kind.fix, f"; --fix_also {kind.fix} {kind.does}")
        return kind.mend.format(**self.words) + flag

    @property
    def safe(self) -> bool:
        """Whether --fix alone mends it."""
        return KINDS[self.kind].fix == "safe"


# Control characters but tab and line feed (CR is looked at by itself), what is not seen, and the sign of lost text.
ODD = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffd"
    "\ufffe\uffff\U000e0000-\U000e007f]"
)
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff]|\r(?!\n)")
LOST = re.compile("\ufffd")
# The sign of lost text, itself decoded wrongly. Once, a text may be about it.
LOST_TWICE = re.compile("(?:锟斤拷){2}|(?:ï¿½){2}")
# Joiners are part of emoji and of Indic and Arabic scripts, direction marks of Hebrew and Arabic, tags of flags.
INVISIBLE = re.compile(
    "[\xad\u180e\u200b\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]"
    "|(?<=[0-9A-Za-z\u3000-\u9fff])[\u200c\u200d]|[\u200c\u200d](?=[0-9A-Za-z\u3000-\u9fff])"
    "|(?<![\U0001f3f4\U000e0000-\U000e007f])[\U000e0000-\U000e007f]"
)
MARKS_OF_DIRECTION = re.compile("[\u061c\u200e\u200f]")
RIGHT_TO_LEFT = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]")
WRONGLY_DECODED = re.compile("[\xc3\xe3-\xe9][\x80-\xff\u0152-\u2122]{1,2}")
# The marks of MiniCPM's template, and special tokens of well-known models.
TURNS = ("<用户>", "<AI>")
MARKERS = (
    r"<\|[A-Za-z][\w▁ -]{0,40}\|>|<｜[^<>｜\n]{1,40}｜>|</?s>|<(?:unk|pad|bos|eos|mask|sep|cls)>|\[/?INST\]"
    r"|<</?SYS>>|<(?:start|end)_of_turn>|\[(?:PAD|UNK|CLS|SEP|MASK|BOS|EOS|gMASK)\]"
)


@dataclass(frozen=True)
class Marks:
    """The marks that must not stand in a content: `turns` open a turn; `own` are the model's special tokens."""

    turns: frozenset[str]
    own: frozenset[str]
    pattern: re.Pattern[str]

    @staticmethod
    def of(turns: Sequence[str] = TURNS, own: Sequence[str] = ()) -> Marks:
        named = sorted((*turns, *TURNS, *own), key=len, reverse=True)
        pattern = "|".join([*map(re.escape, named), MARKERS])
        return Marks(frozenset(turns), frozenset(own), re.compile(pattern))

    def hurts(self, found: re.Match[str], message: Message) -> bool:
        """Whether the mark makes a false turn, or is learned as an answer's text where an end was meant."""
        if found[0] in self.turns:
            return True
        at_edge = not message.content[: found.start()].strip() or not message.content[found.end() :].strip()
        return message.learn and (found[0] in self.own or at_edge)


class Hit(NamedTuple):
    """One find: its kind, the text that it is in, the place in the text that shows it, and what it is there."""

    kind: str
    text: str
    start: int
    end: int
    detail: str = ""


def look(messages: Sequence[Message], marks: Marks) -> Iterator[Hit]:
    """What is found in the texts of one row."""
    asked = ""
    for message in messages:
        text = message.content
        if not text.isascii() or ODD.search(text):
            yield from _odd(text)
        if "\r" in text:
            at = text.index("\r")
            yield Hit("line_ends" if text[at + 1 : at + 2] == "\n" else "control", text, at, at + 1)
        if text != text.strip():
            yield Hit("edges", text, 0, len(text))
        if "<" in text or "[" in text:
            for found in marks.pattern.finditer(text):
                yield Hit("markers" if marks.hurts(found, message) else "marker_text", text, *found.span(), found[0])
        for kind, start, end in personal.find(text):
            yield Hit("personal", text, start, end, kind.name)
        if message.role == "user":
            asked = text.strip()
        elif message.role == "assistant" and repeats(text.strip(), asked):
            yield Hit("echo", text, 0, len(text))


def _odd(text: str) -> Iterator[Hit]:
    lost = LOST.search(text)
    if lost:
        yield Hit("lost_text", text, *lost.span())
    wrong = None if lost else mojibake(text)
    if wrong:
        yield Hit("mojibake", text, *wrong.span())
    if ODD.search(text):
        control = None if wrong else CONTROL.search(text)
        if control:
            yield Hit("control", text, *control.span())
        unseen = INVISIBLE.search(text) or (None if RIGHT_TO_LEFT.search(text) else MARKS_OF_DIRECTION.search(text))
        if unseen:
            yield Hit("invisible", text, *unseen.span())


def mojibake(text: str) -> re.Match[str] | None:
    """Where a text shows that it was decoded with the wrong encoding; its control characters are parts of letters."""
    for found in WRONGLY_DECODED.finditer(text):
        if decoded_again(text[found.start() :].split("\n")[0][:60]):
            return found
    return LOST_TWICE.search(text)


def decoded_again(text: str) -> str:
    """What `text` says when its bytes are read as UTF-8, where that gives Chinese; else nothing."""
    for encoding in ("cp1252", "latin-1"):
        try:
            again = text.encode(encoding, "ignore").decode("utf-8", "ignore")
        except ValueError:
            continue
        if sum("\u4e00" <= c <= "\u9fff" for c in again) >= 2:
            return again
    return ""


def repeats(answer: str, asked: str) -> bool:
    """Whether an answer is its question, or begins with the whole of a question of some length."""
    return len(asked) > 1 and (answer == asked or (len(asked) >= 12 and answer.startswith(asked)))


def shown(text: str, start: int = 0, end: int = 0, most: int = 60) -> str:
    """The text around a place on one line, at most some `most` characters, what is not seen spelled out."""
    room = max(0, most - (end - start)) // 2
    first, last = max(0, start - room), min(len(text), max(end, start) + room)
    if start == 0 and end in (0, len(text)):
        first, last = 0, min(len(text), most)
    part = text[first:last]
    part = f"{'…' if first else ''}{part}{'…' if last < len(text) else ''}"
    part = INVISIBLE.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", part)
    return visible(personal.shaded(part).replace("\r\n", "⏎").replace("\n", "⏎").replace("\t", "⇥"))
