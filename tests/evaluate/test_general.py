"""General text: every token predicted once, the loss that transformers gives, and a verdict that follows from it."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from minitune.checkpoint.tokenizer import load_tokenizer
from minitune.checkpoint.weights import load_model
from minitune.config import UserError
from minitune.evaluate import general
from minitune.evaluate.loss import Losses, losses

TEXT = "你好吗, 我是谁? 今天 is a day.\n" * 9


@pytest.mark.parametrize("length", [7, 40, 500])
def test_every_token_once(twin: Path, length: int) -> None:
    """Windows joined are the text's ids; each begins as the tokenizer begins a text, and each loss is transformers'."""
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(twin)
    windows = general.windows([("", TEXT), ("", ""), ("", "谁?")], tokenizer, length)
    plain = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in (TEXT, "谁?")]
    begins = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    kept = [i for w in windows for i in (w.input_ids[1:] if begins else w.input_ids)]
    assert kept == [i for ids in plain for i in ids] and max(len(w.input_ids) for w in windows) <= length
    model = AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32)
    total = count = 0.0
    with torch.no_grad():
        for window in windows[:128]:
            ids = torch.tensor([window.input_ids])
            total += float(F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum"))
            count += len(window.input_ids) - 1
    found = losses(load_model(twin, device="cpu", dtype="float32"), windows[:128], 256)
    assert found.tokens == count and found.mean == pytest.approx(total / count, abs=2e-5)


def test_a_text_begins_with_bos_where_the_tokenizer_says_so(golden: Any) -> None:
    """MiniCPM's tokenizer puts BOS before a text: it is given, not predicted."""
    tokenizer = load_tokenizer(golden("tokenizer-minicpm"))
    (window,) = general.windows([("", "你好 world")], tokenizer, 64)
    assert window.input_ids == tokenizer("你好 world")["input_ids"] and window.input_ids[0] == 1
    assert window.labels == [-100, *window.input_ids[1:]]
    many = general.windows([("", "你好 world " * 30)], tokenizer, 10)
    assert max(len(w.input_ids) for w in many) == 10 and all(w.input_ids[0] == 1 for w in many)
    spelled = general.windows([("", "a</s>b")], tokenizer, 64)[0]
    assert tokenizer.eos_token_id not in spelled.input_ids, "what a text spells is text"


def test_kinds_of_files(tmp_path: Path, twin: Path) -> None:
    tokenizer = load_tokenizer(twin)
    text, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_text("你好吗", encoding="utf-8-sig")
    lines.write_text('{"text": "你好吗", "source": "x"}\n{"content": "我是谁"}\n', encoding="utf-8")
    assert [t for _, t in general.texts(str(text))] == ["你好吗"]
    assert [t for _, t in general.texts(str(lines))] == ["你好吗", "我是谁"]
    bad, empty, binary = tmp_path / "bad.jsonl", tmp_path / "empty.txt", tmp_path / "b.txt"
    bad.write_text('{"text": "a"}\n{"words": 1}\n', encoding="utf-8")
    empty.write_text("\n", encoding="utf-8")
    empty.write_text("", encoding="utf-8")
    binary.write_bytes("你好".encode("gbk"))
    for path, reason in ((bad, "row 2: no text"), (empty, "no text in it"), (binary, "not UTF-8")):
        with pytest.raises(UserError, match=reason):
            general.read(str(path), tokenizer, 64)


def made(rise: float, noise: float, windows: int, seed: int = 0) -> tuple[Losses, Losses]:
    """Losses of windows before and after, `rise` nats a token apart but for noise of that size a token."""
    draw = random.Random(seed)
    before = [(draw.uniform(2, 4) * n, n) for n in (draw.randint(80, 120) for _ in range(windows))]
    after = [(total + (rise + draw.gauss(0, noise)) * n, n) for total, n in before]
    return Losses(before), Losses(after)


@pytest.mark.parametrize(
    ("rise", "noise", "said"),
    [
        (0.0, 0.01, "nothing forgotten"),
        (0.06, 0.01, "a little forgotten"),
        (0.2, 0.01, "clearly forgotten"),
        (0.9, 0.01, "much forgotten"),
        (-0.2, 0.01, "better than before"),
        (0.1, 3.0, "too close to tell"),
    ],
)
def test_verdicts(rise: float, noise: float, said: str) -> None:
    verdict = general.verdict(*made(rise, noise, 200))
    assert said in verdict.text and "\n" not in verdict.text
    assert f"×{math.exp(verdict.rise):.2f}" in verdict.text


def test_the_standard_error_is_the_spread_of_repetitions() -> None:
    """Against the spread of the mean over 400 drawn sets of windows."""
    rises, errors = [], []
    for seed in range(400):
        verdict = general.verdict(*made(0.1, 0.5, 60, seed))
        rises.append(verdict.rise)
        errors.append(verdict.error)
    mean = sum(rises) / len(rises)
    spread = math.sqrt(sum((r - mean) ** 2 for r in rises) / (len(rises) - 1))
    assert sum(errors) / len(errors) == pytest.approx(spread, rel=0.1)
    one = made(0.5, 0.0, 1)
    assert math.isnan(general.verdict(*one).error) and "much forgotten" in general.verdict(*one).text
