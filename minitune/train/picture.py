"""loss.png. Drawn by a process of its own while the run goes on: matplotlib would hold the interpreter that drives the
steps. The process reads log.jsonl and knows nothing else, so this file imports nothing of the package."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

AFTER = 5.0  # seconds until the first drawing of a run; it takes a second or two of an idle core
EVERY = 30.0  # seconds between two; each takes a third of a second
# Files of fonts that draw Chinese, on Linux, macOS and Windows; sans before serif.
CJK: tuple[str, ...] = (
    "notosanscjk",
    "notosanssc",
    "sourcehansans",
    "wqy",
    "pingfang",
    "hiraginosansgb",
    "msyh",
    "simhei",
)
CJK += ("droidsansfallback", "notoserifcjk", "notoserifsc", "sourcehanserif", "simsun", "uming", "ukai", "arialunicode")


class Background:
    """Keeps loss.png fresh from another process, rarely, at the lowest priority. A run that is over soon has none.

    The process has matplotlib imported by the end of the run, and draws the last picture while the result is written.
    """

    def __init__(self, folder: Path, title: str):
        self.folder, self.title = folder, title
        self.process: subprocess.Popen[bytes] | None = None
        self.since = time.monotonic()  # the last drawing, or the beginning

    def refresh(self) -> None:
        """Asks for a drawing where one is due; costs a look at the clock otherwise."""
        now = time.monotonic()
        if now - self.since < (EVERY if self.process else AFTER):
            return
        self.since = now
        if self.process:
            self._ask()
            return
        command = [sys.executable, "-P", __file__, str(self.folder), self.title]
        quiet = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with contextlib.suppress(OSError):  # no memory for a process: the picture waits for the end
            # a session of its own: Ctrl-C is for the run
            self.process = subprocess.Popen(command, start_new_session=True, **quiet)  # type: ignore[call-overload]

    def _ask(self) -> None:
        assert self.process is not None and self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it has ended (its exit status tells), or was asked to
            self.process.stdin.write(b"\n")
            self.process.stdin.flush()

    def last(self) -> None:
        """The log is complete: asks for the last drawing, which `drawn` waits for. Only the first call asks."""
        if self.process is not None and self.process.stdin is not None and not self.process.stdin.closed:
            self._ask()
            with contextlib.suppress(OSError):
                self.process.stdin.close()

    def drawn(self) -> bool:
        """Whether the process has drawn the last picture; if not, it has ended."""
        if self.process is None:
            return False
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self.process.wait(10) == 0:
                self.process = None
                return True
        self.close()
        return False

    def close(self) -> None:
        """Ends the process, so that it can't replace a later picture."""
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(OSError):
            if self.process.stdin is not None:
                self.process.stdin.close()
        for part in self.folder.glob(".loss.png.*.part"):
            part.unlink(missing_ok=True)
        self.process = None


class Smooth:
    """Exponential moving average without the bias of its start."""

    def __init__(self, weight: float = 0.9):
        self.weight, self.mean, self.norm = weight, 0.0, 0.0

    def push(self, value: float) -> float:
        """The average with one more value."""
        self.mean = self.weight * self.mean + (1 - self.weight) * value
        self.norm = self.weight * self.norm + 1 - self.weight
        return self.mean / self.norm


def fonts_for(text: str) -> list[str] | None:
    """Font families that draw `text` together; None where this machine has none for it."""
    families, left = ["DejaVu Sans"], {ord(c) for c in text if not c.isspace()}
    if text.isascii():
        return families
    from matplotlib import font_manager

    def rank(file: str) -> int:
        name = Path(file).name.lower().replace("-", "").replace("_", "").replace(" ", "")
        return next((i for i, known in enumerate(CJK) if name.startswith(known)), len(CJK))

    def regular(file: str) -> bool:
        return not any(weight in file.lower() for weight in ("bold", "black", "light", "thin", "medium"))

    left -= font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap().keys()
    files = [f for f in font_manager.findSystemFonts() if rank(f) < len(CJK)]
    for file in sorted(files, key=lambda f: (not regular(f), rank(f), f)):
        if not left:
            break
        with contextlib.suppress(Exception):  # a damaged file, or a kind that FreeType does not read
            font_manager.fontManager.addfont(file)  # not found by name: matplotlib's list is as old as its cache
            families.append(font_manager.fontManager.ttflist[-1].name)
            left -= font_manager.get_font(file).get_charmap().keys()
    return None if left else families


def draw(path: Path, rows: list[dict[str, Any]], evals: list[tuple[int, float | None]], title: str = "") -> None:
    """The loss over the steps as a PNG, in place of an earlier one: every step, a smoothed line, and the held-out
    losses. OSError where it can't be written; the earlier one is whole then."""
    import logging

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it speaks while it builds its font cache
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    known = [(r["step"], r["loss"]) for r in rows if r.get("loss") is not None]
    held = [(step, loss) for step, loss in evals if loss is not None]
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    if known:
        steps, losses = zip(*known, strict=True)
        axes.plot(steps, losses, color="#9db7d5", linewidth=1, label="loss")
        mean = Smooth()
        axes.plot(steps, [mean.push(loss) for loss in losses], color="#1f4e89", linewidth=2, label="smoothed")
    if held:
        axes.plot(*zip(*held, strict=True), "o-", color="#c8553d", label="held out")
    axes.set(xlabel="step", ylabel="loss (nats per learned token)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if known or held:
        axes.legend(frameon=False)
    if families := fonts_for(title):
        axes.set_title(title, fontfamily=families, fontsize=11, parse_math=False)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """The figure as a PNG, whole or not at all; it is closed."""
    from matplotlib import pyplot as plt

    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        figure.savefig(part, format="png")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
        plt.close(figure)


def read(path: Path) -> tuple[list[dict[str, Any]], list[tuple[int, float | None]]]:
    """(rows of steps, held-out losses) of a log that may be growing: half a last line is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    rows = [json.loads(line) for line in lines]
    return [r for r in rows if "eval_loss" not in r], [(r["step"], r["eval_loss"]) for r in rows if "eval_loss" in r]


if __name__ == "__main__":
    with contextlib.suppress(OSError):
        os.nice(19)
    folder = Path(sys.argv[1])
    for _ in itertools.chain([""], sys.stdin):  # once now, then whenever a line asks; the run's end is the end
        draw(folder / "loss.png", *read(folder / "log.jsonl"), title=sys.argv[2])
