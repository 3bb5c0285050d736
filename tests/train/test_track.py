"""TensorBoard, Weights & Biases and SwanLab: their own files, read back, hold the log's numbers; nothing is sent."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from runs import rows_of, same, with_

from minitune import TrainConfig, UserError, train
from minitune.cli import main
from minitune.train import track
from minitune.train.watch import Ask

pytestmark = pytest.mark.usefixtures("undrawn")

SCALARS = {
    "train/loss": "loss",
    "train/learning_rate": "learning_rate",
    "train/grad_norm": "grad_norm",
    "train/epoch": "epoch",
    "train/tokens_per_second": "tokens_per_second",
    "train/memory_gib": "memory_gib",
}


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Addresses beyond this machine that something tried to reach, or to look up."""
    tried: list[Any] = []
    connect = socket.socket.connect

    def checked(self: socket.socket, address: Any) -> Any:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1"):
            tried.append(address)
            raise OSError("no network")
        return connect(self, address)

    def lookup(host: Any, *more: Any, **other: Any) -> Any:
        if host not in ("localhost", "127.0.0.1", socket.gethostname(), None):
            tried.append(host)
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", checked)
    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    return tried


@pytest.fixture
def tracked(config: TrainConfig, tmp_path: Path) -> TrainConfig:
    """Held-out losses and answers too, in a folder with a Chinese name."""
    (tmp_path / "p.txt").write_text("你是谁?\n", encoding="utf-8")
    return with_(
        config, output=str(tmp_path / "甄嬛 run"), eval_fraction=0.2, watch=str(tmp_path / "p.txt"), logging_steps=3
    )


def reply(decoder: Any, tokenizer: Any, ask: Ask) -> Sequence[tuple[str, str]]:
    return [("我是甄嬛", "stop")] * len(ask.prompt_ids)


def wanted(folder: str) -> dict[str, list[tuple[int, float]]]:
    """{their name: [(step, value)]} of log.jsonl."""
    rows = rows_of(folder)
    curves = {name: [(r["step"], r[key]) for r in rows if key in r] for name, key in SCALARS.items()}
    return curves | {"eval/loss": [(r["step"], r["eval_loss"]) for r in rows if "eval_loss" in r]}


def approx(curve: Sequence[tuple[int, float]]) -> Any:
    return [(step, pytest.approx(value, rel=1e-6)) for step, value in curve]  # TensorBoard keeps float32


def records(path: Path) -> Iterator[bytes]:
    """The records of a LevelDB log (github.com/google/leveldb/blob/main/doc/log_format.md) behind a header of seven
    bytes: the form in which both wandb and SwanLab keep a run."""
    data, at, part = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield part
            part = b""


def test_tensorboard(tracked: TrainConfig, offline: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    """TensorBoard's own reader gives the log; a resumed run's events take the place of those behind its step."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read() -> tuple[dict[str, list[tuple[int, float]]], EventAccumulator]:
        events = EventAccumulator(f"{tracked.output}/tensorboard", size_guidance={"scalars": 0, "tensors": 0})
        events.Reload()
        tags = events.Tags()["scalars"]
        return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}, events

    train(with_(tracked, track=("tensorboard",), save_steps=5), answer=reply)
    curves, events = read()
    expected = wanted(tracked.output)
    assert curves.keys() == expected.keys() and len(curves["train/loss"]) == 10
    assert all(curves[name] == approx(curve) for name, curve in expected.items())
    text = events.Tensors("watch/1/text_summary")
    assert [t.step for t in text] == [0, 5, 10] and "我是甄嬛" in text[-1].tensor_proto.string_val[0].decode()
    assert f"tensorboard: tensorboard --logdir '{tracked.output}/tensorboard'" in capsys.readouterr().err
    (Path(tracked.output) / "checkpoint-10" / "training_state.pt").unlink()
    train(with_(tracked, track=("tensorboard",), save_steps=5, resume="auto"), quiet=True, answer=reply)
    curves, _ = read()
    assert all(curves[name] == approx(curve) for name, curve in wanted(tracked.output).items())
    assert offline == []


def test_wandb(tracked: TrainConfig, offline: list[Any], capfd: pytest.CaptureFixture[str]) -> None:
    """The run's file holds the log, its settings and the answers; a resumed run keeps its id; nothing is printed."""
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2 as proto

    train(with_(tracked, track=("wandb",)), answer=reply)
    said = capfd.readouterr()
    # what wandb says of other packages depends on what this test process has imported before
    others = ("Detected [", "Weave", "weave-docs")
    ours = [line for line in said.err.splitlines() if "wandb" in line and not any(word in line for word in others)]
    assert said.out == "" and all(line.startswith("wandb: wandb sync ") for line in ours) and ours
    (file,) = Path(tracked.output).glob("wandb/offline-run-*/run-*.wandb")
    assert str(file.parent) in said.err
    curves: dict[str, list[tuple[int, float]]] = {}
    settings = {}

    def messages() -> Iterator[Any]:
        for record in records(file):
            message = proto.Record()
            message.ParseFromString(record)
            yield message

    until = time.monotonic() + 20  # wandb's own process writes the file, and ends with a record of its exit
    while time.monotonic() < until and not any(m.WhichOneof("record_type") == "exit" for m in messages()):
        time.sleep(0.05)
    for message in messages():
        kind = message.WhichOneof("record_type")
        if kind == "run":
            settings |= {i.key: json.loads(i.value_json) for i in message.run.config.update}
            assert (message.run.project, message.run.display_name) == ("minitune", "甄嬛 run")
        if kind == "history":
            items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in message.history.item}
            for name, value in items.items():
                if name.startswith(("train/", "eval/")) and name != "train/global_step":
                    curves.setdefault(name, []).append((items["train/global_step"], value))
    assert curves == wanted(tracked.output)
    assert settings["learning_rate"] == 2e-3 and settings["lora_target_modules"] == list(tracked.lora_target_modules)
    tables = [json.loads(p.read_text(encoding="utf-8")) for p in file.parent.glob("files/media/table/watch_*.json")]
    assert [t["data"] for t in tables] == [[["你是谁?", "我是甄嬛"]]] * 3
    train(with_(tracked, track=("wandb",), resume="auto"), quiet=True, answer=reply)
    names = [p.name for p in Path(tracked.output).glob("wandb/offline-run-*/run-*.wandb")]
    assert len(names) == 2 and len(set(names)) == 1
    assert offline == []


def test_swanlab(tracked: TrainConfig, offline: list[Any], capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("swanlab")
    from swanlab.proto.swanlab.record.v1 import record_pb2

    train(with_(tracked, track=("swanlab",)), answer=reply)
    said = capfd.readouterr()
    (line,) = [line for line in said.err.splitlines() if "swanlab" in line]
    assert said.out == "" and line.startswith("swanlab: swanlab sync '")
    (file,) = Path(tracked.output).glob("swanlab/run-*/run-*.swanlab")
    assert str(file.parent) in said.err
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in records(file):
        message = record_pb2.Record()
        message.ParseFromString(record)
        if message.WhichOneof("record_type") == "scalar":
            curves.setdefault(message.scalar.key, []).append((message.scalar.step, message.scalar.value.number))
    assert {name: curves[name] for name in wanted(tracked.output)} == {
        name: approx(curve) for name, curve in wanted(tracked.output).items()
    }
    assert "learning_rate" in (file.parent / "files" / "config.yaml").read_text(encoding="utf-8")
    texts = [p.read_text(encoding="utf-8") for p in file.parent.glob("media/text/*")]
    assert texts == ["我是甄嬛"] * 3
    assert offline == []


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "swanlab"])
def test_a_package_that_is_missing(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """One line with the extra, before anything is loaded."""
    found = track.importlib.util.find_spec
    monkeypatch.setattr(track.importlib.util, "find_spec", lambda n, *a: None if n == name else found(n, *a))
    argv = ["train", "--model", "not/there", "--data", config.data, "--output", config.output, "--track", name]
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert said == f"minitune: --track {name}: the package is not installed; pip install 'minitune[track]'\n"


def test_an_unknown_name(config: TrainConfig) -> None:
    with pytest.raises(UserError, match="track is 'mlflow'; it takes tensorboard, wandb, swanlab") as caught:
        train(with_(config, track=("mlflow",)), quiet=True)
    assert "\n" not in str(caught.value) and not Path(config.output).exists()


class Failing:
    """A tracker that talks, and fails at the fifth number."""

    def __init__(self, config: TrainConfig, step: int):
        self.logged = 0
        print("chatter")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        print("chatter")
        self.logged += 1
        if self.logged == 5:
            raise ConnectionError("the service is gone\nand more")

    def answers(self, step: int, samples: Sequence[Any]) -> None:
        pass

    def close(self) -> str:
        return "never reached"


class Broken(Failing):
    def __init__(self, config: TrainConfig, step: int):
        raise ImportError("half installed")


def test_a_failing_tracker_is_one_note(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may fail at its start or on the way: one line each, and the run is the same as without."""
    monkeypatch.setattr(track, "check_trackers", lambda names: None)
    monkeypatch.setattr("minitune.train.checks.check_trackers", lambda names: None)
    monkeypatch.setattr(track, "KINDS", {"failing": Failing, "broken": Broken})
    train(with_(config, track=("failing", "broken", "failing"), logging_steps=1))
    said = capsys.readouterr()
    assert said.out == ""
    assert [line for line in said.err.splitlines() if "failed" in line] == [
        "note: broken failed (half installed); the run goes on without it",
        "note: failing failed (the service is gone); the run goes on without it",
    ]
    without = with_(config, output=f"{config.output}-without", logging_steps=1)
    train(without, quiet=True)
    same(config.output, without.output)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "swanlab"])
def test_ctrl_c_is_the_runs(tracked: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: Any, name: str) -> None:
    """SwanLab takes SIGINT for itself and ends: the run finishes its step, logs it there too, and says how to look."""
    pytest.importorskip(name)
    config = with_(tracked, track=(name,), logging_steps=1)
    logged: list[int] = []
    log = track.KINDS[name].log  # type: ignore[attr-defined]

    def logs(self: Any, step: int, values: Mapping[str, float]) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        log(self, step, values)
        logged.append(step)

    monkeypatch.setattr(track.KINDS[name], "log", logs)
    with pytest.raises(UserError, match="stopped at step 2; go on with"):
        train(config, answer=reply)
    said = capsys.readouterr().err
    assert logged == [1, 2] and "failed" not in said and f"\n{name}: {name} " in said
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_is_not_finite_is_left_out(config: TrainConfig) -> None:
    """A curve has no place for a loss that is null in the log."""
    got: list[Mapping[str, float]] = []

    class Keeps(Failing):
        def log(self, step: int, values: Mapping[str, float]) -> None:
            got.append(values)

    trackers = track.Trackers(config, 0, print)
    trackers.open["keeps"] = Keeps(config, 0)
    trackers.row({"step": 3, "epoch": 0.5, "loss": None, "grad_norm": 1.0, "tokens": 9})
    assert got == [{"train/epoch": 0.5, "train/grad_norm": 1.0}]
