"""A tiny checkpoint that can talk: the official weights of 512 tokens, and a tokenizer of as many made here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from talker import write_talker
from transformers import PreTrainedTokenizerBase

from minitune.checkpoint.tokenizer import load_tokenizer
from minitune.checkpoint.weights import load_model
from minitune.model.decoder import Decoder


@pytest.fixture(scope="session")
def talker(golden: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub folder: weights of golden/tiny-2b and the tiny tokenizer."""
    return write_talker(golden, tmp_path_factory.mktemp("talker"))


@pytest.fixture(scope="module")
def tokenizer(talker: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(talker)


@pytest.fixture(scope="module")
def tiny(golden: Callable[[str], Path]) -> Decoder:
    """golden/tiny-2b, one for a file's tests: an engine takes it over."""
    return load_model(golden("tiny-2b"), device="cpu", dtype="float32")


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
