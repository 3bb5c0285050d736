"""The report as it is seen: a page that is whole, asks for nothing and can't be broken into; lines no wider than asked."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from minitune import cli
from minitune.config import TrainConfig, UserError
from minitune.data import html, progress, screen
from minitune.data.check import check
from minitune.data.html import Html, Section, bars, escape, lines, page, table, tag
from minitune.data.report import Report

VOID = {"meta", "br", "img", "hr", "input", "link"}
ROWS = [
    {
        "instruction": "介绍一下这座城市" * 4,
        "input": "",
        "output": "这座城市有很长的历史，也有很多值得去看的地方。" * (1 + i % 5),
    }
    for i in range(60)
] + [
    {"instruction": "<script>alert(1)</script>", "output": "藏着\u202e的\x00字</s>"},
    {"instruction": "电话", "output": "13987654320"},
    {"instruction": "没有回答", "output": ""},
]


class Reader(HTMLParser):
    """The tags, balanced; text by tag; attributes."""

    def __init__(self, document: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.feed(document)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture
def report(tmp_path: Path) -> Report:
    path = tmp_path / "数据.json"
    path.write_text(json.dumps(ROWS, ensure_ascii=False), encoding="utf-8")
    return check(TrainConfig(data=str(path)), near_duplicates="false")


def test_the_page(report: Report) -> None:
    """Every finding with its mend, both pictures; no script, no address, no data that is markup, nothing unseen."""
    document = report.as_page()
    read = Reader(document)
    text = " ".join(" ".join(read.text).split())
    assert read.tags.count("svg") == 2 and read.tags[0] == "html" and ("lang", "zh-CN") in read.attributes
    assert "script" not in read.tags and not {"src", "href", "onload", "onclick"} & {
        name for name, _ in read.attributes
    }
    assert not re.search(r"https?:|url\(|@import", document)
    for finding in report.findings:
        assert " ".join(finding.what().split()) in text and " ".join(finding.mend().split()) in text
    assert "⟨U+202E⟩" in text and "⟨U+0000⟩" in text and "\u202e" not in document and "\x00" not in document
    assert "13987654320" not in document
    assert document.startswith("<!doctype html>") and '<meta charset="utf-8">' in document


@given(st.text(max_size=40))
def test_what_a_person_wrote_is_text(text: str) -> None:
    """Between tags and in attributes, any text comes out as it went in, with what is not seen spelled out."""
    read = Reader(page("t", [Section("", [text, tag("p", text, title=text), table(("a",), [(text,)])])]))
    wanted = html.visible(text)
    assert [value for name, value in read.attributes if name == "title"] == [wanted]
    assert "".join(read.text).count(wanted) >= 3
    assert not html.UNSEEN.search(wanted)


def test_markup_is_marked() -> None:
    assert escape("<b>") == "&lt;b&gt;" and escape(Html("<b>")) == "<b>"
    assert tag("p", "a", Html("<br>"), class_="x y", id=None) == '<p class="x y">a<br></p>'


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=50), st.floats(-10, 1000))
@settings(max_examples=50)
def test_pictures_stay_inside(counts: list[int], mark: float) -> None:
    """Bars within the picture, as tall as their counts; curves of any values, one point or none."""
    edges = [float(i * 7) for i in range(len(counts) + 1)]
    drawn = bars(edges, counts, "标签", {"m": mark})
    rects = [dict(re.findall(r'(\w+)="([-\d.]+)"', r)) for r in re.findall(r"<rect[^>]*>", drawn)]
    assert len(rects) == sum(c > 0 for c in counts)
    for r in rects:
        assert float(r["x"]) >= 0 and float(r["x"]) + float(r["width"]) <= 720 and float(r["y"]) >= 0
    tall = [float(r["height"]) for r in rects]
    for a, x in zip([c for c in counts if c], tall, strict=True):
        assert x == pytest.approx(max(a / max(counts) * max(tall), 1), abs=0.11)
    curve = lines({"损失": [(i, c) for i, c in enumerate(counts)], "one": [(0, mark)], "none": []}, "step")
    for points in re.findall(r'points="([^"]*)"', curve):
        for point in points.split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= 720 and 0 <= y <= 280


def test_a_file_appears_whole_or_not(tmp_path: Path) -> None:
    path = tmp_path / "x.html"
    html.write(path, "一")
    html.write(path, "二")
    assert path.read_text(encoding="utf-8") == "二"
    with pytest.raises(RuntimeError), html.writing(path) as file:
        file.write("三")
        raise RuntimeError
    assert path.read_text(encoding="utf-8") == "二" and os.listdir(tmp_path) == ["x.html"]
    for bad in (tmp_path, tmp_path / "none" / "x.html"):
        with pytest.raises(UserError):
            html.write(bad, "x")


def seen(report: Report, width: int, **more: object) -> str:
    out = io.StringIO()
    settings = {"force_terminal": True, "color_system": "standard", "highlight": False} | more
    screen.show(report, Console(file=out, width=width, **settings))  # type: ignore[arg-type]
    return out.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_lines_fit(report: Report, width: int) -> None:
    """No line is wider than the terminal, Chinese counted as two columns; the pictures' columns line up."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", seen(report, width))
    assert max(map(cell_len, plain.splitlines())) <= min(width, 120)
    assert "█" in plain and "✗ would hurt" in plain and "13987654320" not in plain
    assert "\x00" not in plain and "\u202e" not in plain
    titles = re.findall(r"^.*characters an answer.*$", plain, re.M)
    assert len(titles) == 1 and ("characters a row" in titles[0]) == (width >= 72)


@given(st.text(st.sampled_from("a你…"), max_size=20), st.integers(2, 12))
def test_clipped(text: str, room: int) -> None:
    """As much of the text as fits, by columns; a character that would not fit whole is left out."""
    out = screen.clipped(text, room)
    assert cell_len(out) <= room and (out == text) == (cell_len(text) <= room)
    assert text.startswith(out.removesuffix("…").rstrip()) and cell_len(out) >= min(cell_len(text), room - 1)


def test_colours(report: Report) -> None:
    """Colours in a terminal; with NO_COLOR none; without a terminal neither, and each sentence on one line."""
    assert re.search(r"\x1b\[1;31m *✗", seen(report, 80))
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", seen(report, 80, no_color=True))
    bare = seen(report, 80, force_terminal=False, color_system=None)
    assert "\x1b" not in bare and not any(line.endswith(" ") for line in bare.splitlines())
    for finding in report.findings:
        assert any(finding.what() in line for line in bare.splitlines())


def test_a_few_rows(tmp_path: Path) -> None:
    """Files of one row, or of rows all alike, have pictures too."""
    for count in (1, 3):
        path = tmp_path / "x.json"
        path.write_text(json.dumps([{"instruction": "q", "output": "a"}] * count), encoding="utf-8")
        report = check(TrainConfig(data=str(path)), near_duplicates="false")
        assert "█" in seen(report, 80) and Reader(report.as_page()).tags.count("svg") == 2


def test_progress_is_for_terminals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without one, rows pass through and nothing is said."""
    assert list(progress.watch("reading", lambda: 0.5, range(3))) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_the_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "x.json", tmp_path / "报告.html"
    path.write_text(json.dumps(ROWS[:60], ensure_ascii=False), encoding="utf-8")
    assert cli.main(["data", "check", str(path), "--html", str(out)]) == 0
    assert f"{out}: the report as a page" in capsys.readouterr().out
    assert "characters a row" in out.read_text(encoding="utf-8")


def test_a_browser_opens_it(tmp_path: Path, report: Report) -> None:
    """Headless Chromium builds the page from the file alone; its own text is ours."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no Chromium here")
    path = tmp_path / "report.html"
    html.write(path, report.as_page())
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
        path.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120)
    assert "<svg" in done.stdout and "这座城市" in done.stdout, done.stderr
    assert "<script" not in done.stdout
