"""Many conversations at once: the rows of `Template.encode`, some thousand a call of the tokenizer.

This thread reads rows and joins ids while others are inside the tokenizer, which lets go of Python's lock: so two cores
are busy without processes, each of which would load a tokenizer. The tokenizer's own threads stay off, as cli sets it
(`TOKENIZERS_PARALLELISM=false`): they start and end with a batch, and a later fork would warn of them.
A text that comes again is encoded once.
"""

from __future__ import annotations

import json
from array import array
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

from minitune.config import UserError
from minitune.data.records import Conversation
from minitune.data.store import Builder, EncodedRows
from minitune.data.template import Part, Segment, Template

ROWS = 1024  # conversations a batch
AHEAD = 3  # batches that wait for the tokenizer while the next is read
THREADS = 2  # in the tokenizer; it takes two to four times as long as all else
REMEMBERED = 4_000_000  # characters of texts whose ids are kept

Text = tuple[str, bool]
Work = list[tuple[int, list[Segment]]]


def encode(conversations: Iterable[Conversation], template: Template) -> EncodedRows:
    """Every conversation as a row. UserError, with the row, where the template can't encode one."""
    texts, out = Texts(template), Builder()
    try:
        with ThreadPoolExecutor(THREADS if texts.alike else 1) as pool:
            waiting: deque[tuple[Work, Answer]] = deque()
            for work in batches(conversations, template, texts.separable):
                waiting.append((work, texts.ask(pool, work)))
                if len(waiting) > AHEAD:
                    join(*waiting.popleft(), out)
            for pair in waiting:
                join(*pair, out)
    finally:
        if isinstance(conversations, Generator):
            conversations.close()  # a progress line around it goes away before an error is said
    return out.rows()


def batches(conversations: Iterable[Conversation], template: Template, separable: bool) -> Iterator[Work]:
    """Some rows with their segments, again and again."""
    source = iter(conversations)
    while rows := list(islice(source, ROWS)):
        work = []
        for row in rows:
            try:
                segments = template.segments(row.messages)
            except UserError as error:
                raise UserError(f"row {row.row}: {error}") from None
            if separable:
                segments = [Segment(list(separate(s.parts, template)), s.learn) for s in segments]
            work.append((row.row, segments))
        yield work


def separate(parts: Sequence[Part], template: Template) -> Iterator[Part]:
    """The parts with rendered stretches cut at their special tokens: so a system text is a text that comes again."""
    for part in parts:
        if isinstance(part, tuple) and not part[1]:
            yield from template.parted(part[0])
        else:
            yield part


class Answer:
    """The ids of a batch's texts: those known before, and those that the tokenizer is at."""

    def __init__(self, known: dict[Text, array], new: list[Text], future: Future[list[array]], texts: Texts):
        self.known, self.new, self.future, self.texts = known, new, future, texts

    def ids(self) -> dict[Text, array]:
        """{text: its ids}; waits for them."""
        found = dict(zip(self.new, self.future.result(), strict=True))
        self.texts.remember(found)
        return self.known | found


def join(work: Work, answer: Answer, out: Builder) -> None:
    """Adds a batch's rows, in order."""
    ids = answer.ids()
    for number, segments in work:
        for segment in segments:
            before = len(out.ids)
            for part in segment.parts:
                if isinstance(part, int):
                    out.ids.append(part)
                else:
                    out.ids.extend(ids[part])
            out.learned += bytes((segment.learn,)) * (len(out.ids) - before)
        out.end(number)


class Texts:
    """Texts -> ids, in the threads of a pool.

    separable: whether rendered stretches are cut at their special tokens. alike: whether all texts are encoded in one
    way, so that several threads may use the tokenizer at once: nothing of it is set between two of them.
    """

    def __init__(self, template: Template):
        self.template, self.tokenizer = template, template.tokenizer
        self.separable = template.config.name == "model" and separable(template)
        self.alike = self.tokenizer.is_fast and (self.separable or template.config.name == "minicpm")
        self._known: dict[Text, array] = {}
        self._held = 0
        if self.tokenizer.is_fast:
            # What a call of the tokenizer sets, and what its file may ask for otherwise.
            self.tokenizer.backend_tokenizer.no_truncation()
            self.tokenizer.backend_tokenizer.no_padding()
            self.tokenizer.backend_tokenizer.encode_special_tokens = True

    def ask(self, pool: ThreadPoolExecutor, work: Work) -> Answer:
        """Sends a batch's texts, each once, to the tokenizer."""
        parts = (part for _, segments in work for s in segments for part in s.parts)
        wanted = dict.fromkeys(part for part in parts if isinstance(part, tuple))
        known = {text: self._known[text] for text in wanted if text in self._known}
        new = [text for text in wanted if text not in known]
        return Answer(known, new, pool.submit(self.encode, new), self)

    def remember(self, found: dict[Text, array]) -> None:
        self._known |= found
        self._held += sum(len(text) for text, _ in found)
        if self._held > REMEMBERED:
            self._known.clear()
            self._held = 0

    def encode(self, texts: Sequence[Text]) -> list[array]:
        """The ids of each text; runs in the pool's thread."""
        if not self.tokenizer.is_fast:
            call = self.tokenizer
            return [
                array(
                    "i", call(text, add_special_tokens=False, split_special_tokens=plain)["input_ids"] if text else []
                )
                for text, plain in texts
            ]
        backend = self.tokenizer.backend_tokenizer
        out: dict[Text, array] = {}
        for plain in (True, False):
            some = [text for text, mode in texts if mode is plain]
            if not some:
                continue
            if backend.encode_special_tokens != plain:
                backend.encode_special_tokens = plain
            for text, found in zip(some, backend.encode_batch_fast(some, add_special_tokens=False), strict=True):
                out[text, plain] = array("i", found.ids if text else [])
        return [out[text] for text in texts]


def separable(template: Template) -> bool:
    """Whether a text's ids are those of its stretches between special tokens, joined.

    `tokenizers` takes special tokens out first and encodes what is between them by itself. What may look beyond is
    refused: tokens that take white space or word boundaries beside them, an ordinary added token that overlaps with a
    special one, and a Metaspace that puts its ▁ in front of a text's first stretch only.
    """
    if not template.tokenizer.is_fast:
        return False
    tokens = template.tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    if any(t.lstrip or t.rstrip or t.single_word or (t.special and t.normalized) for t in tokens):
        return False
    specials = [t.content for t in tokens if t.special]
    for other in (t.content for t in tokens if not t.special):
        if any(s in other or any(s.startswith(other[k:]) for k in range(len(other))) for s in specials):
            return False
    return set(specials) == set(template.specials) and not looks_back(template.tokenizer.backend_tokenizer)


def looks_back(backend: Any) -> bool:
    """Whether a stretch's ids depend on its place in the text."""
    state = json.loads(backend.pre_tokenizer.__getstate__()) if backend.pre_tokenizer is not None else {}
    steps = state.get("pretokenizers", [state])
    return any(step.get("type") == "Metaspace" and step.get("prepend_scheme") == "first" for step in steps)
