"""bench/serve_soak.py for some seconds on a tiny model: nothing lost, nothing held, nothing mixed up."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import os
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("httpx", reason="the extra dev is not installed")

from scripted import scripted_session
from serving import served

from minitune.infer.session import open_model

BENCH = Path(__file__).parents[2] / "bench" / "serve_soak.py"


@pytest.fixture(scope="module")
def soak() -> Any:
    spec = importlib.util.spec_from_file_location("serve_soak", BENCH)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["serve_soak"] = module
    spec.loader.exec_module(module)
    return module


def test_a_short_soak(soak: Any, talker: Path) -> None:
    session = open_model(str(talker), dtype="float32", device="cpu", slots=8, cache_tokens=1024)
    with served(session) as server:
        report = asyncio.run(soak.storm(server.url, "tiny", clients=24, seconds=6, pid=os.getpid()))
        assert report.wrong == {} and report.differs == 0
        assert report.done > 50 and report.left > 5
        assert server.service.gate.inside == 0 and not server.service.live
    assert report.growth() < 64


def test_the_soak_can_fail(soak: Any, tmp_path: Path) -> None:
    """Answers that differ from time to time are counted."""
    numbers = itertools.count()
    with served(scripted_session(tmp_path, lambda _: f"answer {next(numbers)}")) as server:
        report = asyncio.run(soak.storm(server.url, "tiny", clients=4, seconds=0.5))
    assert report.differs > 0
