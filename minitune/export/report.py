"""What was written, as a person reads it; and how other engines will tokenise a conversation."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitune.config import UserError

if TYPE_CHECKING:
    from minitune.data.template import Template
    from minitune.export.verify import Comparison


@dataclass
class Report:
    """What was written. `later_ids`, `later_differ`: of the built-in conversations, see `measure`."""

    output: Path
    architecture: str = ""
    dtype: str = ""
    tensors: int = 0
    bytes: int = 0
    merged: int = 0
    first_turns_equal: bool | None = None
    later_ids: int = 0
    later_differ: int = 0
    comparison: Comparison | None = None
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


CONVERSATIONS: tuple[tuple[tuple[str, str], ...], ...] = (
    (("user", "你好！"), ("assistant", "你好，有什么可以帮你？"), ("user", "今天天气怎么样？")),
    (
        ("system", "你是一位耐心的老师。"),
        ("user", "什么是质数？"),
        ("assistant", "只能被 1 和它自己整除的、大于 1 的整数。\n例如：2、3、5、7。"),
        ("user", "那 51 呢？"),
        ("assistant", "51 = 3 × 17，所以不是质数。"),
        ("user", "谢谢……"),
    ),
    (("user", "Who are you?"), ("assistant", "I'm an assistant. Ask away!"), ("user", "Write a haiku.")),
    (
        ("system", "Answer briefly."),
        ("user", "def f(x):\n    return x + 1"),
        ("assistant", "```python\ndef f(x: int) -> int:\n    return x + 1\n```"),
        ("user", "And with a default of 0?"),
    ),
    (("user", "中文 and English 混着说，可以吗？"), ("assistant", "当然，no problem。"), ("user", "好的 👍")),
)


def measure(template: Template, report: Report, other: Any = None) -> None:
    """How far the exported chat template, tokenised as one string, is from the ids that were trained.

    Counts, over the built-in conversations, the ids behind the first turn's prompt and those of them that the
    rendered text does not give. `other`: the tokenizer that the written file holds, where it is not the template's.
    """
    from jinja2 import TemplateError

    from minitune.data.forms import Message

    equal = True
    for conversation in CONVERSATIONS:
        messages = [Message(role, content) for role, content in conversation]  # type: ignore[arg-type]
        first = next(i for i, m in enumerate(messages) if m.role == "user") + 1
        try:
            ours = template.prompt_ids(messages[:first])
            equal = equal and _rendered_ids(template, messages[:first], other) == ours
            whole, theirs = template.prompt_ids(messages), _rendered_ids(template, messages, other)
        except (UserError, TemplateError) as error:
            line = str(error).splitlines()[0] if str(error) else type(error).__name__
            report.notes.append(f"the chat template could not be measured ({line})")
            return
        same = SequenceMatcher(None, whole, theirs, autojunk=False).get_matching_blocks()
        report.later_ids += len(whole) - len(ours)
        report.later_differ += len(whole) - sum(block.size for block in same)
    report.first_turns_equal = equal


def _rendered_ids(template: Template, messages: list[Any], other: Any) -> list[int]:
    plain = [{"role": m.role, "content": m.content} for m in messages]
    jinja = template.chat_template()
    render: dict[str, Any] = {"chat_template": jinja, "add_generation_prompt": True}
    if other is None:
        return template.tokenizer.apply_chat_template(plain, tokenize=True, return_dict=False, **render)
    text = template.tokenizer.apply_chat_template(plain, tokenize=False, **render)
    return other.encode(text, add_special_tokens=False).ids


def say(report: Report) -> None:
    """The report on stdout, a line each; notes on stderr."""
    merged = f", the adapter merged into {report.merged}" if report.merged else ""
    tensors = f"{report.tensors} tensors{merged}"
    print(f"{report.output}: {report.architecture}, {report.dtype}, {size(report.bytes)}, {tensors}")
    if report.comparison is not None:
        print(f"{report.output}: verified: {report.comparison.line()}")
    if report.first_turns_equal is not None:
        first = "as trained" if report.first_turns_equal else "NOT as trained"
        where = report.files[0] if report.files else report.output / "chat_template.jinja"  # a GGUF file holds its own
        print(
            f"{where}: other programs tokenise first turns {first}; "
            f"of later turns {report.later_differ} of {report.later_ids} ids differ"
        )
    for file in report.files:
        print(file)
    for note in report.notes:
        print(f"minitune: note: {note}", file=sys.stderr)


def size(count: int) -> str:
    """1610612736 -> 1.50 GiB"""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
