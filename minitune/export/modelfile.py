"""Ollama's Modelfile: the GGUF file, the prompt in Go's template language, and what ends an answer.

Ollama does not run the chat template of a GGUF. Ours is a row of blocks, a role's text between two strings, which
says the same in both languages; a template that is more than that is not translated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from minitune.export.report import CONVERSATIONS, Report

if TYPE_CHECKING:
    from minitune.data.template import Template

MARKS = {"system": "\ue001", "user": "\ue002", "assistant": "\ue003"}  # private characters: no template has them


@dataclass(frozen=True)
class Blocks:
    """before, after: what stands around a role's text. default: in front where no system text is given."""

    before: dict[str, str]
    after: dict[str, str]
    prompt: str
    default: str
    start: str

    def render(self, messages: list[dict[str, str]]) -> str:
        """A conversation that ends in a user's turn."""
        out = self.start + ("" if messages[0]["role"] == "system" else self.default)
        for message in messages:
            out += self.before[message["role"]] + message["content"] + self.after[message["role"]]
        return out + self.prompt

    def go(self) -> str:
        """The same in Go's template language. BOS is left to Ollama, which adds it where the file says so."""
        default = ""
        if self.default:
            default = f'{{{{ if ne (index .Messages 0).Role "system" }}}}{self.default}{{{{ end }}}}'
        body = "".join(
            f'{{{{ {word} eq .Role "{role}" }}}}{self.before[role]}{{{{ .Content }}}}{self.after[role]}'
            for word, role in (("if", "system"), ("else if", "user"), ("else if", "assistant"))
        )
        return f"{default}{{{{ range .Messages }}}}{body}{{{{ end }}}}{{{{ end }}}}{self.prompt}"


def blocks(template: Template) -> Blocks | None:
    """The blocks of the exported chat template; None where it is more than a row of blocks."""
    from jinja2 import TemplateError

    def render(*roles: str, prompt: bool = True) -> str:
        return _rendered(template, [{"role": r, "content": MARKS[r]} for r in roles], prompt)

    system, user, answer = MARKS["system"], MARKS["user"], MARKS["assistant"]
    try:
        closed, asked, told = render("user", prompt=False), render("user"), render("system", "user", prompt=False)
        talked = render("user", "assistant", "user", prompt=False)
    except TemplateError:
        return None
    if not asked.startswith(closed) or talked.count(user) != 2 or talked.count(answer) != 1 or system not in told:
        return None
    bos = template.tokenizer.bos_token or ""
    start = bos if bos and template.config.name == "minicpm" and template.config.bos else ""
    prompt = asked[len(closed) :]
    after_user = closed.rpartition(user)[2]
    first, between, last = talked.split(user)
    if last != after_user or not between.startswith(after_user):
        return None
    before_answer, after_answer_and_before_user = between[len(after_user) :].split(answer)
    front, middle = told[len(start) :].partition(system)[::2]
    middle = middle[: -len(user + after_user)]
    # How much of `first` is the user's own opening and not a default system text: what follows an answer.
    opening = _common_tail(first[len(start) :], after_answer_and_before_user, middle)
    if template.end_token in opening:  # it closes the turn before
        opening = opening.rpartition(template.end_token)[2].lstrip("\n")
    found = Blocks(
        before={"system": front, "user": opening, "assistant": before_answer},
        after={
            "system": middle[: len(middle) - len(opening)],
            "user": after_user,
            "assistant": after_answer_and_before_user[: len(after_answer_and_before_user) - len(opening)],
        },
        prompt=prompt,
        default=first[len(start) : len(first) - len(opening)],
        start=start,
    )
    return found if all(_same(template, found, conversation) for conversation in CONVERSATIONS) else None


def _common_tail(*texts: str) -> str:
    tail = texts[0]
    while tail and not all(text.endswith(tail) for text in texts):
        tail = tail[1:]
    return tail


def _same(template: Template, found: Blocks, conversation: tuple[tuple[str, str], ...]) -> bool:
    messages = [{"role": role, "content": content.strip()} for role, content in conversation]
    return found.render(messages) == _rendered(template, messages, True)


def _rendered(template: Template, messages: list[dict[str, str]], prompt: bool) -> str:
    return template.tokenizer.apply_chat_template(
        messages, chat_template=template.chat_template(), tokenize=False, add_generation_prompt=prompt
    )


def modelfile(file: str, template: Template | None, report: Report) -> str:
    """The text of a Modelfile for the GGUF `file` beside it."""
    lines = [f"# ollama create NAME -f THIS_FILE\nFROM ./{file}"]
    found = blocks(template) if template is not None else None
    if template is None or found is None:
        report.notes.append("the Modelfile has no TEMPLATE: the chat template is more than Ollama's can say here")
        return "\n".join(lines) + "\n"
    text = found.go().replace('"""', "")
    lines.append(f'TEMPLATE """{text}"""')
    for stop in dict.fromkeys([template.end_token, *_next_turn(template)]):
        lines.append(f'PARAMETER stop "{stop}"')
    return "\n".join(lines) + "\n"


def _next_turn(template: Template) -> list[str]:
    """What an untuned MiniCPM writes where it should stop: the next question's marker."""
    from minitune.data.template import USER

    return [USER] if template.config.name == "minicpm" else []
