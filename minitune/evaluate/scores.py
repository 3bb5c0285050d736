"""BLEU (sacrebleu) and ROUGE (rouge-score) against the wanted answers, Chinese split into characters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minitune.config import UserError

MISSING = "BLEU and ROUGE need two small packages: pip install 'minitune[eval]'"


@dataclass(frozen=True)
class Scores:
    """All from 0 to 100. bleu: of the corpus; rouge: F1, the mean over answers. signature: sacrebleu's, for reports."""

    bleu: float
    rouge1: float
    rouge2: float
    rougeL: float
    signature: str
    tokenizer: str


def is_chinese(texts: Sequence[str]) -> bool:
    """Whether Chinese characters are a fifth of the letters or more."""
    letters = [c for text in texts for c in text if c.isalnum()]
    return sum("\u3400" <= c <= "\u9fff" or "\U00020000" <= c <= "\U0003ffff" for c in letters) * 5 > len(letters)


def score(answers: Sequence[str], wanted: Sequence[str]) -> Scores:
    """Of answers against one reference each. UserError where the packages are missing.

    Chinese in the references: sacrebleu's `zh` splits every Chinese character and keeps Latin words whole; otherwise
    its standard `13a`. ROUGE counts the same units, in lower case.
    """
    try:
        import sacrebleu
        from rouge_score import rouge_scorer
    except ImportError:
        raise UserError(MISSING) from None
    name = "zh" if is_chinese(wanted) else "13a"
    bleu = sacrebleu.BLEU(tokenize=name)
    total = bleu.corpus_score(list(answers), [list(wanted)])
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = rouge_scorer.RougeScorer(kinds, tokenizer=Units(bleu.tokenizer))
    sums = dict.fromkeys(kinds, 0.0)
    for answer, reference in zip(answers, wanted, strict=True):
        for kind, found in scorer.score(reference, answer).items():
            sums[kind] += 100 * found.fmeasure / len(answers)
    rouge1, rouge2, rouge_l = (sums[kind] for kind in kinds)
    return Scores(total.score, rouge1, rouge2, rouge_l, str(bleu.get_signature()), name)


class Units:
    """sacrebleu's tokenizer as rouge-score wants one."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def tokenize(self, text: str) -> list[str]:
        return self.tokenizer(text.lower()).split()
