"""What was written, compared with the model that was trained: both run over the same prompts, a layer at a time.

The trained model is the base with its adapter beside it, in float32; the written one is read back from disk, by our
own readers, and computed in float32 too, so that what differs is what is stored. Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minitune.checkpoint.weights import EMBED, HEAD
from minitune.config import UserError
from minitune.export.source import Source
from minitune.export.stream import Stored, chunks, hidden, logits

if TYPE_CHECKING:
    from minitune.data.template import Template
    from minitune.model.decoder import DecoderConfig

POSITIONS = 256  # compared at a time: two tensors of that by the vocabulary
MOST = 2048  # tokens compared at most
DECIDED = 0.1  # of probability between the two likeliest tokens, from which another choice is one that counts
NUMBERS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "embedding_multiplier"),
    *("residual_multiplier", "attention_scale", "logits_scaling", "max_position_embeddings"),
)
FEW = 20  # decided tokens, below which their share says nothing


@dataclass(frozen=True)
class Limits:
    """What is an error. tensor: the length of a weight's difference, against the weight's; largest: of the logits'
    difference, against the largest logit; kl: nats a token, mean; agreement: of the likeliest tokens where the
    trained model is decided, at least."""

    tensor: float
    largest: float | None
    kl: float
    agreement: float


# float32 holds what was trained, up to the order of sums. Less is judged by what a sound file shows (bench/RESULTS.md),
# times three or more: a tensor in the wrong order or of another place differs by 1 or more from the one that was
# meant, which four bits' noise in the logits could hide; a scaling that is lost shows in the logits alone.
LIMITS = {
    "float32": Limits(1e-5, 1e-4, 1e-4, 0.99),
    "float16": Limits(0.002, None, 0.005, 0.97),
    "bfloat16": Limits(0.01, None, 0.05, 0.9),
    "q8_0": Limits(0.03, None, 0.05, 0.9),
    "6 bits": Limits(0.1, None, 0.25, 0.8),
    "4 bits": Limits(0.35, None, 1.5, 0.5),
}


@dataclass(frozen=True)
class Comparison:
    """largest: difference of two logits, against the largest logit. kl: of the written model's distribution from the
    trained one's, nats, mean over tokens. agreement: how often the likeliest token is the same; decided: the same
    where the trained model is decided. tensor, where: the weight that differs most, and by what share."""

    largest: float
    kl: float
    agreement: float
    decided: float
    tokens: int
    prompts: str
    tensor: float
    where: str

    def line(self) -> str:
        return (
            f"largest difference {self.largest:.1e} of the largest logit, KL divergence {self.kl:.2g} nats a token, "
            f"likeliest token equal in {self.agreement:.1%} of {self.tokens:,} ({self.prompts})"
        )

    def check(self, kind: str) -> None:
        """UserError where the file is not the model that was trained. `kind`: a key of LIMITS."""
        limits = LIMITS[kind]
        if not self.tensor <= limits.tensor:  # also what is not a number
            raise UserError(
                f"what was written is not the model that was trained: {self.where} differs by {self.tensor:.2g} of "
                f"itself (at {kind} the bound is {limits.tensor:g}); nothing is kept"
            )
        near = limits.largest is None or self.largest <= limits.largest
        if near and self.kl <= limits.kl and self.decided >= limits.agreement:
            return
        most = f"{limits.largest:g} of the largest logit, " if limits.largest is not None else ""
        raise UserError(
            f"what was written is not the model that was trained: {self.line()}; at {kind} the bounds are {most}"
            f"{limits.kl:g} nats, {limits.agreement:.0%} where the model is decided (it is {self.decided:.1%}); "
            "nothing is kept"
        )


class Differences:
    """How far each weight is from the one that was meant."""

    def __init__(self, source: Source):
        self.source, self.worst, self.where = source, 0.0, ""

    def see(self, name: str, weight: Tensor) -> None:
        self.add(name, weight, self.source.merged(name))

    def add(self, name: str, weight: Tensor, meant: Tensor) -> None:
        difference = ((weight - meant).norm() / meant.float().norm().clamp(min=1e-30)).item()
        if self.worst == self.worst and not difference <= self.worst:  # what is not a number stays the worst
            self.worst, self.where = difference, name


@torch.no_grad()
def compare(
    source: Source, trained_TH: Tensor, written: Stored, documents: Sequence[Sequence[int]], prompts: str
) -> Comparison:
    """Runs the written model over the documents whose hidden states in the trained one are `trained_TH`."""
    same_numbers(source.decoder.config, written.decoder.config)
    differences = Differences(source)
    written_TH = hidden(written, documents, see=differences.see)
    for name in (EMBED, HEAD):
        if name in source.shapes:
            for (_, meant), (start, weight) in zip(chunks(source, name), chunks(written, name), strict=True):
                differences.add(f"{name} from row {start}", weight, meant)
    totals = torch.zeros(6, dtype=torch.float64)
    for at in range(0, len(trained_TH), POSITIONS):
        ours, theirs = (logits(m, h[at : at + POSITIONS]) for m, h in ((source, trained_TH), (written, written_TH)))
        totals = _joined(totals, _difference(ours, theirs))
    largest, top, kl, equal, decided, decided_equal = totals.tolist()
    count = len(trained_TH)
    return Comparison(
        largest=largest / max(top, 1e-30),
        kl=kl / count,
        agreement=equal / count,
        decided=decided_equal / decided if decided >= FEW else 1.0,
        tokens=count,
        prompts=prompts,
        tensor=differences.worst,
        where=differences.where,
    )


def same_numbers(meant: DecoderConfig, written: DecoderConfig) -> None:
    """UserError where a size, a scaling or the positions of the written config are not the model's."""
    for name in NUMBERS:
        one, other = getattr(meant, name), getattr(written, name)
        if not math.isclose(one, other, rel_tol=1e-6):
            raise UserError(
                f"what was written is not the model that was trained: {name} is {other:g}, not {one:g}; nothing is kept"
            )
    at_T = torch.tensor([1, 7, 100])
    tables = [config.rope()(at_T, torch.full_like(at_T, 101)) for config in (meant, written)]
    if not all(torch.allclose(a, b, rtol=0, atol=1e-4) for a, b in zip(*tables, strict=True)):
        raise UserError("what was written is not the model that was trained: other positions; nothing is kept")


def _difference(p_TV: Tensor, q_TV: Tensor) -> Tensor:
    """[largest difference, largest logit, sum of divergences, equal choices, decided tokens, equal ones of these]"""
    equal_T = p_TV.argmax(-1) == q_TV.argmax(-1)
    two = p_TV.softmax(-1).topk(2, -1).values
    decided_T = two[:, 0] - two[:, 1] > DECIDED
    worst, top, kl = (p_TV - q_TV).abs().max(), p_TV.abs().max(), divergence(p_TV, q_TV).sum()
    return torch.stack(
        [x.double() for x in (worst, top, kl, equal_T.sum(), decided_T.sum(), (decided_T & equal_T).sum())]
    )


def _joined(one: Tensor, other: Tensor) -> Tensor:
    """The largest of the first two, the sums of the rest; torch's maximum keeps what is not a number."""
    return torch.cat([torch.maximum(one[:2], other[:2]), one[2:] + other[2:]])


def divergence(p_TV: Tensor, q_TV: Tensor) -> Tensor:
    """Kullback-Leibler divergence [T], in nats, of the distributions of two tensors of logits."""
    out = []
    for p, q in zip(p_TV.split(16), q_TV.split(16), strict=True):  # in float64: not all of it at once
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        out.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(out)


def prompts(template: Template | None, vocabulary: int) -> tuple[list[list[int]], str]:
    """The built-in conversations as the model was trained to see them, and their name; else ids at random."""
    from minitune.data.forms import Message
    from minitune.export.report import CONVERSATIONS

    out: list[list[int]] = []
    for conversation in CONVERSATIONS if template is not None else ():
        messages = [Message(role, content) for role, content in conversation[:-1]]  # type: ignore[arg-type]
        assert template is not None
        out.append(template.encode(messages).input_ids)
    if out and max(map(max, out)) < vocabulary:
        return out, "built-in prompts"
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (4, 48), generator=generator).tolist(), "random ids"


def held_out(template: Template, path: str, max_length: int = 512) -> list[list[int]]:
    """The first rows of a file of conversations, MOST tokens of them. UserError for a file that is not one."""
    from minitune.data import records

    out: list[list[int]] = []
    room = MOST
    for conversation in records.load(path, join=template.config.join).conversations:
        row = template.encode(conversation.messages).input_ids[: min(max_length, room)]
        if len(row) > 1:
            out.append(row)
            room -= len(row)
        if room < 2:
            break
    if not out:
        raise UserError(f"{path}: holds no conversation to verify with")
    return out
