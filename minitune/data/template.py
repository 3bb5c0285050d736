"""Conversation -> token ids and which of them are learned. The one place that builds a prompt.

`minicpm`: `<用户>{question}<AI>{answer}`. A question with its markers (and the system text before the first) is
encoded as one string, an answer by itself, closed by a learned EOS; the segments' ids are joined. An untuned
checkpoint (`tuned=False`) is prompted as its official chat function does: one string, no EOS between turns.
`model`: the checkpoint's own chat template, cut at the same places.
What is served is what was trained: `prompt_ids` is a prefix of `encode` by construction, since both join `_segments`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from minitune.config import TemplateConfig, UserError, build, read_yaml

USER, ASSISTANT = "<用户>", "<AI>"
IGNORED = -100
SPELLED = 0x10F000  # private characters that stand for special tokens spelled in a text while it is rendered


class Turn(Protocol):
    """What the template needs of a message (`records.Message` is one)."""

    @property
    def role(self) -> str: ...
    @property
    def content(self) -> str: ...
    @property
    def learn(self) -> bool: ...


@dataclass(frozen=True)
class Encoded:
    """One row: `labels[i]` is `input_ids[i]` where the token is learned, else -100 (not shifted)."""

    input_ids: list[int]
    labels: list[int]

    @property
    def supervised(self) -> int:
        """Tokens that are learned; the first token has nothing before it and never is."""
        return sum(label != IGNORED for label in self.labels[1:])


# A stretch of a row: an id, or a text with whether special tokens that are spelled in it stay text.
Part = int | tuple[str, bool]


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of a row that is learned or is not; each text of its parts is encoded by itself."""

    parts: list[Part]
    learn: bool = False


def is_minicpm(hub_config: dict[str, Any], chat_template: str | None) -> bool:
    """Whether a checkpoint speaks `<用户>…<AI>`: by its own chat template, else by its architecture."""
    if chat_template:
        return USER in chat_template
    return (hub_config.get("architectures") or [""])[0] == "MiniCPMForCausalLM"


class Template:
    """Builds prompts and rows with one tokenizer.

    tokenizer: a `transformers` tokenizer. config: resolved settings (`name` is minicpm or model).
    tuned: whether the weights were trained with this template.
    """

    def __init__(self, tokenizer: Any, config: TemplateConfig, tuned: bool = True):
        if config.name not in ("minicpm", "model"):
            raise ValueError("resolve the template's name first (Template.choose)")
        if config.name == "model" and not tokenizer.chat_template:
            raise UserError("the checkpoint has no chat template of its own; give --template.name minicpm")
        self.tokenizer, self.config, self.tuned = tokenizer, config, tuned
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no EOS token; add eos_token to tokenizer_config.json")
        self.eos_id: int = tokenizer.eos_token_id
        self.end_token: str = tokenizer.eos_token
        self.specials = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        longest_first = sorted(self.specials, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        self._spelled = {SPELLED + i: token for i, token in enumerate(longest_first)}
        self._marked = re.compile(f"[{chr(SPELLED)}-{chr(SPELLED + len(longest_first))}]")
        self._mark = {token: chr(code) for code, token in self._spelled.items()}
        if config.name == "model":
            self._find_end()

    def _find_end(self) -> None:
        """ChatML closes a turn with a token that need not be the tokenizer's EOS: what stands behind an answer."""
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        behind = self.tokenizer.apply_chat_template(probe, tokenize=False).rpartition("b")[2]
        found = [(behind.rfind(token), token) for token in self.specials if token in behind]
        if found:
            self.end_token = max(found)[1]
            self.eos_id = self.specials[self.end_token]

    @staticmethod
    def choose(tokenizer: Any, config: TemplateConfig, hub_config: dict[str, Any]) -> Template:
        """The template to train with: the settings', with `auto` resolved by what the checkpoint is."""
        if config.name == "auto":
            minicpm = is_minicpm(hub_config, tokenizer.chat_template)
            config = replace(config, name="minicpm" if minicpm else "model")
        return Template(tokenizer, config)

    @staticmethod
    def recorded(tokenizer: Any, hub_config: dict[str, Any], *folders: str | Path | None) -> Template:
        """The template to serve with: what training recorded in the first folder that has it, else the official one."""
        for folder in folders:
            path = Path(folder) / "run.yaml" if folder else None
            if path and path.is_file():
                values = {k: v for k, v in read_yaml(path).items() if k.startswith("template.")}
                plain = {k.removeprefix("template."): v for k, v in values.items()}
                return Template.choose(tokenizer, build(TemplateConfig, plain, str(path)), hub_config)
        template = Template.choose(tokenizer, TemplateConfig(), hub_config)
        template.tuned = False
        return template

    # What a row is made of

    def encode(self, messages: Sequence[Turn]) -> Encoded:
        """A whole conversation as a row for training."""
        ids: list[int] = []
        labels: list[int] = []
        for segment in self.segments(messages):
            run = self._run(segment)
            ids += run
            labels += run if segment.learn else [IGNORED] * len(run)
        return Encoded(ids, labels)

    def prompt_ids(self, messages: Sequence[Turn]) -> list[int]:
        """What the model is given to answer a conversation that ends in a user's turn."""
        if not messages or messages[-1].role != "user":
            raise UserError("a prompt ends in a user's turn")
        if self.config.name == "minicpm" and not self.tuned:
            return self._run(Segment([*self._bos(), (self.official_text(messages), True)]))
        return [i for segment in self.segments(messages) for i in self._run(segment)]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return tuple(dict.fromkeys((self.eos_id, self.tokenizer.eos_token_id)))

    def official_text(self, messages: Sequence[Turn]) -> str:
        """The string that MiniCPM's official chat function tokenises."""
        return "".join(
            f"{USER}{m.content.strip()}{ASSISTANT}" if m.role == "user" else m.content.strip() for m in messages
        )

    def _ids(self, text: str, plain: bool) -> list[int]:
        """plain: a special token spelled in what a person wrote stays text and can't end a turn."""
        if not text:
            return []
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=plain)["input_ids"]

    def _run(self, segment: Segment) -> list[int]:
        ids: list[int] = []
        for part in segment.parts:
            ids += [part] if isinstance(part, int) else self._ids(*part)
        return ids

    def _bos(self) -> list[Part]:
        bos = self.tokenizer.bos_token_id
        return [bos] if self.config.bos and bos is not None else []

    def segments(self, messages: Sequence[Turn]) -> list[Segment]:
        """What a conversation's row is made of, not yet encoded."""
        return self._minicpm(messages) if self.config.name == "minicpm" else self._own(messages)

    def _minicpm(self, messages: Sequence[Turn]) -> list[Segment]:
        text = (lambda m: m.content.strip()) if self.config.strip else (lambda m: m.content)
        out = [Segment(self._bos())]
        before = ""
        for message in messages:
            if message.role == "system":
                before += text(message)
            elif message.role == "user":
                out.append(Segment([(f"{before}{USER}{text(message)}{ASSISTANT}", True)]))
                before = ""
            else:
                out.append(Segment([(text(message), True), self.eos_id], message.learn))
        return out

    def _own(self, messages: Sequence[Turn]) -> list[Segment]:
        """The rendered conversation, cut before each answer and behind the token that ends it."""
        out: list[Segment] = []
        done = ""
        for i, message in enumerate(messages):
            if message.role != "assistant":
                continue
            prompt = self._render(messages[:i], True)
            whole = self._render(messages[: i + 1], False)
            if not prompt.startswith(done) or not whole.startswith(prompt):
                raise UserError(
                    "the checkpoint's chat template rewrites earlier turns, so a conversation can't be trained as it "
                    "is served; give --template.name minicpm"
                )
            out.append(Segment(self._rendered(prompt[len(done) :])))
            parts, kept = self._answer(whole[len(prompt) :])
            out.append(Segment(parts, message.learn))
            done = prompt + kept
        if messages and messages[-1].role != "assistant":
            prompt = self._render(messages, True)
            if not prompt.startswith(done):
                raise UserError("the checkpoint's chat template rewrites earlier turns; start a new conversation")
            out.append(Segment(self._rendered(prompt[len(done) :])))
        return out

    def _render(self, messages: Sequence[Turn], generate: bool) -> str:
        plain = [
            {"role": m.role, "content": self._special.sub(lambda found: self._mark[found[0]], m.content)}
            for m in messages
        ]
        return self.tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=generate)

    def _answer(self, text: str) -> tuple[list[Part], str]:
        """An answer up to and with EOS, and the part of the rendered text that this stands for."""
        at = text.rfind(self.end_token)
        if at < 0:  # this template does not close answers; we do, or the model would never stop
            return [*self._rendered(text), self.eos_id], text
        return [*self._rendered(text[:at]), self.eos_id], text[: at + len(self.end_token)]

    def _rendered(self, text: str) -> list[Part]:
        """A rendered stretch: special tokens that the template wrote, and as text those that a person spelled."""
        return self.parted(text) if self._marked.search(text) else [(text, False)]

    def parted(self, text: str) -> list[Part]:
        """A rendered stretch cut at the special tokens, which are ids then; the texts between them have none."""
        pieces = [piece for piece in self._special.split(text) if piece]
        out: list[Part] = [self.specials.get(p, (p, True)) for p in pieces]
        if self._marked.search(text):
            out = [p if isinstance(p, int) else (p[0].translate(self._spelled), True) for p in out]
        return out

    # What is written beside the weights

    def chat_template(self) -> str:
        """The jinja that other engines render: the same text, EOS after each answer where it was trained so."""
        if self.config.name == "model":
            return self.tokenizer.get_chat_template()
        close = " + eos_token" if self.tuned else ""
        trim = ".strip()" if self.config.strip else ""
        bos = "{{ bos_token }}" if self.config.bos else ""
        return (
            f"{bos}{{% for message in messages %}}"
            f"{{% if message['role'] == 'user' %}}{{{{ '{USER}' + message['content']{trim} + '{ASSISTANT}' }}}}"
            f"{{% elif message['role'] == 'assistant' %}}{{{{ message['content']{trim}{close} }}}}"
            f"{{% else %}}{{{{ message['content']{trim} }}}}{{% endif %}}{{% endfor %}}"
        )

    def save(self, folder: str | Path) -> None:
        """Writes chat_template.jinja; the settings stand in run.yaml beside it."""
        (Path(folder) / "chat_template.jinja").write_text(self.chat_template(), encoding="utf-8")


def cut(row: Encoded, max_length: int) -> Encoded:
    """The row cut at its tail; a row that loses its EOS ends unlearned-to-stop, as it should."""
    return Encoded(row.input_ids[:max_length], row.labels[:max_length])
