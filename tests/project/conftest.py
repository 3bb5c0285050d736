"""Commands run in this process: the tiny model, and what a command says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from talker import write_talker

from minitune import cli


@pytest.fixture(scope="module")
def model(golden: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_talker(golden, tmp_path_factory.mktemp("talker"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """loss.png is left out: drawing it takes longer than training the tiny model."""
    monkeypatch.setattr("minitune.train.report.draw", lambda *_: None)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """One command: (exit code, stdout, stderr)."""

    def call(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main([str(a) for a in argv])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call
