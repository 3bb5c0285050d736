"""A tiny checkpoint that can talk, and conversations to train it on: for tests of whole runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers

LETTERS = "▁<>用户AI你好吗我是谁今天。,!?abcdefghijklmnopqrstuvwxyzBCDEFGHJKLMNOPQRSTUVWXYZ0123456789.'-/:\n"


def tiny_tokenizer(size: int = 512, special: tuple[str, ...] = ()) -> Tokenizer:
    """Llama's kind: characters, with byte fallback, no merges; padded with CJK characters to `size` tokens."""
    specials = ["<unk>", "<s>", "</s>", *special]
    tokens = [*specials, *(f"<0x{b:02X}>" for b in range(256)), *dict.fromkeys(LETTERS)]
    spare = (chr(c) for c in range(0x4E00, 0x6000) if chr(c) not in LETTERS)
    tokens += [next(spare) for _ in range(size - len(tokens))]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.add_special_tokens(specials)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def write_tokenizer(folder: Path, special: tuple[str, ...] = (), **settings: Any) -> Path:
    """Puts the tiny tokenizer into a hub folder; `settings` go into tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_tokenizer(special=special).save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
    return folder


def write_talker(golden: Callable[[str], Path], folder: Path) -> Path:
    """A hub folder: weights of golden/tiny-2b and the tiny tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copyfile(golden("tiny-2b") / file, folder / file)
    return write_tokenizer(folder)


def write_rows(path: Path, count: int, start: int = 0) -> Path:
    """`count` conversations of different lengths in the alpaca form."""
    rows = [
        {"instruction": f"你是谁 {i}?" * (1 + i % 3), "input": "", "output": f"我是 {i * i % 97}。" * (1 + i % 4)}
        for i in range(start, start + count)
    ]
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


def command(argv: list[str], log: str) -> None:
    """The body of a process: one minitune command, what it says in a file, its exit code the process's.

    loss.png is left out: drawing it takes longer than training the tiny model.
    """
    import os
    import sys

    from minitune.cli import main
    from minitune.train import report

    report.draw = lambda *_: None

    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    sys.exit(main(argv))
