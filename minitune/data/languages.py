"""What writing a text is in, told from its letters: enough to see an answer in another language than its question."""

from __future__ import annotations

import re

NAMES = ("", "Chinese", "traditional Chinese", "Latin letters", "Japanese", "Korean", "Cyrillic", "Arabic", "another")
UNDECIDED, CHINESE, TRADITIONAL, LATIN, JAPANESE = range(5)
HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+")
KANA = re.compile("[\u3041-\u3096\u30a1-\u30fa]+")
LETTERS = re.compile("[A-Za-z\u00c0-\u024f]+")
OTHERS = tuple(
    map(
        re.compile,
        ("[\uac00-\ud7af]+", "[\u0400-\u04ff]+", "[\u0600-\u06ff]+", "[\u0370-\u03ff\u0590-\u05ff\u0900-\u0eff]+"),
    )
)
# Code, addresses and formulas are written in Latin letters in every language.
NO_PROSE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|https?://\S+|\$[^$\n]+\$", re.DOTALL)
CODE = re.compile(r"[=;{}<>_*|\\#]")
# Common characters that only one of the two ways of writing Chinese has.
TRADITIONAL_ONLY = re.compile(
    "[這個們來時說會對為過還後長問學國麼樣開無沒點當經實現話應該讓認為愛聽見覺關係東車馬語讀寫誰請謝]"
)
SIMPLIFIED_ONLY = re.compile(
    "[这个们来时说会对为过还长问学国么样开无没点当经实现话应该让认爱听见觉关东车马语读写谁请谢]"
)
# A Chinese character says about what three letters do; below this much, a text is too short to tell.
A_CHARACTER, ENOUGH = 3, 9


def writing(text: str) -> int:
    """The number in NAMES of what most of the text is written in; 0 where it is short, mixed or no prose."""
    if "`" in text or "http" in text or "$" in text:
        text = NO_PROSE.sub(" ", text)
    if text.isascii():
        return LATIN if _prose(text) else UNDECIDED
    han = A_CHARACTER * sum(map(len, HAN.findall(text)))
    kana = A_CHARACTER * sum(map(len, KANA.findall(text)))
    latin = sum(map(len, LETTERS.findall(text)))
    weights = {CHINESE: han, LATIN: latin}
    if kana * 10 > han + kana:
        weights = {JAPANESE: han + kana, LATIN: latin}
    if 4 * (han + kana + latin) < len(text) * A_CHARACTER:
        weights |= {5 + i: 2 * sum(map(len, found.findall(text))) for i, found in enumerate(OTHERS)}
    best = max(weights, key=lambda name: weights[name])
    if weights[best] < ENOUGH or weights[best] < 0.6 * sum(weights.values()):
        return UNDECIDED
    if best == CHINESE:
        return TRADITIONAL if traditional(text) else CHINESE
    return best if best != LATIN or _prose(text) else UNDECIDED


def traditional(text: str) -> bool:
    """Whether Chinese text is written in traditional characters."""
    found = TRADITIONAL_ONLY.findall(text)
    return len(found) > 1 and not SIMPLIFIED_ONLY.search(text)


def differ(question: int, answer: int) -> bool:
    """Whether both are told and are two languages; the two ways of writing Chinese are one."""
    if not question or not answer:
        return False
    return (CHINESE if question == TRADITIONAL else question) != (CHINESE if answer == TRADITIONAL else answer)


def _prose(text: str) -> bool:
    """Some words of letters, mostly, with spaces between: a sentence, not a number, a name or code."""
    letters = LETTERS.findall(text)
    count = sum(map(len, letters))
    if len(letters) < 4 or 30 * len(CODE.findall(text)) > count:
        return False
    return count + text.count(" ") >= 0.85 * len(text)
