"""A model for other programs: an adapter merged into its base, tensor by tensor, the model never in memory.

`hf`: what stock `transformers` and vLLM open without remote code. A MiniCPM becomes a Granite, which is the
same graph (a Llama where all its scalars are one); Llama and Granite stay what they are.
`minicpm`: MiniCPM's own layout. `auto_map` is left out, since it names code that is not in the folder.

The tokenizer goes along unchanged, with the chat template that was recorded at training.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from minitune.config import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from minitune.checkpoint.weights import Shards
    from minitune.data.template import Template
    from minitune.model.decoder import Decoder

# Older fast and slow tokenizers keep their vocabulary in these, beside `folder.TOKENIZER_FILES`.
VOCABULARY_FILES = ("vocab.json", "merges.txt")


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
    notes: list[str] = field(default_factory=list)


def export(
    model: str | Path,
    adapter: str | Path | None = None,
    format: Literal["hf", "minicpm"] = "hf",
    output: str | Path = "",
    dtype: str = "auto",
    quiet: bool = False,
    max_shard_bytes: int = 1 << 30,
) -> Report:
    """Writes `model`, with `adapter` merged, to the new folder `output`; whole or not at all.

    dtype: `auto` keeps each tensor's own. The memory in use is about one shard's (`max_shard_bytes`).
    Raises UserError for an output that holds something, an adapter for another model, a format that can't
    hold this model, or a full disk.
    """
    from minitune.checkpoint import hub
    from minitune.checkpoint.convert import hub_config
    from minitune.checkpoint.folder import whole
    from minitune.checkpoint.weights import DTYPES, Shards, read_json, write_safetensors

    if format not in ("hf", "minicpm"):
        raise UserError(f"format is {format!r}; it takes hf, minicpm")
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}: give auto, {', '.join(DTYPES)}")
    base = hub.resolve(str(model), quiet=quiet)
    run = Path(adapter).expanduser() if adapter else None
    target = _check_output(output, base, run)
    source = read_json(base / "config.json")
    tokenizer, home = _tokenizer(base, run)
    report = Report(target)
    template = _template(tokenizer, source, run, base, report)
    with Shards(base) as shards:
        plan = _plan(shards, run)
        kind = str(DTYPES.get(dtype) or _stored_dtype(shards, plan.skeleton)).removeprefix("torch.")
        config = hub_config(source, plan.skeleton.config, format, kind, tokenizer)
        report.architecture, report.dtype = config["architectures"][0], kind
        try:
            with whole(target) as part:
                write_safetensors(part, plan.tensors(DTYPES.get(dtype), report), max_shard_bytes)
                _write_json(part / "config.json", config)
                _write_json(part / "generation_config.json", _generation(config, template))
                if home is not None:
                    _write_tokenizer(home, part, tokenizer, template, report)
                _copy_run(part, run, base)
        except Exception as error:
            raise _unwritten(target, error) from None
    if template is not None:
        measure(template, report)
    if not quiet:
        _say(report)
    return report


def _check_output(output: str | Path, base: Path, run: Path | None) -> Path:
    if not str(output):
        raise UserError("export needs --output, a new folder")
    target = Path(output).expanduser()
    for folder, flag in ((base, "--model"), (run, "--adapter")):
        if folder is not None and target.resolve() == folder.resolve():
            raise UserError(f"{target}: is the folder of {flag}; give another --output")
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"{target}: holds files already; give a new folder as --output, or empty this one")
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: is a file; give a new folder as --output")
    return target


def _unwritten(target: Path, error: Exception) -> Exception:
    """A failure to write as one line; anything else as it is."""
    from safetensors import SafetensorError

    if isinstance(error, OSError | SafetensorError):
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        return UserError(f"{target}: can't be written ({reason}); give another --output")
    return error


# What is computed


@dataclass
class Plan:
    """The tensors to write: the names and shapes of `skeleton`, the values of `shards`, and what is added."""

    shards: Shards
    skeleton: Decoder
    saved: dict[str, Tensor]

    def tensors(self, dtype: torch.dtype | None, report: Report) -> Iterator[tuple[str, Tensor]]:
        """(hub name, tensor): the sum of weight and adapter in float32, rounded once."""
        from minitune.checkpoint.adapter import PREFIX
        from minitune.checkpoint.weights import hub_parameters

        wanted = hub_parameters(self.skeleton)
        for name in self.shards.names():
            if name not in wanted:  # a redundant head, rotary tables
                continue
            tensor = self.shards.get(name, wanted[name].shape)
            kind = dtype or tensor.dtype
            module = PREFIX + name.removesuffix(".weight")
            if f"{module}.lora_A.weight" in self.saved:
                assert self.skeleton.lora_config is not None
                a, b = (self.saved[f"{module}.lora_{x}.weight"].float() for x in "AB")
                tensor = tensor.float() + self.skeleton.lora_config.scale * b @ a
                report.merged += 1
            tensor = tensor.to(kind)
            report.tensors, report.bytes = report.tensors + 1, report.bytes + tensor.nbytes
            yield name, tensor


def _plan(shards: Shards, run: Path | None) -> Plan:
    from minitune.checkpoint import adapter as adapters
    from minitune.checkpoint.weights import skeleton

    empty = skeleton(shards)
    return Plan(shards, empty, adapters.attach_saved(empty, run) if run is not None else {})


def _stored_dtype(shards: Shards, empty: Decoder) -> torch.dtype:
    """The embedding's, which stands for the file; UserError where weights are not plain floating point."""
    from minitune.checkpoint.weights import DTYPES, EMBED, hub_parameters

    wanted = hub_parameters(empty)
    for name in filter(wanted.__contains__, shards.names()):
        kind = shards.get(name).dtype
        if kind not in DTYPES.values():
            raise UserError(
                f"{shards.where[name]}: {name} is {str(kind).removeprefix('torch.')}; "
                f"export needs a base in {', '.join(DTYPES)}"
            )
    return shards.get(EMBED).dtype


def _generation(config: dict[str, Any], template: Template | None) -> dict[str, Any]:
    """What ends an answer; no sampling settings, so that generation is greedy unless asked otherwise."""
    eos = config.get("eos_token_id")
    own = eos if isinstance(eos, list) else [eos]
    ids = [i for i in dict.fromkeys([*(template.stop_ids if template else ()), *own]) if i is not None]
    out: dict[str, Any] = {"eos_token_id": ids[0] if len(ids) == 1 else ids or None}
    out |= {name: config.get(name) for name in ("bos_token_id", "pad_token_id")}
    return {k: v for k, v in out.items() if v is not None}


# What stands beside the weights


def _tokenizer(base: Path, run: Path | None) -> tuple[Any, Path | None]:
    """(tokenizer, its folder): the base's, else the one that training wrote beside the adapter; else None."""
    from minitune.checkpoint.tokenizer import load_tokenizer

    for folder in (base, run):
        if folder and any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
            return load_tokenizer(folder), folder
    return None, None


def _template(tokenizer: Any, source: dict[str, Any], run: Path | None, base: Path, report: Report) -> Template | None:
    """The recorded template; None, with a note, where the base has no tokenizer or no template to record."""
    from minitune.data.template import Template

    if tokenizer is None:
        report.notes.append(f"{base}: has no tokenizer; add the model's own to {report.output}")
        return None
    try:
        return Template.recorded(tokenizer, source, run, base)
    except UserError as error:
        if any(folder and (folder / "run.yaml").is_file() for folder in (run, base)):
            raise
        report.notes.append(f"no chat template is written: {error}")
        return None


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_tokenizer(home: Path, part: Path, tokenizer: Any, template: Template | None, report: Report) -> None:
    """The files as they are, but for the settings that name code, a class, or another chat template."""
    from minitune.checkpoint.folder import TOKENIZER_FILES
    from minitune.checkpoint.weights import read_json

    for name in (*TOKENIZER_FILES, *VOCABULARY_FILES):
        if (home / name).is_file():
            shutil.copyfile(home / name, part / name)
    path = part / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    settings.pop("auto_map", None)
    if (part / "tokenizer.json").is_file():
        # "The file as it is" to transformers 4 and 5; by LlamaTokenizer, 5 rebuilds one with other ids.
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    else:
        settings.setdefault("tokenizer_class", "LlamaTokenizer")
        report.notes.append(f"{home} has only a tokenizer.model: other programs may tokenise it differently")
    for name in ("bos_token", "eos_token"):  # the chat template writes them
        if settings.get(name) is None and getattr(tokenizer, name) is not None:
            settings[name] = getattr(tokenizer, name)
    if template is not None:
        template.save(part)
        settings["chat_template"] = template.chat_template()  # for readers that know no chat_template.jinja
    _write_json(path, settings)


def _copy_run(part: Path, run: Path | None, base: Path) -> None:
    """run.yaml, by which chat, serve and evaluate know the template that was trained."""
    for folder in (run, base):
        if folder and (folder / "run.yaml").is_file():
            shutil.copyfile(folder / "run.yaml", part / "run.yaml")
            return


# What other engines will see

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


def measure(template: Template, report: Report) -> None:
    """How far the exported chat template, tokenised as one string, is from the ids that were trained.

    Counts, over the built-in conversations, the ids behind the first turn's prompt and those of them that the
    rendered text does not give.
    """
    from jinja2 import TemplateError

    from minitune.data.forms import Message

    equal = True
    for conversation in CONVERSATIONS:
        messages = [Message(role, content) for role, content in conversation]  # type: ignore[arg-type]
        first = next(i for i, m in enumerate(messages) if m.role == "user") + 1
        try:
            ours = template.prompt_ids(messages[:first])
            equal = equal and _rendered_ids(template, messages[:first]) == ours
            whole, theirs = template.prompt_ids(messages), _rendered_ids(template, messages)
        except (UserError, TemplateError) as error:
            line = str(error).splitlines()[0] if str(error) else type(error).__name__
            report.notes.append(f"the chat template could not be measured ({line})")
            return
        same = SequenceMatcher(None, whole, theirs, autojunk=False).get_matching_blocks()
        report.later_ids += len(whole) - len(ours)
        report.later_differ += len(whole) - sum(block.size for block in same)
    report.first_turns_equal = equal


def _rendered_ids(template: Template, messages: list[Any]) -> list[int]:
    plain = [{"role": m.role, "content": m.content} for m in messages]
    jinja = template.chat_template()
    return template.tokenizer.apply_chat_template(
        plain, chat_template=jinja, tokenize=True, add_generation_prompt=True, return_dict=False
    )


def _say(report: Report) -> None:
    size = f"{report.bytes / 2**30:.2f} GiB" if report.bytes >= 2**30 else f"{report.bytes / 2**20:.1f} MiB"
    merged = f", the adapter merged into {report.merged}" if report.merged else ""
    print(f"{report.output}: {report.architecture}, {report.dtype}, {size}, {report.tensors} tensors{merged}")
    if report.first_turns_equal is not None:
        first = "as trained" if report.first_turns_equal else "NOT as trained"
        print(
            f"{report.output / 'chat_template.jinja'}: other programs tokenise first turns {first}; "
            f"of later turns {report.later_differ} of {report.later_ids} ids differ"
        )
    for note in report.notes:
        print(f"minitune: note: {note}", file=sys.stderr)
