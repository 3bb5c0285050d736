"""Hub folders: what stock `transformers` and vLLM open without remote code, or MiniCPM's own layout.

`hf`: a MiniCPM becomes a Granite, which is the same graph (a Llama where all its scalars are one); Llama and Granite
stay what they are. `minicpm`: `auto_map` is left out, since it names code that is not in the folder.
The tokenizer goes along unchanged, with the chat template that was recorded at training.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minitune.checkpoint.convert import hub_config
from minitune.checkpoint.folder import TOKENIZER_FILES
from minitune.checkpoint.weights import DTYPES, read_json
from minitune.checkpoint.writing import write_safetensors
from minitune.export.report import Report
from minitune.export.source import Source
from minitune.model import quantized

if TYPE_CHECKING:
    from minitune.data.template import Template
    from minitune.export.int4 import Moments

# Older fast and slow tokenizers keep their vocabulary in these, beside `folder.TOKENIZER_FILES`.
VOCABULARY_FILES = ("vocab.json", "merges.txt")


def write(
    part: Path,
    source: Source,
    hub: dict[str, Any],
    beside: Beside,
    report: Report,
    *,
    format: str,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    int4: tuple[int, Moments] | None = None,
) -> None:
    """Fills the folder `part`. hub: the base's config.json. dtype: None keeps each tensor's own.

    int4: (group size, what the linears were given), where the linears are to have four bits.
    """
    kind = str(dtype or source.dtype).removeprefix("torch.")
    config = hub_config(hub, source.decoder.config, format, kind, beside.tokenizer)
    if int4 is not None:
        config["quantization_config"] = quantized.hub_settings(int4[0])
    report.architecture = config["architectures"][0]
    report.dtype = f"int4 in groups of {int4[0]}, the rest {kind}" if int4 else kind
    write_safetensors(part, _tensors(source, dtype, report, int4), max_shard_bytes)
    write_json(part / "config.json", config)
    write_json(part / "generation_config.json", _generation(config, beside.template))
    if beside.home is not None:
        _write_tokenizer(beside, part, report)
    if beside.run_yaml is not None:
        shutil.copyfile(beside.run_yaml, part / "run.yaml")


def _tensors(
    source: Source, dtype: torch.dtype | None, report: Report, int4: tuple[int, Moments] | None
) -> Iterator[tuple[str, Tensor]]:
    """(hub name, tensor): the sum of weight and adapter in float32, rounded once."""
    linears = {f"{x.hub_name(n)}.weight" for x in source.decoder.linears() for n, _, _ in x.parts} if int4 else set()
    for name in source.names():
        kind = dtype or source.kinds[name]
        report.merged += source.is_merged(name)
        if int4 is not None and name in linears:
            group, moments = int4
            if name in source.rounded and not source.is_merged(name):
                packed, scale = (part.cpu() for part in source.packed(name))
            else:
                packed, scale = quantized.quantize(source.merged(name), group, kind, moments.get(name))
            out = {"packed": packed, "scale": scale.to(kind), "shape": torch.tensor(source.shapes[name])}
            made = [(f"{name}_{part}", value) for part, value in out.items()]
        else:
            made = [(name, source.merged(name).to(kind))]
        for written, value in made:
            report.tensors, report.bytes = report.tensors + 1, report.bytes + value.nbytes
            yield written, value


def _generation(config: dict[str, Any], template: Template | None) -> dict[str, Any]:
    """What ends an answer; no sampling settings, so that generation is greedy unless asked otherwise."""
    ids = stop_ids(config, template)
    out: dict[str, Any] = {"eos_token_id": ids[0] if len(ids) == 1 else ids or None}
    out |= {name: config.get(name) for name in ("bos_token_id", "pad_token_id")}
    return {k: v for k, v in out.items() if v is not None}


def stop_ids(config: dict[str, Any], template: Template | None) -> list[int]:
    """Every id that ends an answer: the template's first, then the config's own."""
    eos = config.get("eos_token_id")
    own = eos if isinstance(eos, list) else [eos]
    return [i for i in dict.fromkeys([*(template.stop_ids if template else ()), *own]) if i is not None]


# What stands beside the weights


class Beside:
    """The tokenizer, its folder, the template and run.yaml: the base's, or what training wrote beside the adapter.

    tokenizer, home, template: None where there is none, which is noted.
    """

    def __init__(self, base: Path, run: Path | None, hub: dict[str, Any], report: Report):
        from minitune.checkpoint.tokenizer import load_tokenizer

        self.tokenizer: Any = None
        self.home: Path | None = None
        self.template: Template | None = None
        folders = [folder for folder in (base, run) if folder]
        for folder in folders:
            if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
                self.tokenizer, self.home = load_tokenizer(folder), folder
                break
        runs = [folder / "run.yaml" for folder in reversed(folders) if (folder / "run.yaml").is_file()]
        self.run_yaml = runs[0] if runs else None  # by which chat, serve and evaluate know what was trained
        if self.tokenizer is None:
            report.notes.append(f"{base}: has no tokenizer; add the model's own to {report.output}")
        else:
            self.template = self._recorded(hub, run, base, report)

    def _recorded(self, hub: dict[str, Any], run: Path | None, base: Path, report: Report) -> Template | None:
        from minitune.config import UserError
        from minitune.data.template import Template

        try:
            return Template.recorded(self.tokenizer, hub, run, base)
        except UserError as error:
            if self.run_yaml is not None:
                raise
            report.notes.append(f"no chat template is written: {error}")
            return None


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_tokenizer(beside: Beside, part: Path, report: Report) -> None:
    """The files as they are, but for the settings that name code, a class, or another chat template."""
    home, tokenizer, template = beside.home, beside.tokenizer, beside.template
    assert home is not None
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
    write_json(path, settings)


def limits_of(source: Source, dtype: torch.dtype | None, int4: bool) -> str:
    """The key of `verify.LIMITS` by which this folder is judged."""
    if int4:
        return "4 bits"
    kinds = {str(dtype or kind).removeprefix("torch.") for kind in source.kinds.values()}
    return next(kind for kind in ("bfloat16", "float16", "float32") if kind in kinds and kind in DTYPES)
