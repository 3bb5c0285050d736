"""What every room's tests need: the shared fixtures' folder, no network, one thread a worker, cards only where asked."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Inductor imports setuptools, which asserts that nothing of the process has imported the stdlib's distutils before.
os.environ["SETUPTOOLS_USE_DISTUTILS"] = "stdlib"
if not os.path.exists("/dev/nvidia0"):  # without a card Triton kernels run in its interpreter
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure() -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA card here"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of data that is shared beside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"no test data: {SHARED} is absent")
    return SHARED


@pytest.fixture(scope="session")
def golden(shared: Path) -> Callable[[str], Path]:
    """name -> the path of a fixture that the official code made."""

    def find(name: str) -> Path:
        path = shared / "golden" / name
        if not path.exists():
            pytest.skip(f"no test data: {path} is absent")
        return path

    return find


@pytest.fixture(scope="session", autouse=True)
def rows_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Encoded rows of tests stay out of the user's cache."""
    os.environ["MINITUNE_ROWS_CACHE"] = str(tmp_path_factory.mktemp("rows"))
