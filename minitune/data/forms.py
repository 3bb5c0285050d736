"""The forms that a row of conversations is written in, and one row -> its messages, checked.

A misspelt key, an empty answer or a turn out of order is a `RowFault`, never a silently empty example.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `learn`: the model learns to say it (assistant turns, unless the data says otherwise)."""

    role: Role
    content: str
    learn: bool = False


@dataclass(frozen=True)
class Form:
    """A way to write a row: the keys that it needs and those that it may have."""

    name: str
    needed: tuple[str, ...]
    optional: tuple[str, ...]


# The first three are one form with other names: alpaca's own, ms-swift's, TRL's.
FORMS = (
    Form("alpaca", ("instruction", "output"), ("input", "system", "history")),
    Form("alpaca", ("query", "response"), ("system", "history")),
    Form("alpaca", ("prompt", "completion"), ("system",)),
    Form("messages", ("messages",), ("system",)),
    Form("sharegpt", ("conversations",), ("system",)),
)
EXPECTED = "`instruction` and `output`, or `messages`, or `conversations`"
SYNONYMS = {"question": "instruction", "context": "input", "answer": "output", "response": "output"}
SYNONYMS |= {"system_prompt": "system", "dialogue": "messages", "dialog": "messages"}
OWN_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}
ROLES: dict[str, dict[str, Role]] = {
    "role": OWN_ROLES,
    "from": OWN_ROLES | {"human": "user", "gpt": "assistant"},
}
CONTENTS = {"role": "content", "from": "value"}
SWITCHES = ("weight", "train", "loss")
OTHER_ROLES = dict.fromkeys(("gpt", "chatgpt", "bot", "ai", "model"), "assistant")
OTHER_ROLES |= {"human": "user", "developer": "system"}
TOOLS = {"tool", "function", "function_call", "tool_call", "tool_response", "observation"}
NO_TOOLS = "tool calls are not learned; delete the row or keep only its text turns"


class RowFault(Exception):
    """What is wrong with one row and the mend; `at` is the place in the row ("message 3")."""

    def __init__(self, problem: str, mend: str, at: str = ""):
        super().__init__(problem)
        self.problem, self.mend, self.at = problem, mend, at


def listing(keys: Iterable[str], most: int = 8) -> str:
    """Keys as a person reads them, the first few where there are many."""
    names = [f"`{key[:40]}`" for key in keys]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def present(row: Any) -> dict[str, Any]:
    """The row without the keys that hold nothing (null, or the NaN that tables write for it)."""
    if not isinstance(row, dict):
        raise RowFault(f"is {kind(row)}, not an object", f"write a row as an object with {EXPECTED}")
    return {key: value for key, value in row.items() if not empty(value)}


def empty(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {bool: "true or false", str: "text", list: "a list", dict: "an object"}
    names |= {int: "a number", float: "a number"}
    return "null" if empty(value) else names.get(type(value), type(value).__name__)


def guess(key: str, wanted: Iterable[str], *, strict: bool) -> str | None:
    """The wanted key that `key` is a misspelling of; strict: as good as surely, since it may be absent."""
    plain = key.strip().casefold()
    plain = SYNONYMS.get(plain, plain)
    near = difflib.get_close_matches(plain, wanted, n=1, cutoff=0.75 if strict else 0.65)
    return near[0] if near and (not strict or abs(len(near[0]) - len(plain)) <= 1) else None


def recognise(keys: Sequence[str]) -> tuple[Form, tuple[str, ...]]:
    """The form of a row with these keys, and its keys that the form has no use for."""
    whole = [form for form in FORMS if all(key in keys for key in form.needed)]
    if len(whole) > 1:
        have = " and ".join(listing(form.needed) for form in whole)
        raise RowFault(f"has both {have}", "keep one of them")
    if not whole:
        raise incomplete(keys)
    form = whole[0]
    other = tuple(key for key in keys if key not in form.needed and key not in form.optional)
    absent = [key for key in form.optional if key not in keys]
    misspelt(other, absent)
    return form, other


def misspelt(keys: Iterable[str], absent: Sequence[str], at: str = "") -> None:
    """Refuse a key that is as good as surely a misspelling of one that may be, and is, absent."""
    for key in keys:
        meant = guess(key, absent, strict=True)
        if meant:
            mend = f"did you mean `{meant}`? rename or delete it"
            raise RowFault(f"unknown key {listing([key])}", mend, at)


def incomplete(keys: Sequence[str]) -> RowFault:
    """The fault of a row with the keys of no form: what is misspelt or missing in the nearest one."""
    best, missing, typos = 0.0, [""], {}
    for form in FORMS:
        absent = [key for key in form.needed if key not in keys]
        spare = [key for key in keys if key not in form.needed and key not in form.optional]
        near = {key: meant for key in spare if (meant := guess(key, absent, strict=False))}
        likeness = sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in near.items())
        score = (len(form.needed) - len(absent) + 0.9 * likeness) / len(form.needed)
        if score > best:
            best, missing, typos = score, absent, near
    if typos:
        word, they = ("key", "it") if len(typos) == 1 else ("keys", "them")
        mend = f"did you mean {listing(typos.values())}? rename {they}"
        return RowFault(f"unknown {word} {listing(typos)}", mend)
    has = f"it has {listing(keys)}" if keys else "it has no keys"
    if not best:
        return RowFault(f"no known form: {has}", f"a row needs {EXPECTED}")
    renamed = missing[0] == "instruction" and "input" in keys
    mend = "rename `input` to `instruction`" if renamed else "add it, or delete the row"
    return RowFault(f"`{missing[0]}` is missing or null ({has})", mend)


def convert(row: dict[str, Any], form: Form, join: str, unused: dict[str, None]) -> tuple[Message, ...]:
    """The messages of one row; keys of its turns that are not used are added to `unused`."""
    if any(row.get(key) not in (None, "", "[]", []) for key in ("tools", "functions")):
        raise RowFault("has tools", NO_TOOLS)
    messages: list[Message] = []
    system = text(row.get("system", ""), "`system`")
    if system.strip():
        messages.append(Message("system", system))
    if form.name == "alpaca":
        add_pairs(messages, row, form, join)
    else:
        add_turns(messages, row[form.needed[0]], form.needed[0], unused)
    return tuple(messages)


def text(value: Any, name: str, at: str = "") -> str:
    """`value` where it is text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise RowFault(f"{name} is {kind(value)}, not text", "write it in quotes, as one text", at)
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            code = f"\\u{ord(value[error.start]):04x}"
            mend = "write the whole character or delete the half"
            raise RowFault(f"{name} has half a character (unpaired surrogate {code})", mend, at) from None
    return value


def spoken(value: Any, name: str, mend: str, at: str = "") -> str:
    """`text` that is not blank."""
    value = text(value, name, at)
    if not value.strip():
        raise RowFault(f"{name} is empty", mend, at)
    return value


def as_list(value: Any, name: str) -> list[Any]:
    """A list, or the JSON of one, as the cell of a table holds it."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except (ValueError, RecursionError):
            raise RowFault(f"{name} is text, not a list", "write a JSON list") from None
    if not isinstance(value, list):
        raise RowFault(f"{name} is {kind(value)}, not a list", "write a list")
    return value


def add_pairs(messages: list[Message], row: dict[str, Any], form: Form, join: str) -> None:
    """The alpaca form: earlier pairs from `history`, then the question and its answer."""
    ask, answer = form.needed
    for i, pair in enumerate(as_list(row.get("history", []), "`history`"), 1):
        at = f"history pair {i}"
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowFault("not a [question, answer] pair", "write each as two texts in a list", at)
        asked, said = (spoken(t, "a text of the pair", "write it, or delete the pair", at) for t in pair)
        messages += [Message("user", asked), Message("assistant", said, True)]
    question = text(row[ask], f"`{ask}`")
    name = f"`{ask}`"
    if "input" in form.optional:
        name = f"`{ask}` (and `input`)"
        more = text(row.get("input", ""), "`input`")
        question = join.join(part for part in (question, more) if part)
    messages.append(Message("user", spoken(question, name, "write the question or delete the row")))
    said = spoken(row[answer], f"`{answer}`", "write the answer or delete the row")
    messages.append(Message("assistant", said, True))


def add_turns(messages: list[Message], value: Any, key: str, unused: dict[str, None]) -> None:
    """The messages and sharegpt forms: turns in order, checked against what is learned from."""
    turns = as_list(value, f"`{key}`")
    for i, item in enumerate(turns, 1):
        at = f"message {i}"
        role, content, learn = read_turn(item, at, key, unused)
        before = messages[-1].role if messages else "system"
        if role == "system":
            if i > 1:
                raise RowFault("a system text after the first message", "move it to the front", at)
            if messages and content.strip():
                raise RowFault("a second system text beside the row's own `system`", "keep one of them", at)
            if content.strip():
                messages.append(Message("system", content))
            continue
        if role == "assistant" and before == "system":
            raise RowFault("the first turn is the assistant's", "put a user turn before it, or delete it", at)
        if role == before:
            raise RowFault(f"two {role} turns in a row", "join them, or add the turn between them", at)
        said = spoken(content, f"the {role}'s text", "write it or delete the row", at)
        messages.append(Message(role, said, learn))
    if not any(message.role == "assistant" for message in messages):
        raise RowFault("has no assistant turn", "add the answer, or delete the row")
    if messages[-1].role == "user":
        raise RowFault("ends in a user turn that nothing answers", "add the answer, or delete that turn")
    if not any(message.learn for message in messages):
        raise RowFault("no assistant turn is learned", "let one be learned, or delete the row")


def read_turn(item: Any, at: str, key: str, unused: dict[str, None]) -> tuple[Role, str, bool]:
    """(role, content, learn) of one turn."""
    if not isinstance(item, dict):
        raise RowFault(f"is {kind(item)}, not an object", "a turn has `role` and `content`", at)
    item = present(item)
    who = "role" if "role" in item or "content" in item else "from"
    what = CONTENTS[who]
    if any(item.get(call) for call in ("tool_calls", "function_call")):
        raise RowFault("has a tool call", NO_TOOLS, at)
    extra = [k for k in item if k not in (who, what, *SWITCHES)]
    for wanted in (who, what):
        if wanted not in item and not (wanted == what and is_tool(item[who])):
            misspelt(extra, [wanted], at)
            raise RowFault(f"`{wanted}` is missing or null (it has {listing(item)})", f"add `{wanted}`", at)
    misspelt(extra, [switch for switch in SWITCHES if switch not in item], at)
    unused |= dict.fromkeys(f"{key}[].{k}" for k in extra)
    role = read_role(item[who], who, at)
    return role, read_content(item[what], f"`{what}`", at), learned(item, role, at)


def is_tool(role: Any) -> bool:
    return isinstance(role, str) and role.casefold() in TOOLS


def read_role(value: Any, who: str, at: str) -> Role:
    """The role that `value` names; `from` knows the names human and gpt too."""
    roles = ROLES[who]
    name = text(value, f"`{who}`", at)
    if name in roles:
        return roles[name]
    if is_tool(name):
        raise RowFault(f"the role `{name[:40]}`", NO_TOOLS, at)
    plain = name.strip().casefold()
    near = [OTHER_ROLES[plain]] if plain in OTHER_ROLES else difflib.get_close_matches(plain, roles, n=1)
    mend = f"did you mean `{near[0]}`?" if near else f"write one of {listing(roles)}"
    raise RowFault(f"unknown role `{name[:40]}`", mend, at)


def read_content(value: Any, name: str, at: str) -> str:
    """Text, or the text of a list of parts, joined."""
    if not isinstance(value, list):
        return text(value, name, at)
    parts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            what = f"that is {kind(part)}"
            if isinstance(part, dict):
                what = f"of type `{str(part.get('type'))[:40]}`"
            raise RowFault(f"{name} has a part {what}", "only text is learned: keep parts of type `text`", at)
        parts.append(text(part.get("text"), f"the text of a part of {name}", at))
    return "".join(parts)


def learned(item: dict[str, Any], role: Role, at: str) -> bool:
    """Whether the turn is learned: assistant turns, unless `weight`, `train` or `loss` is 0 or false."""
    learn = role == "assistant"
    for switch in SWITCHES:
        if switch not in item:
            continue
        if isinstance(item[switch], str | list | dict) or item[switch] not in (0, 1):
            raise RowFault(f"`{switch}` is neither 0 nor 1", "write 0 (false) or 1 (true)", at)
        if item[switch] and role != "assistant":
            mend = "only answers are learned: delete it there"
            raise RowFault(f"`{switch}` asks to learn a {role} text", mend, at)
        learn = learn and bool(item[switch])
    return learn
