"""The conversation at a real terminal (a pty), with a session that echoes instead of a model."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from minitune.config import UserError
from minitune.infer import terminal
from minitune.infer.sampling import Sampling

REPOSITORY = Path(__file__).resolve().parents[2]
ECHO = r"""
import time
from types import SimpleNamespace
from minitune.config import UserError
from minitune.infer import terminal
from minitune.infer.sampling import Sampling

class Echo:
    sampling, system, finish = Sampling(), "", "stop"
    template = SimpleNamespace(config=SimpleNamespace(name="minicpm"), tuned=True)
    engine = SimpleNamespace(decoder=SimpleNamespace(device="cpu", dtype="torch.float32"))
    def clear(self): pass
    def ask(self, text):
        if text == "long": raise UserError("too long")
        yield f"[{text!r}"
        while text == "slow":
            time.sleep(0.02)
            yield "."
        yield f" {self.sampling.temperature} {self.system}]"

terminal.tolerate_bytes()
raise SystemExit(terminal.converse(Echo(), "tiny + out"))
"""


class Screen:
    """A process on a pty: `say` types bytes, `see` waits for a text."""

    def __init__(self, term: str):
        self.master, slave = pty.openpty()
        env = {**os.environ, "TERM": term, "LC_ALL": "C.UTF-8", "COLUMNS": "80", "INPUTRC": "/dev/null"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", ECHO], cwd=REPOSITORY, env=env, stdin=slave, stdout=slave, stderr=slave,
            start_new_session=True, preexec_fn=_control_terminal,
        )  # fmt: skip
        os.close(slave)
        self.text = ""

    def say(self, data: str | bytes) -> None:
        self.text = ""
        os.write(self.master, data.encode() if isinstance(data, str) else data)

    def see(self, *wanted: str, within: float = 20.0) -> str:
        end = time.monotonic() + within
        while not all(w in self.text for w in wanted):
            ready, _, _ = select.select([self.master], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise TimeoutError(f"waited for {wanted}, saw {self.text!r}")
            try:
                self.text += os.read(self.master, 4096).decode("utf-8", "replace")
            except OSError:
                raise AssertionError(f"it ended; waited for {wanted}, saw {self.text!r}") from None
        return self.text

    def press(self, key: bytes, *wanted: str) -> None:
        """A signal between the echo of a key and input()'s select waits for the next key: press again."""
        for _ in range(10):
            self.say(key)
            with contextlib.suppress(TimeoutError):
                self.see(*wanted, within=2.0)
                return
        raise TimeoutError(f"pressed {key!r} ten times, saw no {wanted}")


def _control_terminal() -> None:
    import fcntl
    import signal
    import termios

    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in a shell's background ignore it
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C typed into the pty is a signal


@pytest.fixture
def screen() -> Iterator[Callable[[str], Screen]]:
    opened: list[Screen] = []

    def start(term: str = "xterm") -> Screen:
        opened.append(Screen(term))
        return opened[-1]

    yield start
    for one in opened:
        one.process.kill()
        one.process.wait()
        os.close(one.master)


@pytest.mark.parametrize("term", ["xterm-256color", "dumb"])
def test_a_conversation_at_a_terminal(screen: Callable[[str], Screen], term: str) -> None:
    """Banner, editing of wide characters, several lines, commands, mistakes, Ctrl-C twice, bytes, Ctrl-D."""
    at = screen(term)
    at.see("tiny + out | template: minicpm | cpu float32 | /help", ">>> ")
    at.say("你好吗\x7f\x7f们\r")
    at.see("['你们' 0.3 ]", ">>> ")
    at.say("one\\\r")
    at.see("... ")
    at.say("two\r")
    at.see(r"['one\ntwo' 0.3 ]", ">>> ")
    at.say("/set temperature 0.7\r")
    at.see("temperature=0.7", ">>> ")
    at.say("/system 是 我\r")
    at.see("system text set", ">>> ")
    at.say("/etc/hosts\r")
    at.see("['/etc/hosts' 0.7 是 我]", ">>> ")
    at.say("/set temprature 1\r")
    at.see("did you mean temperature?", ">>> ")
    at.say("/nothing\r")
    at.see("/nothing: no such command; /help lists them", ">>> ")
    at.say("/help\r")
    at.see("/clear", "/exit", ">>> ")
    at.say("long\r")
    at.see("too long", ">>> ")
    at.say("slow\r")
    at.see("['slow'...")
    at.say(b"\x03")
    at.see(">>> ")
    at.say("typed but not sent")
    at.see("not sent")
    at.press(b"\x03", "Ctrl-D or /exit leaves", ">>> ")
    at.say(b"a\xff\xfeb\r")
    at.see(" 0.7 ", ">>> ")
    at.say("\x1b[A\r" if term != "dumb" else "again\r")  # the arrow brings the last line back
    at.see("['a" if term != "dumb" else "['again'", ">>> ")
    at.say(b"\x04")
    assert at.process.wait(timeout=10) == 0


def _session() -> SimpleNamespace:
    return SimpleNamespace(sampling=Sampling(), system="", cleared=0)


def test_set_reads_names_and_values_like_flags() -> None:
    chat = _session()
    assert terminal.command(chat, "/set top-p=0.5") and chat.sampling == Sampling(top_p=0.5)
    assert terminal.command(chat, "/set seed 7") and chat.sampling == Sampling(top_p=0.5, seed=7)
    assert terminal.command(chat, "/set\tseed none") and chat.sampling == Sampling(top_p=0.5)
    for wrong in ("/set top_p", "/set top_p 2", "/set top_p high", "/set a b c"):
        with pytest.raises(UserError):
            terminal.command(chat, wrong)
    assert chat.sampling == Sampling(top_p=0.5)
    assert not terminal.command(chat, "/exit")


def test_an_interrupted_prompt_has_the_shells_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    """What was said stays on stdout, the line is ended, and the generator is closed (so history is kept)."""
    closed = []

    def ask(_: str) -> Iterator[str]:
        try:
            yield "half"
            raise KeyboardInterrupt
        finally:
            closed.append(True)

    assert terminal.answer(SimpleNamespace(ask=ask), "x") == 130  # type: ignore[arg-type]
    assert capsys.readouterr().out == "half\n" and closed


def test_the_terminal_opens_without_torch() -> None:
    """Settings and help can be read before anything heavy is loaded."""
    code = "import sys, minitune.infer.terminal, minitune.infer.sampling; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
