"""The tokenizer that a GGUF file's metadata holds, as a tokenizer.json: byte-level BPE, or sentencepiece's BPE.

By hand: `transformers` 5.24 knows no `smollm` pre-tokenizer and leaves digits together, which gives other ids than
the model was trained on.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitune.checkpoint.gguf import value
from minitune.config import UserError

if TYPE_CHECKING:
    from gguf import GGUFReader
    from tokenizers import Tokenizer

CONTROL, USER_DEFINED, BYTE = 3, 4, 6  # tokenizer.ggml.token_type; 1 normal, 2 unknown, 5 unused
# Byte-level pre-tokenizers by llama.cpp's name: the pattern that cuts a text; "" is GPT-2's own, within ByteLevel.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {"smollm": "", "gpt-2": "", "llama-bpe": LLAMA_3, "qwen2": LLAMA_3.replace("{1,3}", "")}
KEYS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def tokenizer(reader: GGUFReader, path: str | Path) -> Tokenizer:
    """UserError for a model or a pre-tokenizer that is not read."""
    from tokenizers import AddedToken

    model, pre = value(reader, "tokenizer.ggml.model"), value(reader, "tokenizer.ggml.pre", "default")
    if model == "gpt2" and pre in PATTERNS:
        built = _byte_level(reader, pre)
    elif model == "llama":
        built = _sentencepiece(reader)
    else:
        readable = ", ".join(f"gpt2/{p}" for p in PATTERNS)
        raise UserError(f"{path}: a {model}/{pre} tokenizer; only {readable} and llama are read")
    tokens, kinds = value(reader, "tokenizer.ggml.tokens"), value(reader, "tokenizer.ggml.token_type")
    built.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind != USER_DEFINED)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (CONTROL, USER_DEFINED) or (model == "llama" and kind == 2)
        ]
    )
    _add_bos(built, reader, tokens)
    return built


def _byte_level(reader: GGUFReader, pre: str) -> Tokenizer:
    """GPT-2's pattern; `smollm`: digits one by one first, as the hub's file says."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    merges = [tuple(merge.split(" ")) for merge in value(reader, "tokenizer.ggml.merges")]
    tokens = value(reader, "tokenizer.ggml.tokens")
    vocab, whole = {token: i for i, token in enumerate(tokens)}, pre == "llama-bpe"  # llama.cpp takes known words whole
    built = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=whole))
    split: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
    if pattern := PATTERNS[pre]:
        split.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    split.append(pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=not pattern))
    built.pre_tokenizer = pre_tokenizers.Sequence(split)
    built.decoder = decoders.ByteLevel()
    return built


def _sentencepiece(reader: GGUFReader) -> Tokenizer:
    """A BPE whose merges are every split of a piece into two pieces, the best score first: what llama.cpp does."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens, scores, kinds = (value(reader, f"tokenizer.ggml.{key}") for key in ("tokens", "scores", "token_type"))
    ids = {token: i for i, token in enumerate(tokens)}
    found = [
        (-scores[i], i, at, token[:at], token[at:])
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind == 1
        for at in range(1, len(token))
        if token[:at] in ids and token[at:] in ids
    ]
    unknown = value(reader, "tokenizer.ggml.unknown_token_id")
    built = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=[(left, right) for _, _, _, left, right in sorted(found)],
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=BYTE in kinds,
        )
    )
    spaced = value(reader, "tokenizer.ggml.add_space_prefix", True)
    marks: list[Any] = [normalizers.Prepend("▁")] if spaced else []
    built.normalizer = normalizers.Sequence([*marks, normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    built.decoder = decoders.Sequence(parts + ([decoders.Strip(" ", 1, 0)] if spaced else []))
    return built


def _add_bos(built: Tokenizer, reader: GGUFReader, tokens: list[str]) -> None:
    """BOS in front by default, where the file says so."""
    from tokenizers import processors

    bos = value(reader, "tokenizer.ggml.bos_token_id")
    if bos is None or not value(reader, "tokenizer.ggml.add_bos_token", False):
        return
    name = tokens[bos]
    built.post_processor = processors.TemplateProcessing(
        single=f"{name} $A", pair=f"{name} $A {name}:1 $B:1", special_tokens=[(name, bos)]
    )


def settings(reader: GGUFReader) -> dict[str, Any]:
    """The tokenizer_config.json to write beside it."""
    tokens, arch = value(reader, "tokenizer.ggml.tokens"), value(reader, "general.architecture")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": value(reader, f"{arch}.context_length"),
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "add_bos_token": bool(value(reader, "tokenizer.ggml.add_bos_token", False)),
    }
    for name, key in KEYS.items():
        token_id = value(reader, f"tokenizer.ggml.{key}_token_id")
        if token_id is not None:
            config[f"{name}_token"] = tokens[token_id]
    return config
