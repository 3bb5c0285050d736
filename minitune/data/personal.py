"""Personal data that a text may hold, found by pattern and checked where it carries a check digit.

Meant for few false alarms: numbers inside longer numbers, words or addresses are left alone, and so are the
examples that manuals print.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

BEFORE, AFTER = r"(?<![0-9A-Za-z_./=@#-])", r"(?![0-9A-Za-z_@%=]|[./-]\d)"
# A mobile number in mainland China: 1, a carrier's digit 3 to 9, nine more; 3-4-4 apart where it is written apart.
MOBILE = re.compile(rf"{BEFORE}(?:(?:\+|00)?86[- ]?)?(1[3-9]\d)([- ]?)(\d{{4}})\2(\d{{4}}){AFTER}")
# GB 11643: six digits of a region, a birthday, three of an order, one that checks the others.
REGION = r"(?:1[1-5]|2[1-3]|3[1-7]|4[1-6]|5[0-4]|6[1-5]|71|8[1-3])"
IDENTITY = re.compile(
    rf"{BEFORE}{REGION}\d{{4}}(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{{3}}[\dXx]{AFTER}"
)
EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+/:=-])[A-Za-z0-9][A-Za-z0-9._%+-]*@((?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,24})(?![A-Za-z0-9@])"
)
# UnionPay 62, Visa 4, Mastercard 51 to 55 and 2221 to 2720, American Express 34 and 37: whole, or apart by fours.
CARD = re.compile(rf"{BEFORE}(?:62|4|5[1-5]|2[2-7]|3[47])\d(?:[ -]?\d){{11,16}}{AFTER}")
MAYBE = re.compile(r"@|\d[\d -]{9}")
EXAMPLE_DOMAINS = re.compile(
    r"(?:^|\.)(?:example|test|invalid|localhost|domain|email|yourdomain|xxx+|abc|company)\.[a-z.]+$"
    r"|\.(?:png|jpe?g|gif|svg|js|py)$",
    re.IGNORECASE,
)
EXAMPLE_CARDS = re.compile(
    "4111111111111111|4242424242424242|5555555555554444|5105105105105100|4012888888881881|378282246310005"
)


@dataclass(frozen=True)
class Kind:
    """One kind of personal data: how it is called, in a note and in the place of what is masked."""

    name: str
    chinese: str
    pattern: re.Pattern[str]
    right: Callable[[re.Match[str]], bool]


def _mobile(found: re.Match[str]) -> bool:
    last = found[3] + found[4]
    return len(set(last)) > 1 and last not in ("12345678", "00138000", "87654321")


def _identity(found: re.Match[str]) -> bool:
    text = found[0]
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
    check = "10X98765432"[sum(int(d) * w for d, w in zip(text, weights, strict=False)) % 11]
    return text[17].upper() == check


def _card(found: re.Match[str]) -> bool:
    digits = re.sub(r"\D", "", found[0])
    if EXAMPLE_CARDS.fullmatch(digits) or len(set(digits)) < 4:
        return False
    lengths = {"6": range(16, 20), "4": (16,), "5": (16,), "2": (16,), "3": (15,)}
    return len(digits) in lengths[digits[0]] and luhn(digits)


def luhn(digits: str) -> bool:
    """Whether the last digit checks the others (ISO/IEC 7812)."""
    doubled = (sum(divmod(2 * int(d), 10)) for d in digits[-2::-2])
    return (sum(map(int, digits[-1::-2])) + sum(doubled)) % 10 == 0


def _email(found: re.Match[str]) -> bool:
    return not EXAMPLE_DOMAINS.search(found[1]) and not found[0].lower().startswith(("noreply@", "no-reply@", "git@"))


# In this order: an ID card's digits are not looked at again as a bank card.
KINDS = (
    Kind("ID card number", "身份证号", IDENTITY, _identity),
    Kind("bank card number", "银行卡号", CARD, _card),
    Kind("mobile number", "手机号", MOBILE, _mobile),
    Kind("e-mail address", "邮箱", EMAIL, _email),
)


def find(text: str) -> list[tuple[Kind, int, int]]:
    """(kind, start, end) of each piece of personal data, in the text's order."""
    if not MAYBE.search(text):
        return []
    out: list[tuple[Kind, int, int]] = []
    for kind in KINDS:
        for found in kind.pattern.finditer(text):
            start, end = found.span()
            if kind.right(found) and not any(s < end and start < e for _, s, e in out):
                out.append((kind, start, end))
    return sorted(out, key=lambda piece: piece[1])


def mask(text: str) -> str:
    """The text with a word in brackets for each: [手机号] in Chinese text, [mobile number] elsewhere."""
    chinese = any("\u4e00" <= c <= "\u9fff" for c in text)
    return _replaced(text, lambda kind, _: f"[{kind.chinese if chinese else kind.name}]")


def shaded(text: str) -> str:
    """The text with the middle of each piece hidden, for a report that may be passed on."""

    def hide(_: Kind, what: str) -> str:
        keep = max(1, len(what) // 4)
        return f"{what[:keep]}{'*' * (len(what) - 2 * keep)}{what[-keep:]}"

    return _replaced(text, hide)


def _replaced(text: str, by: Callable[[Kind, str], str]) -> str:
    out, at = [], 0
    for kind, start, end in find(text):
        out += [text[at:start], by(kind, text[start:end])]
        at = end
    return "".join([*out, text[at:]])
