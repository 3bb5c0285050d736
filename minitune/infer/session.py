"""A model opened from what is on disk, ready to answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minitune.data.template import Template
from minitune.infer.engine import Engine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Session:
    """templates: by adapter name, "" (the base) included; each adapter is prompted as it was trained."""

    engine: Engine
    templates: Mapping[str, Template]
    tokenizer: PreTrainedTokenizerBase


def open_model(
    model: str,
    adapters: Mapping[str, str | Path] | None = None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    source: str = "modelscope",
    slots: int = 0,
    cache_tokens: int = 0,
) -> Session:
    """An engine over `model` (a folder, a hub name, or smollm2) and its adapters {name: folder}.

    Raises UserError, one line, for what is missing or does not fit.
    """
    from minitune.checkpoint import hub
    from minitune.checkpoint.adapter import common_group
    from minitune.checkpoint.tokenizer import load_tokenizer
    from minitune.checkpoint.weights import load_decoder, read_json

    folder = hub.resolve(model, source=source)
    tokenizer = load_tokenizer(folder)
    config = read_json(folder / "config.json")
    named = {"": None, **{name: str(path) for name, path in (adapters or {}).items()}}
    templates = {name: Template.recorded(tokenizer, config, path, folder) for name, path in named.items()}
    decoder = load_decoder(folder, dtype, device, group=common_group(adapters or {}))
    engine = Engine(decoder, tokenizer, adapters=adapters or {}, slots=slots, cache_tokens=cache_tokens)
    return Session(engine, templates, tokenizer)
