"""What a person sees while it runs: the live view at every size, plain lines elsewhere, loss.png from a process."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import random
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console, ConsoleDimensions
from rich.text import Text
from runs import argv_of, in_terminal, rows_of, with_

from minitune import TrainConfig, train
from minitune.cli import main
from minitune.train import chart, picture, view
from minitune.train.live import Live, Steady
from minitune.train.view import About, Lines, clock, one_line
from minitune.train.watch import Sample

# The curve


def dots(rows: list[list[chart.Cell]], kind: int) -> set[tuple[int, int]]:
    """{(x, y from the top)} of the dots of braille characters, by the standard's numbering of dots 1 to 8."""
    places = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 3), (1, 3)]
    return {
        (2 * column + dx, 4 * line + dy)
        for line, row in enumerate(rows)
        for column, (character, what) in enumerate(row)
        if what == kind
        for bit, (dx, dy) in enumerate(places)
        if (ord(character) - 0x2800) >> bit & 1
    }


def test_a_line_of_dots() -> None:
    """A falling straight line: a dot in every column, at the height of its value, and no gap between columns."""
    curve = [10 - i * 10 / 39 for i in range(40)]
    found = dots(chart.plot(curve, [], [], (20, 5), (0.0, 10.0)), chart.CURVE)
    for x, value in enumerate(curve):
        heights = sorted(y for a, y in found if a == x)
        assert heights and abs(heights[-1] - (10 - value) / 10 * 19) <= 0.5
    assert {y for _, y in found} == set(range(20))


@pytest.mark.parametrize("count", [1, 2, 7, 40, 41, 1000, 100_000])
def test_resampling(count: int) -> None:
    """Any number of values keeps its ends where they are fewer than columns, and its mean where they are more."""
    chance = random.Random(count)
    values = [chance.gauss(3, 1) for _ in range(count)]
    got = chart.resample(values, 40)
    assert len(got) == 40
    if count < 40:
        assert (got[0], got[-1]) == pytest.approx((values[0], values[-1]))
        assert min(values) - 1e-9 <= min(got) and max(got) <= max(values) + 1e-9
    else:
        weights = [(i + 1) * count // 40 - i * count // 40 for i in range(40)]
        assert sum(g * w for g, w in zip(got, weights, strict=True)) == pytest.approx(sum(values))


def test_values_beyond_the_border_and_marks() -> None:
    """An outlier sticks to the border; a held-out loss is a mark in its place."""
    rows = chart.plot([1.0] * 20, [1e9, *[1.0] * 38, -1e9], [(0.5, 1.9)], (20, 4), (0.0, 2.0))
    assert {(0, 0), (39, 15)} <= dots(rows, chart.RAW)
    assert [(x, y) for y, row in enumerate(rows) for x, cell in enumerate(row) if cell == ("◆", chart.MARK)] == [
        (10, 0)
    ]


# The block


def fill(live: Live, steps: int, samples: int = 0) -> None:
    """What a run tells until `steps`."""
    live.step = steps
    for step in range(1, steps + 1):
        live.losses([3 * math.exp(-step / 40) + 0.2 * math.sin(step)])
        row = {"step": step, "loss": 2.1, "learning_rate": 1e-4, "grad_norm": 0.5, "tokens_per_second": 1234567.0}
        live.row({**row, "memory_gib": 123.4})
    if steps:
        live.held_out(steps // 2, 1.9, True)
        live.held_out(steps, float("nan"), False)
    texts = ["我是甄嬛,家父是大理寺少卿甄远道。" * 9, "", "a\x1b[2Jb\r\n\tc\u202e" + "🙂" * 99, "x"]
    if samples:
        live.samples(steps, [Sample(p, t, "stop") for p, t in zip(live.about.prompts, texts, strict=False)])


PROMPTS = ["你是谁?" * 30, "short", "today\x07?", "a fourth one"]


@pytest.mark.parametrize("prompts", [0, 1, 4])
@pytest.mark.parametrize("held", [False, True])
def test_every_size(prompts: int, held: bool) -> None:
    """No line is wider than the terminal and no block higher; it has as many lines at the end as at the beginning, and
    nothing that a model wrote moves the cursor."""
    about = About(200, 3, "a/long/name/of/甄嬛 · lora → out", held, PROMPTS[:prompts])
    stages = [Live(about) for _ in range(3)]
    for live, steps in zip(stages, (0, 7, 200), strict=True):
        fill(live, steps, samples=steps)
    stages[1].busy("answering the prompts …")
    for width in (1, 8, 15, 20, 33, 40, 59, 60, 79, 80, 81, 120, 200):
        for height in (1, 2, 5, 10, 16, 24, 50):
            blocks = [live.lines(width, height) for live in stages]
            assert len({len(block) for block in blocks}) == 1, (width, height)
            assert len(blocks[0]) <= max(1, height - 1)
            for block in blocks:
                assert max(cell_len(line.plain) for line in block) <= width
                assert all(c.isprintable() for line in block for c in line.plain)


def test_at_eighty_columns() -> None:
    """The block that a plain terminal of 80 x 24 shows."""
    live = Live(About(200, 3, "smollm2 · lora → 甄嬛", True, PROMPTS[:1]))
    fill(live, 100, samples=1)
    live.epoch = 1.5
    text = "\n".join(line.plain.rstrip() for line in live.lines(80, 24))
    lines = text.splitlines()
    assert lines[0] == "minitune smollm2 · lora → 甄嬛"
    assert lines[1].endswith("100/200  50%  epoch 1.50/3") and lines[1].startswith("━━━")
    assert re.search(
        r"^loss      2\.1000    smoothed  \d\.\d{4}    rate      1\.00e-04  grad norm 0\.5000$", text, re.M
    )
    assert re.search(r"^tokens/s  1,234,567 memory    123\.4 GiB elapsed   0:0\d      left      0:0\d$", text, re.M)
    assert re.search(r"^held out  not finite at step 100 +best      1\.9000 at step 50$", text, re.M)
    labels = re.findall(r"^ +(\d\.\d{3}) ", text, re.M)
    assert len(labels) == 2 and float(labels[0]) > float(labels[1])
    at = lines.index("answers at step 100")
    assert lines[at + 2].strip().startswith("我是甄嬛") and lines[at + 3].endswith("…")
    live.stopping()
    live.busy("saving checkpoint-100 …")  # a wish to stop stays visible
    assert live.lines(80, 24)[0].plain.endswith("stopping; Ctrl-C again: at once")


def test_where_a_narrower_window_has_wrapped_the_block() -> None:
    """Terminals wrap what is wider than a new width: the cursor goes up by the rows that the old lines take now."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, height=30)
    old, new = [Text("x" * n) for n in (80, 79, 0, 31, 30, 61)], [Text("y")] * 2
    live = Steady(lambda width, height: old if width == 80 else new, console, auto_refresh=False, redirect_stderr=False)
    live.start(refresh=True)
    for width, block in ((80, old), (30, old), (30, new), (90, new)):
        out.seek(0), out.truncate()
        console.size = ConsoleDimensions(width, 30)
        live.key = ()
        live.refresh()
        rows = sum(max(1, -(-len(line) // width)) for line in block)
        assert out.getvalue().count("\x1b[1A") == rows - 1, (width, rows)
        assert out.getvalue().startswith("\x1b[?2026h") and out.getvalue().endswith("\x1b[?2026l")
    live.stop()


def test_a_long_run_stays_cheap() -> None:
    """A hundred thousand losses are kept as at most two thousand points, and the curve is still theirs."""
    live = Live(About(100_000, 1, "x"))
    live.losses([5 - 4 * i / 100_000 for i in range(100_000)])
    assert len(live.smoothed) == len(live.raw) <= 2000
    assert live.raw[0] == pytest.approx(5, abs=0.01) and live.raw[-1] == pytest.approx(1, abs=0.01)
    live.step = 100_000
    start = time.perf_counter()
    live.lines(80, 24)
    assert time.perf_counter() - start < 0.25


@pytest.mark.parametrize(("seconds", "text"), [(None, "-"), (0.4, "0:00"), (59.6, "1:00"), (3661, "1:01:01")])
def test_clock(seconds: float | None, text: str) -> None:
    assert clock(seconds) == text


def test_one_line() -> None:
    assert one_line(" a\n\u3000b\x1b[31m\x00 甄嬛 ") == "a b·[31m· 甄嬛"


# In a terminal


class Terminal:
    """A screen that the bytes of a process are drawn on, and whose window can be resized."""

    def __init__(self, columns: int, lines: int):
        pyte = pytest.importorskip("pyte")
        self.master, self.slave = os.openpty()
        os.set_blocking(self.master, False)
        self.screen = pyte.Screen(columns, lines)
        self.stream = pyte.ByteStream(self.screen)
        self.bytes = b""
        self.resize(columns, lines)

    def resize(self, columns: int, lines: int) -> None:
        import fcntl
        import termios

        self.screen.resize(lines, columns)
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def read(self) -> str:
        """What stands on the screen now."""
        with contextlib.suppress(BlockingIOError, OSError):
            while data := os.read(self.master, 65536):
                self.bytes += data
                self.stream.feed(data)
        return "\n".join(line.rstrip() for line in self.screen.display)

    def wait(self, ready: Callable[[str], Any], seconds: float = 60) -> str:
        until = time.monotonic() + seconds
        while not ready(screen := self.read()):
            assert time.monotonic() < until, screen
            time.sleep(0.02)
        return screen


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal(80, 24)
    yield terminal
    os.close(terminal.master)
    os.close(terminal.slave)


def test_a_run_in_a_terminal(config: TrainConfig, processes: Any, terminal: Terminal) -> None:
    """The block is redrawn in place, survives a narrower and a wider window without remains, and the last one stays
    above the last lines."""
    config = with_(config, eval_fraction=0.2, logging_steps=1)
    process = processes.Process(target=in_terminal, args=(argv_of(config), os.ttyname(terminal.slave), {}, 0.8))
    process.start()
    screen = terminal.wait(lambda s: re.search(r" [2-9]/\d+ ", s) and "GiB" in s)
    assert len(re.findall("^minitune ", screen, re.M)) == 1 and screen.count("loss  ") == 1
    for columns in (50, 80, 34, 100):
        before = len(terminal.bytes)
        terminal.resize(columns, 24)
        terminal.wait(lambda _, before=before: terminal.bytes[before:].count(b"\x1b[?2026l") >= 2)
        screen = terminal.wait(lambda s: "held out" in s)
        assert screen.count("smoothed") == 1 and screen.count("━ ") <= 1, screen
    while process.is_alive():
        terminal.read()
        time.sleep(0.02)
    process.join()
    screen = terminal.read()
    assert process.exitcode == 0 and not terminal.screen.cursor.hidden
    assert screen.count("smoothed") == 1 and "100%" in screen and "left      0:00" in screen
    assert re.search(r"^done: 10 steps", screen, re.M) and "talk to it" in screen
    # once the block stands, only news is drawn
    assert len(terminal.bytes) < 120_000


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_plain_lines_in_a_terminal(
    config: TrainConfig, processes: Any, terminal: Terminal, environment: dict[str, str]
) -> None:
    """NO_COLOR and a terminal that can't move its cursor: lines, and not one control code."""
    argv = argv_of(with_(config, max_steps=2))
    process = processes.Process(target=in_terminal, args=(argv, os.ttyname(terminal.slave), environment))
    process.start()
    while process.is_alive():
        terminal.read()
        time.sleep(0.02)
    terminal.read()
    assert process.exitcode == 0 and b"\x1b" not in terminal.bytes and b"step 2/2  epoch" in terminal.bytes


def test_plain_lines(config: TrainConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """No terminal: a line at every multiple of `logging_steps` and at the end, each with everything that one looks
    for; a held-out loss in between does not move them."""
    monkeypatch.setattr("minitune.train.report.draw", lambda *_: None)
    train(with_(config, logging_steps=4, eval_fraction=0.2, eval_steps=3, max_steps=10))
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line.startswith("step ")]
    steps = re.compile(
        r"step (\d+)/10  epoch \d\.\d\d  loss \d+\.\d{4}  lr \d\.\d\de[-+]\d\d  [\d,]+ tok/s  \d+\.\d GiB  left (-|\d+:\d\d)"
    )
    assert [m[1] for line in lines if (m := steps.fullmatch(line))] == ["4", "8", "10"]
    held = [line for line in lines if "held-out" in line]
    assert [line.split()[1] for line in held] == ["3/10", "6/10", "9/10", "10/10"]
    assert all(re.fullmatch(r"step \d+/10  held-out loss \d\.\d{4}(  best so far)?", line) for line in held)
    assert said.out == "" and "\x1b" not in said.err


def test_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Live only where stderr is a terminal that moves its cursor, colours are wanted, and the run is not quiet."""
    monkeypatch.setattr(sys, "stderr", type("Tty", (), {"isatty": lambda self: True, "write": len, "flush": len})())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    about = About(1, 1, "x")
    assert isinstance(view.choose(about, quiet=False), Live)
    assert isinstance(view.choose(about, quiet=True), Lines)
    monkeypatch.delenv("TERM")
    assert isinstance(view.choose(about, quiet=False), Lines)


# loss.png


def write_log(folder: Path, steps: int, tail: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = [{"step": i, "loss": 3 / i if i % 7 else None} for i in range(1, steps + 1)]
    rows.append({"step": steps, "eval_loss": 0.5})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "log.jsonl").write_text(text + tail, encoding="utf-8")


def test_a_drawing_from_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rarely: not before it is due, and by one process; what it draws is whole, from a log that is being written, and
    the last picture has the last rows."""
    import matplotlib.image

    folder = tmp_path / "甄嬛 $x"
    path = folder / "loss.png"
    write_log(folder, 50, tail='{"step": 51, "lo')
    background = picture.Background(folder, folder.name)
    for _ in range(1000):
        background.refresh()
    assert background.process is None and not background.drawn(), "a short run starts no process"
    monkeypatch.setattr(picture, "AFTER", 0.0)
    background.refresh()
    process = background.process
    background.refresh()
    assert process is not None and background.process is process
    if hasattr(os, "getpgid"):
        assert os.getpgid(process.pid) != os.getpgid(0), "Ctrl-C would reach it"
    until = time.monotonic() + 60
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.05)
    first = path.read_bytes()
    assert matplotlib.image.imread(path, format="png").std() > 0.01
    assert sorted(p.name for p in folder.iterdir()) == ["log.jsonl", "loss.png"]
    write_log(folder, 90)
    background.last()
    assert background.drawn() and background.process is None and process.returncode == 0
    assert path.read_bytes() != first
    picture.draw(tmp_path / "want.png", *picture.read(folder / "log.jsonl"), title=folder.name)
    assert path.read_bytes() == (tmp_path / "want.png").read_bytes()


def test_a_run_draws_while_it_runs(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """loss.png is drawn by the process, at the end too; where that fails, by the run itself."""
    for name in ("AFTER", "EVERY"):
        monkeypatch.setattr(picture, name, 0.0)
    monkeypatch.setattr("minitune.train.report.draw", lambda path, *_: path.write_bytes(b"by the run"))
    train(with_(config, logging_steps=6), quiet=True)
    path = Path(config.output) / "loss.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(picture, "__file__", "/no/such/file.py")
    train(with_(config, logging_steps=6, output=f"{config.output}-2"), quiet=True)
    assert Path(f"{config.output}-2/loss.png").read_bytes() == b"by the run"


def test_a_drawing_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the run's end and where the run is stopped: a process that would draw later is gone, and its half file too."""
    inner = subprocess.Popen.wait
    monkeypatch.setattr(subprocess.Popen, "wait", lambda self, timeout=None: inner(self, timeout and 0.05))
    for end in (picture.Background.drawn, picture.Background.close):
        background = picture.Background(tmp_path, "x")
        background.process = process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        (tmp_path / ".loss.png.123.part").write_bytes(b"half")
        background.last()
        assert not end(background)
        assert background.process is None and process.poll() is not None and list(tmp_path.iterdir()) == []


def test_titles_are_drawn_or_left_out(tmp_path: Path) -> None:
    """A Chinese name where a font has it, no boxes where none has, and no formula from a dollar sign."""
    assert picture.fonts_for("out-1") == ["DejaVu Sans"]
    assert picture.fonts_for("\U0010fffd") is None
    pictures = []
    for i, title in enumerate(("", "\U0010fffd", "$x^$", "甄嬛" if picture.fonts_for("甄嬛") else "x")):
        picture.draw(tmp_path / f"{i}.png", [{"step": 1, "loss": 1.0}], [], title)
        pictures.append((tmp_path / f"{i}.png").read_bytes())
    assert pictures[0] == pictures[1] and len(set(pictures)) == 3


def test_from_the_command(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """The last lines name the best held-out loss, and a command that a shell takes as it is."""
    config = with_(config, output=f"{config.output} 甄 $x", eval_fraction=0.2, max_steps=3)
    assert main(argv_of(config)) == 0
    out = capsys.readouterr().out.splitlines()
    held = [r["eval_loss"] for r in rows_of(config.output) if "eval_loss" in r]
    assert re.match(rf"done: 3 steps in \d+ s, loss \d\.\d{{4}}, held out {held[-1]:.4f}, peak ", out[0])
    assert out[-1].endswith(f"--adapter '{config.output}'")
    assert (Path(config.output) / "loss.png").is_file()
