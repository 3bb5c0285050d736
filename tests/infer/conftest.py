"""A tiny checkpoint that can talk: the official weights of 512 tokens, and a tokenizer of as many made here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers

LETTERS = "▁<>用户AI你好吗我是谁今天。,!?abcdefghijklmnopqrstuvwxyzBCDEFGHJKLMNOPQRSTUVWXYZ0123456789.'-/:\n"


def tiny_tokenizer(size: int = 512) -> Tokenizer:
    """Llama's kind: characters, with byte fallback, no merges; padded with CJK characters to `size` tokens."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *dict.fromkeys(LETTERS)]
    spare = (chr(c) for c in range(0x4E00, 0x6000) if chr(c) not in LETTERS)
    tokens += [next(spare) for _ in range(size - len(tokens))]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


@pytest.fixture(scope="session")
def talker(golden: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub folder: weights of golden/tiny-2b and the tiny tokenizer."""
    folder = tmp_path_factory.mktemp("talker")
    for file in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(golden("tiny-2b") / file, folder)
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.fixture
def adapter(golden: Callable[[str], Path], talker: Path, tmp_path: Path) -> Path:
    """golden/tiny-2b-lora as a run writes it: its base named, the template's settings recorded."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(golden("tiny-2b-lora") / file, folder / file)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = str(talker)
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "run.yaml").write_text("model: x\ntemplate:\n  name: minicpm\n  bos: true\n", encoding="utf-8")
    return folder
