"""Which rows share a packed step, and where each of them lies in it: read off the tensors that the step is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minitune.config import UserError
from minitune.data.loader import Loader, Pack
from minitune.data.preview import Unit, units
from minitune.data.template import IGNORED, Encoded


@dataclass(frozen=True)
class Document:
    """One row in a pack: tokens start…end - 1 of it, which are positions first…last of the model."""

    row: int
    start: int
    end: int
    first: int
    last: int
    learned: tuple[bool, ...]
    head: list[Unit]
    tail: list[Unit]

    @property
    def tokens(self) -> int:
        return self.end - self.start

    @property
    def elided(self) -> bool:
        """Whether anything lies between the ends that are shown."""
        return bool(self.tail) and self.tail[0].at > self.head[-1].at + len(self.head[-1].ids)


@dataclass(frozen=True)
class PackView:
    """A pack: `places` positions are computed, of which the documents fill `tokens`."""

    documents: list[Document]
    cu_seqlens: list[int]
    places: int

    @property
    def tokens(self) -> int:
        return self.cu_seqlens[-1]

    @property
    def padding(self) -> float:
        """The share of computed positions that are no row's token."""
        return 1 - self.tokens / self.places

    @property
    def padded(self) -> float:
        """What that share would be with a row a line, each as long as the longest."""
        return 1 - self.tokens / (len(self.documents) * max(d.tokens for d in self.documents))


@dataclass(frozen=True)
class Step:
    """The packs of step `number` (from 1) of `steps` in an epoch; `capacity`: tokens a pack at most."""

    number: int
    steps: int
    epoch: int
    capacity: int
    packs: list[PackView]

    @property
    def rows(self) -> int:
        return sum(len(p.documents) for p in self.packs)

    @property
    def tokens(self) -> int:
        return sum(p.tokens for p in self.packs)

    @property
    def learned(self) -> int:
        return sum(sum(d.learned) for p in self.packs for d in p.documents)

    def heading(self) -> str:
        share = self.learned / self.tokens
        packs = f"{len(self.packs)} pack{'s' * (len(self.packs) != 1)} of at most {self.capacity:,} tokens"
        return (
            f"step {self.number:,} of {self.steps:,} in epoch {self.epoch}: {self.rows} rows, {self.tokens:,} tokens, "
            f"{self.learned:,} learned ({share:.0%}), in {packs}"
        )


def describe(pack: PackView, number: int) -> str:
    """A line about a pack."""
    count = len(pack.documents)
    rows = f"{count} document{'s' * (count != 1)}"
    padding = f"{pack.padding:.1%} padding" if pack.padding else "no padding"
    other = f"; padded to the longest row {pack.padded:.0%} would be padding" if count > 1 else ""
    return f"pack {number}: {pack.tokens:,} tokens in {rows}, {padding}{other}"


def view(loader: Loader, number: int, row_numbers: Sequence[int], tokenizer: Any, most: int = 2) -> Step:
    """Step `number` (from 1, counted through the epochs) as the loader makes it.

    row_numbers: the number in the file of each of the loader's rows. most: units shown of a document's ends.
    """
    epoch, at = 0, number - 1
    if at < 0:
        raise UserError(f"--step is {number}; steps are counted from 1")
    while at >= len(loader.steps(epoch)):
        at -= len(loader.steps(epoch))
        epoch += 1
        if epoch > 1000:
            raise UserError(f"--step is {number}: there are {len(loader.steps(0)):,} steps an epoch")
    batch = loader.batch(epoch, at)
    packs = [_pack(pack, loader.rows, row_numbers, tokenizer, most) for pack in batch.packs]
    return Step(at + 1, len(loader.steps(epoch)), epoch + 1, loader.tokens_per_pack, packs)


def _pack(pack: Pack, rows: Sequence[Encoded], numbers: Sequence[int], tokenizer: Any, most: int) -> PackView:
    bounds = pack.cu_seqlens.tolist()
    uids, positions, predict = pack.token_uids.tolist(), pack.position_ids.tolist(), set(pack.predict.tolist())
    documents = []
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        if start == end:  # `cu_seqlens` of a fixed shape repeat the end
            continue
        index = uids[start] >> 24  # a token's uid names its row
        # logits at i - 1 are asked for token i
        learned = tuple(at - 1 in predict and at > start for at in range(start, end))
        ids = pack.input_ids[start:end].tolist()
        labels = [i if says else IGNORED for i, says in zip(ids, learned, strict=True)]
        shown = units(Encoded(ids, labels), tokenizer)
        documents.append(
            Document(numbers[index], start, end, positions[start], positions[end - 1], learned, shown[:most],
                     shown[max(most, len(shown) - most) :])
        )  # fmt: skip
    return PackView(documents, list(dict.fromkeys(bounds)), len(pack.input_ids))
