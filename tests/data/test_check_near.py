"""Near duplicates: against Jaccard indices of all pairs; personal data: against check digits computed another way."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from datetime import date
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitune.config import TrainConfig
from minitune.data import check as checking
from minitune.data import near, personal
from minitune.data.check import check

HAN = [chr(c) for c in range(0x4E00, 0x4E00 + 300)]


def pieces(text: str) -> frozenset[str]:
    """The shingles, cut out one by one."""
    text = "".join(c for c in text.lower() if c.isalnum())
    width = [3 if ord(c) > 127 else 5 for c in text]
    whole = {text[i : i + w] for i, w in enumerate(width) if i + w <= len(text)}
    return frozenset(whole | {text[: width[0] if text else 0]})


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / len(a | b)


def changed(rng: random.Random, text: str, edits: int) -> str:
    out = list(text)
    for _ in range(edits):
        out[rng.randrange(len(out))] = rng.choice(HAN)
    return "".join(out)


def family(count: int, seed: int) -> list[str]:
    """Texts of all lengths in two scripts, many of them changed copies of an earlier one."""
    rng = random.Random(seed)
    texts: list[str] = []
    while len(texts) < count:
        if texts and rng.random() < 0.5:
            texts.append(changed(rng, rng.choice(texts), rng.randint(1, 5)))
        elif rng.random() < 0.5:
            texts.append("".join(rng.choices(HAN, k=rng.randint(1, 120))))
        else:
            words = ("".join(rng.choices("abcdefghij", k=rng.randint(1, 8))) for _ in range(rng.randint(1, 40)))
            texts.append(" ".join(words))
    return list(dict.fromkeys(texts))


def test_shingles_and_their_resemblance() -> None:
    """As many shingles as cut out by hand, and the same Jaccard index for each pair."""
    import numpy as np

    texts = [*family(60, 3), "", "啊", "ab", "Ａbc，ＤＥ f！", "abcdef"]
    hashes, offsets = near.shingles(texts)
    sets = [np.unique(hashes[a:b]) for a, b in zip(offsets, offsets[1:], strict=False)]
    assert [len(s) for s in sets[:-2]] == [len(pieces(t)) for t in texts[:-2]]
    assert near.resemblance(sets[-2], sets[-1]) == 1
    for (i, a), (j, b) in combinations(enumerate(texts[:60]), 2):
        assert near.resemblance(sets[i], sets[j]) == pytest.approx(jaccard(pieces(a), pieces(b)))


def test_half_of_each_script() -> None:
    """A word more does not make another text of one that is half Chinese, half English."""
    import numpy as np

    text = "".join(f"{a}{b}" for a, b in zip(HAN, "the quick brown fox jumps over the lazy dog " * 4, strict=False))
    hashes, offsets = near.shingles([text, text + " over"])
    a, b = (np.unique(hashes[start:end]) for start, end in zip(offsets, offsets[1:], strict=False))
    assert near.resemblance(a, b) > 0.9


def test_pairs_against_every_pair() -> None:
    """No pair below the line is told, and of the rows that have an earlier near one, at most one in fifty is missed."""
    import numpy as np

    pytest.importorskip("rensa", reason="rensa is not installed")
    texts = family(700, 5)
    sketches = near.Sketches()
    for text in texts:
        sketches.add(text)

    def read(numbers: set[int]) -> Iterator[tuple[int, str]]:
        return ((i, texts[i]) for i in sorted(numbers))

    found = near.confirmed(sketches.candidates(np.arange(len(texts))), read)
    sets = [pieces(t) for t in texts]
    assert all(i < j and score == pytest.approx(jaccard(sets[i], sets[j])) and score >= 0.8 for i, j, score in found)
    true = {
        j
        for i, j in combinations(range(len(texts)), 2)
        if 1.3 * len(sets[j]) >= len(sets[i]) and jaccard(sets[i], sets[j]) >= 0.8
    }
    later = {j for _, j, _ in found}
    assert later <= true and len(later) >= 0.98 * len(true) and len(true) > 100


def test_near_rows_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies word for word are not told again; --near false looks for none, auto for none in a large file, and says so."""
    pytest.importorskip("rensa", reason="rensa is not installed")
    rng = random.Random(2)
    rows = [
        {"instruction": "问题" + "".join(rng.choices(HAN, k=20)), "output": "".join(rng.choices(HAN, k=60))}
        for _ in range(30)
    ]
    rows += [rows[3], rows[5] | {"output": rows[5]["output"] + "啊"}, rows[8] | {"output": f"{rows[8]['output']}！？"}]
    path = tmp_path / "x.json"
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    config = TrainConfig(data=str(path))
    report = check(config, near_duplicates="auto")
    (found,) = (f for f in report.findings if f.kind == "near")
    assert (list(found.rows), list(found.of)) == ([32, 33], [6, 9]) and report.near == {32, 33}
    assert found.examples[1][1].startswith("100% as 9: ")
    assert not any(f.kind == "near" for f in check(config, near_duplicates="false").findings)
    monkeypatch.setattr(checking, "NEAR_ROWS", 32)
    report = check(config, near_duplicates="auto")
    assert not any(f.kind == "near" for f in report.findings) and "--near true" in report.notes[-1]
    assert any(f.kind == "near" for f in check(config, near_duplicates="true").findings)
    monkeypatch.setattr(near, "available", lambda: False)
    assert "pip install rensa" in check(config).notes[-1]


# Personal data


@given(st.integers(0, 10**13 - 1), st.integers(0, 9))
@settings(max_examples=60)
def test_a_bank_card_has_its_check_digit(body: int, last: int) -> None:
    """UnionPay numbers of 16 digits; Luhn's rule written out: doubled digits of two figures count both."""
    digits = f"622{body:013d}"[:15] + str(last)
    doubled = [int(d) * (2 if i % 2 == 0 else 1) for i, d in enumerate(digits)]
    right = sum(sum(map(int, str(d))) for d in doubled) % 10 == 0
    found = [kind.name for kind, *_ in personal.find(f"卡号{digits}。")]
    assert ("bank card number" in found) == right
    assert found == [
        kind.name for kind, *_ in personal.find("卡号" + " ".join(digits[i : i + 4] for i in range(0, 16, 4)) + "。")
    ]


@given(st.integers(0, 9999), st.dates(), st.integers(0, 999), st.sampled_from("0123456789Xx"))
@settings(max_examples=60)
def test_an_id_card_has_its_check_digit(place: int, born: date, order: int, last: str) -> None:
    """ISO 7064 MOD 11-2 by its definition: the digits, each times a power of two, make 1 modulo 11."""
    text = f"11{place:04d}{born:%Y%m%d}{order:03d}{last}" if born.year >= 1900 and born.year < 2100 else ""
    value = sum((10 if c in "Xx" else int(c)) * 2 ** (17 - i) for i, c in enumerate(text))
    found = [kind.name for kind, *_ in personal.find(f"身份证{text}号")]
    assert ("ID card number" in found) == (bool(text) and value % 11 == 1)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("打13987654320找我", "打[手机号]找我"),
        ("打+86 139-8765-4320 或 139 8765 4320", "打[手机号] 或 [手机号]"),
        ("call 13987654320 or mail li.si+x@mail.qq.com.", "call [mobile number] or mail [e-mail address]."),
        ("身份证11010519491231002X，卡4539578763621486", "身份证[身份证号]，卡[银行卡号]"),
        ("139876543201 1398765432 0.13987654320 A13987654320 /13987654320", None),
        ("13800138000 13812345678 18888888888", None),
        ("user@example.com noreply@x.cn @someone a@b logo@2x.png ssh://git@host.com", None),
    ],
)
def test_what_is_masked(text: str, masked: str | None) -> None:
    assert personal.mask(text) == (masked or text)
    assert len(personal.shaded(text)) == len(text) and (personal.shaded(text) == text) == (masked is None)
