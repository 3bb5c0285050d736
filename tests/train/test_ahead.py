"""The base weights are read while the data are: the same run, and an end as prompt and as plain as before."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import argv_of, with_

import minitune
from minitune import TrainConfig, UserError, train
from minitune.checkpoint import filling, weights
from minitune.cli import main
from minitune.train import ahead, fast, prepare
from minitune.train.ahead import Loading

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def own(config: TrainConfig, model: Path, tmp_path: Path) -> TrainConfig:
    """Settings with a model folder that a test may break."""
    shutil.copytree(model, tmp_path / "model")
    return with_(config, model=str(tmp_path / "model"), max_steps=1)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Weights of a minute or more: 50 ms for each piece of 2 kB. When pieces were read."""
    times: list[float] = []
    inner = filling._Lane.take

    def take(self: Any, piece: filling.Piece) -> None:
        time.sleep(0.05)
        inner(self, piece)
        times.append(time.monotonic())

    monkeypatch.setattr(filling, "PIECE", 2000)
    monkeypatch.setattr(filling._Lane, "take", take)
    yield times
    for thread in threading.enumerate():
        if thread.name.startswith("weights"):
            thread.join(0.1)
            assert not thread.is_alive(), thread.name


def begun(slow: list[float]) -> None:
    """Waits for the first piece."""
    while not slow:
        time.sleep(0.01)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line, of an error without a traceback."""
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err.splitlines()[-1]


def test_weights_come_while_the_data_are_read(
    own: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pieces are read before the data's end, and --profile's "model" is only what was waited for after them."""
    read = threading.Event()
    fill, load = filling.fill, prepare.dataset.load
    monkeypatch.setattr(filling, "fill", lambda *a: (time.sleep(1.0), fill(*a), read.set())[1])

    def loaded(*a: Any, **k: Any) -> Any:
        assert read.wait(20)
        return load(*a, **k)

    monkeypatch.setattr(prepare.dataset, "load", loaded)
    assert main([*argv_of(own), "--profile", "true"]) == 0
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("seconds: "))
    parts = {name: float(seconds) for name, seconds in (part.split() for part in line[9:].split(", "))}
    assert parts["data"] >= 1.0 > parts["model"]


def test_bad_data_while_weights_are_read(
    own: TrainConfig, slow: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The data's line as ever, and not when the weights are there."""
    load = prepare.dataset.load

    monkeypatch.setattr(prepare.dataset, "load", lambda *a, **k: (begun(slow), load(*a, **k))[1])
    Path(own.data + ".bad").write_text("[{]", encoding="utf-8")
    assert main(argv_of(with_(own, data=own.data + ".bad"))) == 2
    line = said(capsys)
    assert f"{own.data}.bad" in line and "not JSON" in line
    assert time.monotonic() - slow[-1] < 2.0, "it was being read until just now"
    pieces = (Path(own.model) / "model.safetensors").stat().st_size / filling.PIECE
    assert len(slow) < 0.8 * pieces
    assert not Path(own.output).exists()


def test_a_file_that_is_cut_while_it_is_read(
    own: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What goes wrong in the thread is the command's one line."""
    file = Path(own.model) / "model.safetensors"
    inner = filling.fill

    def fill(*args: Any) -> None:
        os.truncate(file, file.stat().st_size // 2)
        inner(*args)

    monkeypatch.setattr(filling, "fill", fill)
    assert main(argv_of(own)) == 2
    line = said(capsys)
    assert line.startswith(f"minitune: {file}: damaged (it ends inside ") and line.endswith("; download it again")
    assert not Path(own.output).exists()


def test_a_bad_model_is_said_before_the_data_are_read(
    own: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that was cut, and a config of another shape: at once."""
    monkeypatch.setattr(prepare.dataset, "load", lambda *_, **__: pytest.fail("the data were read"))
    config = Path(own.model) / "config.json"
    plain = config.read_text(encoding="utf-8")
    config.write_text(json.dumps(json.loads(plain) | {"vocab_size": 99}), encoding="utf-8")
    assert main(argv_of(own)) == 2
    assert "model.embed_tokens.weight is [" in said(capsys)
    config.write_text(plain, encoding="utf-8")
    file = Path(own.model) / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    assert main(argv_of(own)) == 2
    assert f"{file}: is cut short" in said(capsys)


def card_full(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 7 GiB.")


def test_no_memory_for_the_weights(
    own: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(filling, "fill", card_full)
    assert main(argv_of(own)) == 1
    line = said(capsys)
    assert line.startswith("minitune: out of memory on the card (2.50 GiB more were asked for): try --gradient_check")


@pytest.mark.parametrize("when", ["data", "waiting"])
def test_ctrl_c_while_weights_are_read(
    own: TrainConfig, slow: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], when: str
) -> None:
    """At once, whether the data are being read or the weights are waited for."""

    pressed: list[float] = []

    def press() -> None:
        begun(slow)
        pressed.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    inner = Loading.result

    def result(self: Loading) -> Any:
        threading.Thread(target=press).start()
        return inner(self)

    if when == "data":
        monkeypatch.setattr(prepare.dataset, "load", lambda *_, **__: (press(), time.sleep(60)))
    else:
        monkeypatch.setattr(Loading, "result", result)
    assert main(argv_of(own)) == 130
    assert time.monotonic() - pressed[0] < 5.0
    assert said(capsys) == "minitune: stopped"
    assert not Path(own.output).exists()


def test_what_is_not_wanted_is_let_go(own: TrainConfig, slow: list[float]) -> None:
    """From Python too: an error leaves no thread and no decoder."""
    with pytest.raises(UserError, match="no rows"), Loading(own, torch.device("cpu")) as loading:
        loading.begin(Path(own.model))
        time.sleep(0.2)
        raise UserError("no rows")
    assert loading._decoder is None and isinstance(loading._error, filling.Abandoned)


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(minitune.__file__).parents[1])}
BARE = """
import sys
from minitune.cli import main
code = main(sys.argv[1:])
heavy = [name for name in ("torch._dynamo", "torch._inductor", "sympy", "scipy", "pandas", "modelscope") if name in sys.modules]
print("heavy:", heavy)
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("method", "optim"),
    [("lora", "auto"), ("full", "adamw"), ("full", "adamw_8bit"), ("full", "adamw_8bit_in_backward")],
)
def test_no_needless_imports(own: TrainConfig, method: str, optim: str) -> None:
    """A whole run needs neither torch's compiler (1.3 s of import) nor other large libraries."""
    command = [sys.executable, "-c", BARE, *argv_of(with_(own, method=method, optim=optim, save_steps=1))]
    ran = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "heavy: []"


def test_resumed_from_weights_read_ahead(own: TrainConfig, tmp_path: Path) -> None:
    """The base comes by threads, the checkpoint on top of it."""
    own = with_(own, max_steps=3, save_steps=1)
    whole = train(with_(own, output=str(tmp_path / "whole")), quiet=True)
    train(own, quiet=True)
    shutil.rmtree(Path(own.output) / "checkpoint-3")
    again = train(with_(own, resume="auto"), quiet=True)
    assert again["loss"] == whole["loss"] and again["steps"] == 3


class Driver:
    """libcuda's place: what was asked of it, and its answers."""

    def __init__(self, *answers: int):
        self.answers, self.asked = list(answers), list[tuple[Any, ...]]()
        self.done = threading.Event()

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*values: Any) -> int:
            self.asked.append((name, *(v for v in values if isinstance(v, int))))
            code = self.answers.pop(0)
            if code or not self.answers:
                self.done.set()
            return code

        return call


@pytest.mark.parametrize(
    ("device", "answers", "asked"),
    [
        ("auto", (0, 0, 0), [("cuInit", 0), ("cuDeviceGet", 0), ("cuDevicePrimaryCtxRetain",)]),
        ("cuda:3", (0, 0, 0), [("cuInit", 0), ("cuDeviceGet", 3), ("cuDevicePrimaryCtxRetain",)]),
        ("cuda:9", (0, 101), [("cuInit", 0), ("cuDeviceGet", 9)]),
        ("cuda", (100,), [("cuInit", 0)]),
    ],
)
def test_a_card_is_woken(
    monkeypatch: pytest.MonkeyPatch, device: str, answers: tuple[int, ...], asked: list[tuple[Any, ...]]
) -> None:
    """By the driver alone, no further than it goes."""
    driver = Driver(*answers)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    ahead.wake(device)
    assert driver.done.wait(10)
    time.sleep(0.05)
    assert driver.asked == asked


@pytest.mark.parametrize("device", ["cpu", "auto", "cuda:x"])
def test_no_card_is_no_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], device: str) -> None:
    """No driver, a name that is none (torch says it), the CPU: nothing is said here."""
    opened: list[str] = []

    def none(name: str) -> Any:
        opened.append(name)
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", none)
    ahead.wake(device)
    for thread in threading.enumerate():
        if thread.name == "card":
            thread.join(10)
    assert capsys.readouterr().err == "" and len(opened) == (device != "cpu")


def test_bad_settings_are_said_at_once(own: TrainConfig) -> None:
    """Before torch is imported, which takes seconds."""
    program = BARE.replace("torch._dynamo", "torch")
    command = [sys.executable, "-c", program, *argv_of(with_(own, eval_fraction=0.1, eval_rows=3))]
    ran = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert ran.returncode == 2 and ran.stderr.startswith("minitune: give one of --eval_data")
    assert ran.stdout == "heavy: []\n"


@pytest.mark.parametrize(
    ("method", "deepspeed", "size", "want"),
    [
        ("lora", "", "1", ["lora"]),
        ("lora", "", "2", ["lora"]),
        ("full", "", "1", ["full"]),
        ("full", "", "2", []),
        ("lora", "ds.json", "1", []),
        ("full", "ds.json", "1", []),
    ],
)
def test_what_is_launched_is_compiled_early(
    own: TrainConfig, monkeypatch: pytest.MonkeyPatch, method: Any, deepspeed: str, size: str, want: list[str]
) -> None:
    """No kernels and no room for adapters where the engine's layers are plain."""
    monkeypatch.setenv("WORLD_SIZE", size)
    did: list[str] = []
    monkeypatch.setattr(fast, "compile_early", lambda *a: did.append("lora"))
    monkeypatch.setattr(fast, "compile_full_early", lambda *a: did.append("full"))
    monkeypatch.setattr(fast, "why_not_on", lambda device: "")
    strips: list[Any] = []
    monkeypatch.setattr(weights, "filled", lambda *a: strips.append(a[4]))
    with Loading(with_(own, method=method, deepspeed=deepspeed), torch.device("cpu")) as loading:
        loading.begin(Path(own.model))
        loading.compiled()
        assert loading._done.wait(20)
    assert did == want
    assert [strip is not None for strip in strips] == [want == ["lora"]]
