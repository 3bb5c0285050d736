"""The documentation against the program: links resolve, command lines parse, examples load, the map is complete."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import minitune
from minitune import cli
from minitune.config import TrainConfig, build, flat_fields, read_yaml
from minitune.data import records

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md"), ROOT / "tests" / "README.md"])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of each fenced block."""
    return FENCE.findall(page.read_text(encoding="utf-8"))


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def headings(page: Path) -> set[str]:
    """The anchors that a page's headings get: lower case, punctuation away, spaces to hyphens."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every `minitune` line of the shell blocks."""
    for language, text in blocks(page):
        if language in ("bash", "sh", "shell"):
            for line in text.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words and Path(words[0]).name == "minitune":
                    yield words[1:]


def parser_of(name: str) -> cli.Parser:
    parser = cli.Parser(prog=f"minitune {name}", allow_abbrev=False)
    cli.COMMANDS[name][1](parser)
    return parser


@each_page
def test_links(page: Path) -> None:
    """Every relative link names a file that is there, and a heading that it has."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name}: {target}: no such file"
        assert not anchor or anchor in headings(path), f"{page.name}: {target}: no such heading"


@each_page
def test_paths(page: Path) -> None:
    """Every path of the repository that stands in backticks is there."""
    for path in re.findall(r"`((?:tests|bench|docs|minitune)/[\w./-]+)`", prose(page)):
        if path.split("/")[0] == "minitune" or (ROOT / path.split("/")[0]).is_dir():
            assert (ROOT / path).exists(), f"{page.name}: `{path}` is not there"


@each_page
def test_command_lines(page: Path) -> None:
    """Every command line is taken by the program's own parser, and its settings are settings."""
    for words in commands(page):
        name, rest = words[0], [cli.hyphens(word) for word in words[1:]]
        values = vars(parser_of(name).parse_args(rest))
        if name == "train":
            values.pop("config", None)
            build(TrainConfig, values, page.name)


@each_page
def test_commands_in_prose(page: Path) -> None:
    """A `minitune …` in a sentence is a command of ours; so is each flag after it, and each flag alone."""
    known = {option for name in cli.COMMANDS for a in parser_of(name)._actions for option in a.option_strings}
    known |= {"--version"}
    for code in re.findall(r"`([^`\n]+)`", prose(page)):
        words = code.split()
        if words[0] == "minitune" and len(words) > 1 and words[1] != "…":
            assert words[1] in cli.COMMANDS or words[1].startswith("-"), f"{page.name}: `{code}`"
        if words[0] == "minitune" or words[0].startswith("--"):
            flags = {cli.hyphens(w.partition("=")[0]) for w in words if w.startswith("--")}
            assert flags <= known, f"{page.name}: `{code}`: {flags - known}"


@each_page
def test_make_targets(page: Path) -> None:
    """Every `make X` is a target of the Makefile."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    text = page.read_text(encoding="utf-8")
    for line in re.findall(r"^make ([a-z ]+)$|`make ([a-z ]+)`", text, re.M):
        assert set("".join(line).split()) <= targets, f"{page.name}: make {''.join(line)}"


@each_page
def test_examples(page: Path, tmp_path: Path) -> None:
    """Data examples load, YAML examples are settings, Python examples compile and use names that we export."""
    for i, (language, text) in enumerate(blocks(page)):
        path = tmp_path / f"{i}.{language}"
        path.write_text(text, encoding="utf-8")
        if language in ("json", "jsonl", "csv"):
            assert records.load(path).conversations
        elif language == "yaml":
            build(TrainConfig, read_yaml(path), page.name)
        elif language == "python":
            compile(text, page.name, "exec")
            assert set(re.findall(r"minitune\.(\w+)", text)) <= set(minitune.__all__)
            for call in re.findall(r"TrainConfig\(([^)]*)\)", text):
                assert set(re.findall(r"(\w+)=", call)) <= set(flat_fields(TrainConfig))


@each_page
def test_tables(page: Path) -> None:
    """Every row of a table has as many cells as its head; a bar inside a cell would shift the rest."""
    for table in re.findall(r"(?:^\|.*\|$\n?)+", prose(page), re.M):
        rows = table.strip().splitlines()
        assert re.fullmatch(r"\|(:?-+:?\|)+", rows[1].replace(" ", "")), f"{page.name}: {rows[0]}"
        for row in rows:
            assert len(cells(row)) == len(cells(rows[0])), f"{page.name}: {row}"


def cells(row: str) -> list[str]:
    return re.split(r"(?<!\\)\|", row.strip().strip("|"))


@pytest.mark.parametrize("pair", [("README.md", "README.zh-CN.md")])
def test_two_languages_one_content(pair: tuple[str, str]) -> None:
    """Both READMEs have the same blocks in the same order, and as many headings and table rows."""
    one, other = (ROOT / name for name in pair)
    assert blocks(one) == blocks(other)
    for mark in (r"^## ", r"^\|", r"^- \["):
        count = [len(re.findall(mark, prose(page), re.M)) for page in (one, other)]
        assert count[0] == count[1], f"{mark}: {count}"


def test_the_map_is_complete() -> None:
    """docs/architecture.md names every module in its room, and no module that is not there."""
    page = ROOT / "docs" / "architecture.md"
    tree = next(text for _, text in blocks(page) if text.startswith("minitune/"))
    named: set[str] = set()
    room = inner = ""
    for line in tree.splitlines():
        if not line.startswith(" "):
            room = "minitune/" if line.startswith("minitune/") else ""
            continue
        word = line.split()[0]
        indent = len(line) - len(line.lstrip())
        if indent == 2:
            inner = word if word.endswith("/") else ""
            if not inner:
                named.add(room + word)
        elif room and word.endswith(".py"):
            named.add(room + inner + word)
    there = {str(p.relative_to(ROOT)) for p in (ROOT / "minitune").glob("**/*.py")}
    there -= {name for name in there if name.endswith("/__init__.py") and name.count("/") > 1}
    assert named == there


def test_the_checks_can_fail() -> None:
    """The reading above finds what it looks for: pages, command lines, anchors in both scripts."""
    readme = ROOT / "README.md"
    assert {p.name for p in PAGES} >= {"README.md", "README.zh-CN.md", "architecture.md", "CONTRIBUTING.md"}
    assert len(list(commands(readme))) >= 10
    assert {"数据格式", "新机器上的两条命令"} <= headings(ROOT / "README.zh-CN.md")
    assert cells(r"| a | b \| c |") == [" a ", r" b \| c "]
    with pytest.raises(minitune.UserError, match="did you mean learning_rate"):
        parser_of("train").parse_args(["--learnin_rate", "1"])
