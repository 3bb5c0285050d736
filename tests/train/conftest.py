"""A tiny model that can talk, its conversations, and settings that train it in a second."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import ROWS
from talker import command, write_rows, write_talker

from minitune import TrainConfig


@pytest.fixture(scope="session")
def model(golden: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_talker(golden, tmp_path_factory.mktemp("talker"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.json", ROWS)


@pytest.fixture
def config(model: Path, data: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        model=str(model), data=str(data), output=str(tmp_path / "out"), num_train_epochs=2, learning_rate=2e-3,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, device="cpu", dtype="float32", lora_dropout=0.2,
    )  # fmt: skip


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """loss.png takes longer than training the tiny model."""
    monkeypatch.setattr("minitune.train.report.draw", lambda *_: None)


@pytest.fixture(scope="session")
def processes() -> Iterator[Any]:
    """Forks of a server that has imported everything: a process costs milliseconds, and a kill is a real kill."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["talker", "runs", "minitune.train.run", "minitune.checkpoint.tokenizer_classes", "torch._dynamo"]
    )
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # threads don't survive a fork
    process = context.Process(target=command, args=(["--version"], os.devnull))
    process.start()
    process.join()
    if before is None:
        os.environ.pop("OMP_NUM_THREADS")
    else:
        os.environ["OMP_NUM_THREADS"] = before
    yield context
