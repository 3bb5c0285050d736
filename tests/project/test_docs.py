"""The documentation against the program: links resolve, command lines parse, examples load, both languages say the
same, figures are those of the formulas, the map is complete."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import minitune
from minitune import cli
from minitune.config import TrainConfig, build, flat_fields, read_yaml
from minitune.data import records
from minitune.foreign.reading import Source, read

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


def settings(values: dict, where: str) -> TrainConfig:
    """What `minitune train` makes of them, in whatever program's words."""
    return build(TrainConfig, read([Source(where, values)], flat_fields(TrainConfig)).values, where)


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
            settings(values, page.name)


@each_page
def test_commands_in_prose(page: Path) -> None:
    """A `minitune …` in a sentence is a command of ours; so is each flag after it, and each flag alone."""
    known = {option for name in cli.COMMANDS for option in parser_of(name)._option_string_actions}
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
def test_examples(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data examples load, YAML examples are settings, Python examples compile and use names that we export."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "huanhuan.json").write_text("[]", encoding="utf-8")
    info = {"huanhuan": {"file_name": "huanhuan.json"}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    for i, (language, text) in enumerate(blocks(page)):
        path = tmp_path / f"{i}.{language}"
        path.write_text(text, encoding="utf-8")
        if language in ("json", "jsonl", "csv"):
            assert records.load(path).conversations
        elif language == "yaml":
            settings(read_yaml(path), page.name)
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


PAIRS = [page for page in PAGES if page.with_suffix(".zh-CN.md").exists()]
IN_BOTH = {
    "README",
    "concepts",
    "from-the-tutorial",
    "scale",
    "settings",
    "troubleshooting",
    "which-card",
    "which-method",
}


def test_pages_for_users_are_in_both_languages() -> None:
    assert {page.stem for page in PAIRS} >= IN_BOTH


@pytest.mark.parametrize("page", PAIRS, ids=lambda p: p.name)
def test_two_languages_one_content(page: Path) -> None:
    """A page and its Chinese twin: the same blocks in the same order, as many headings, paragraphs, table rows, links."""
    other = page.with_suffix(".zh-CN.md")
    assert blocks(page) == blocks(other)
    for mark in (r"^## ", r"^### ", r"^\|", r"^- ", r"^\d+\. ", r"^\*\*", r"\]\(https?:"):
        count = [len(re.findall(mark, prose(p), re.M)) for p in (page, other)]
        assert count[0] == count[1], f"{page.name}: {mark}: {count}"
    one, two = (re.findall(r"\]\((https?:[^)]+)\)", prose(p)) for p in (page, other))
    assert one == two
    one, two = (sorted(re.findall(r"\d[\d,]*\.?\d* (?:GiB|MiB|GB)\b", prose(p))) for p in (page, other))
    assert one == two, f"{page.name}: figures differ"


@each_page
def test_links_to_other_places(page: Path) -> None:
    """Only their form, since nothing is fetched: https, a real host, and an issue's number as its label says."""
    for label, target in re.findall(r"\[([^\]]+)\]\((\w+:[^)\s]*)\)", prose(page)):
        assert re.fullmatch(r"https://[a-z0-9.-]+\.[a-z]{2,}(/[\w./%#?=&+~-]*)?", target), f"{page.name}: {target}"
        assert not re.search(r"localhost|127\.0|example\.(com|org)", target)
        number = re.search(r"#(\d+)$", label)
        if number:
            form = rf"https://github\.com/[\w-]+/[\w.-]+/(issues|pull)/{number[1]}"
            assert re.fullmatch(form, target), f"{page.name}: [{label}]({target})"


def test_the_memory_table() -> None:
    """docs/which-method.md: each computed figure is that of its formula, written out again here."""
    page = prose(ROOT / "docs" / "which-method.md")
    shapes = ((1536, 3840, 52, 24, 8, 73440), (2304, 5760, 40, 36, 36, 122753), (576, 1536, 30, 9, 3, 49152))
    names = ("MiniCPM-1B", "MiniCPM-2B", "smollm2")
    assert f"| | {' | '.join(names)} |" in page
    table = [[cell.strip() for cell in cells(row)] for row in re.findall(r"^\|.*\|$", page, re.M)]
    rows = {row[0]: row[1:] for row in table}
    for i, (hidden, ffn, layers, heads, kv, vocabulary) in enumerate(shapes):
        query, key = heads * 64, kv * 64
        layer = 2 * hidden * query + 2 * hidden * key + 3 * hidden * ffn + 2 * hidden
        parameters = layers * layer + vocabulary * hidden + hidden
        lora = 8 * layers * (2 * (hidden + query) + 2 * (hidden + key))
        every = lora + 8 * layers * 3 * (hidden + ffn)
        token = layers * (10 * hidden + 4 * ffn) * 2
        kept = layers * hidden * 2 + (10 * hidden + 4 * ffn) * 2
        wanted = {
            "parameters (tied)": f"{parameters:,}",
            "weights, bfloat16": f"{2 * parameters / 2**30:.2f} GiB",
            "LoRA on q, k, v, o, rank 8": f"{16 * lora / 2**20:.0f} MiB",
            "LoRA on all linears, rank 8": f"{16 * every / 2**20:.0f} MiB",
            "every parameter, bfloat16": f"{20 * parameters / 2**30:.1f} GiB",
            "every parameter, float32": f"{16 * parameters / 2**30:.1f} GiB",
            "activations of 1,100 tokens": f"{1100 * token / 2**30:.2f} GiB",
            "activations of 8,192 tokens": f"{8192 * token / 2**30:.2f} GiB",
        }
        for what, figure in wanted.items():
            assert rows[what][i] == figure, f"{names[i]}: {what}"
        for tokens in (1100, 8192):
            assert f"{tokens * kept / 2**30:.2f} GiB" in page


def test_every_bench_has_its_results() -> None:
    """A script that measures stands in a heading of the results; the two that only help others don't."""
    headings_ = "".join(re.findall(r"^## .+$", prose(ROOT / "bench" / "RESULTS.md"), re.M))
    scripts = {p.name for p in (ROOT / "bench").glob("*.py")} - {"sides.py", "tune_kernels.py"}
    assert {name for name in scripts if f"bench/{name}" not in headings_} == set()


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
