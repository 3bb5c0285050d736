"""What `data preview` shows is what is trained on: every token once, learned where the labels say, packs as computed."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import unicodedata
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from talker import write_talker

from minitune.checkpoint.tokenizer import load_tokenizer
from minitune.cli import main
from minitune.config import UserError
from minitune.data.dataset import Dataset
from minitune.data.loader import Loader, Pack
from minitune.data.preview import Unit, choose, units
from minitune.data.preview_packs import _pack, view
from minitune.data.preview_text import Sheet
from minitune.data.template import Encoded, cut

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [
    "你好 world\n\n龘𠮷好\ttab",
    "a real \ufffd stays, 👨‍👩‍👧 too",
    "</s> spelled, <用户> also",
    "  two spaces  ",
    "é ü 한국어 العربية",
]


@pytest.fixture(scope="module", params=["minicpm", "smollm2", "tiny"])
def tokenizer(request: pytest.FixtureRequest, golden: Callable[[str], Path], tmp_path_factory: Any) -> Any:
    """Byte fallback of sentencepiece's kind, byte-level BPE, and one that spells all but 512 tokens in bytes."""
    if request.param == "minicpm":
        return load_tokenizer(golden("tokenizer-minicpm"))
    if request.param == "tiny":
        return load_tokenizer(write_talker(golden, tmp_path_factory.mktemp("tiny")))
    pytest.importorskip("gguf", reason="smollm2 needs gguf")
    from minitune.checkpoint.gguf import embedded_default

    return load_tokenizer(embedded_default())


def encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def row_of(tokenizer: Any, question: str, answer: str) -> Encoded:
    asked, said = encode(tokenizer, question), [*encode(tokenizer, answer), tokenizer.eos_token_id]
    return Encoded(asked + said, [-100] * len(asked) + said)


def unsigned(text: str) -> str:
    """Signs back to the characters that they stand for."""
    text = text.replace("·", " ").replace("↵", "\n").replace("→", "\t")
    return re.sub(r"⟨U\+([0-9A-F]+)⟩", lambda found: chr(int(found[1], 16)), text)


@pytest.mark.parametrize("text", TEXTS)
def test_units_are_the_row(tokenizer: Any, text: str) -> None:
    """Every id once and in order, the text that decode gives, no unit that ends inside a character or is not seen."""
    row = row_of(tokenizer, "问 q", text)
    shown = units(row, tokenizer)
    assert [i for unit in shown for i in unit.ids] == row.input_ids
    assert [unit.at for unit in shown] == [sum(len(u.ids) for u in shown[:n]) for n in range(len(shown))]
    assert shown[-1].special and shown[-1].text == tokenizer.eos_token and sum(u.special for u in shown) == 1
    spoken = unsigned("".join(u.text for u in shown[:-1] if u.learned))
    assert spoken == text or spoken == f" {text}"  # the leading piece's own space
    for unit in shown:
        assert unit.learned == (row.labels[unit.at] != -100)
        assert wide(unit.text) > 0  # a joiner by itself too


def test_bytes_of_a_character_are_counted(tokenizer: Any) -> None:
    """龘 after text is one unit, of as many tokens as the tokenizer needs for it there."""
    row = Encoded(encode(tokenizer, "a龘b"), [-100] * len(encode(tokenizer, "a龘b")))
    wanted = len(row.input_ids) - len(encode(tokenizer, "ab")) if len(encode(tokenizer, "ab")) > 1 else None
    found = [unit for unit in units(row, tokenizer) if "龘" in unit.text]
    assert len(found) == 1 and (wanted is None or len(found[0].ids) == wanted)


def test_a_character_that_was_cut(golden: Callable[[str], Path]) -> None:
    """A row that ends inside a character shows the bytes that are left of it."""
    tokenizer = load_tokenizer(golden("tokenizer-minicpm"))
    row = row_of(tokenizer, "q", "a𠮷b")
    at = row.input_ids.index(tokenizer.convert_tokens_to_ids("<0xF0>"))
    shown = units(cut(row, at + 2), tokenizer)
    assert shown[-1].text == "⟨F0 A0⟩" and len(shown[-1].ids) == 2 and shown[-1].learned


def test_the_first_token_is_never_learned(golden: Callable[[str], Path]) -> None:
    """Nothing stands before it, whatever its label says."""
    tokenizer = load_tokenizer(golden("tokenizer-minicpm"))
    ids = encode(tokenizer, "你好 world")
    assert [unit.learned for unit in units(Encoded(ids, ids), tokenizer)] == [False] + [True] * (len(ids) - 1)


@pytest.mark.parametrize("width", [24, 25, 80])
def test_a_token_longer_than_a_line(width: int) -> None:
    """It is broken, with its count and its brackets inside the line."""
    long = [
        Unit(0, (1,), "-" * 79, False, False),
        Unit(1, (2, 3), "好" * 60, True, False),
        Unit(3, (4,), "x", True, False),
    ]
    lines = printed(long, width)
    assert max(map(wide, lines)) <= width
    assert "".join(lines) == "-" * 79 + "│⟦" + "好" * 60 + "×2│x⟧"


def wide(text: str) -> int:
    """Terminal columns, by Unicode's own tables."""
    return sum(
        0 if unicodedata.combining(c) or c == "\u200d" else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def printed(shown: list[Unit], width: int, **settings: Any) -> list[str]:
    sheet = Sheet(Console(file=io.StringIO(), width=width, **settings))
    return [text.plain for _, text in sheet.layout(shown, width)]


@pytest.mark.parametrize("width", [24, 41, 80])
def test_lines_fit_and_learned_text_is_bracketed(tokenizer: Any, width: int) -> None:
    """No line is wider than the terminal, and without colours the learned text is what stands in brackets."""
    row = row_of(tokenizer, "小姐，别的秀女都在求中选" * 3, "嘘——都说许愿说破是不灵的。" * 5 + "w" * 50)
    shown = units(row, tokenizer)
    lines = printed(shown, width)
    assert max(map(wide, lines)) <= width
    joined = "".join(lines)
    learned = re.findall(r"⟦(.*?)⟧", joined)
    assert len(learned) == 1
    plain = re.sub(r"×\d+", "", learned[0]).replace("│", "")
    assert plain == "".join(unit.text for unit in shown if unit.learned)
    coloured = Console(file=io.StringIO(), width=width, force_terminal=True, color_system="standard", no_color=False)
    assert "⟦" not in "".join(text.plain for _, text in Sheet(coloured).layout(shown, width))


def test_packs_are_those_that_are_computed(tokenizer: Any) -> None:
    """A step's rows, bounds, positions and learned tokens, against the rows laid end to end by hand."""
    rows = [row_of(tokenizer, "问" * (1 + i % 7), "a b " * (1 + i % 5)) for i in range(23)]
    numbers = [100 + i for i in range(23)]
    loader = Loader(rows, rows_per_step=10, tokens_per_pack=60, seed=3)
    seen = []
    for number in (1, 2, 3):
        step = view(loader, number, numbers, tokenizer)
        assert (step.number, step.steps, step.epoch, step.capacity) == (number, 3, 1, 60)
        for pack in step.packs:
            at = 0
            for document in pack.documents:
                row = rows[document.row - 100]
                assert (document.start, document.end) == (at, at + len(row.input_ids))
                assert (document.first, document.last) == (0, len(row.input_ids) - 1)
                assert list(document.learned) == [label != -100 for label in row.labels]
                assert document.head == units(row, tokenizer)[:2] and document.tail[-1] == units(row, tokenizer)[-1]
                at = document.end
            assert pack.tokens == at <= 60 and pack.cu_seqlens == [0, *(d.end for d in pack.documents)]
            longest = max(d.tokens for d in pack.documents)
            assert pack.padding == 0 and pack.padded == pytest.approx(1 - at / longest / len(pack.documents))
        seen += [d.row for pack in step.packs for d in pack.documents]
    assert sorted(seen) == numbers
    assert view(loader, 4, numbers, tokenizer).epoch == 2
    with pytest.raises(UserError, match="counted from 1"):
        view(loader, 0, numbers, tokenizer)


def test_padding_of_a_fixed_shape(tokenizer: Any) -> None:
    """A pack of fixed shape repeats the last bound and fills the rest: its padding is said, no document is invented."""
    row = row_of(tokenizer, "问", "b")
    n = len(row.input_ids)
    zero = torch.zeros(n, dtype=torch.int64)
    whole = Pack(
        torch.tensor([*row.input_ids, *[0] * n]), torch.cat([torch.arange(n), zero]), torch.cat([torch.arange(n), zero]),
        torch.tensor([0, n, n, n], dtype=torch.int32), torch.tensor([n - 3, n - 2, 0]), torch.tensor([1, 1, -100]), (n,), 2, n,
    )  # fmt: skip
    shown = _pack(whole, [row], [7], tokenizer, 2)
    assert [d.row for d in shown.documents] == [7] and shown.cu_seqlens == [0, n] and shown.padding == 0.5


def test_choosing_rows() -> None:
    """By number, with the reason where one is not there."""
    rows = [Encoded([1, 2], [-100, 2])] * 2
    data = Dataset("f.json", "alpaca", rows, [1, 4], cut=[4], dropped=[2], unlearnable=[3])
    assert [(r.number, r.cut) for r in choose(data, [4], 3, 9)] == [(4, True)]
    assert [r.number for r in choose(data, [], 1, 9)] == [1]
    for number, said in ((2, "is dropped"), (3, "is dropped"), (9, "numbered 1 to 4")):
        with pytest.raises(UserError, match=rf"f.json: row {number} .*{said}"):
            choose(data, [number], 3, 9)


# The command


def rows_file(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    rows = [
        {"instruction": "小姐，别的秀女都在求中选<script>alert(1)</script>", "output": "嘘——𠮷。\x1b[31m red"},
        {"instruction": "第二行", "output": "是。"},
    ]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


def preview(folder: Path, file: Path, *flags: str) -> int:
    return main(["data", "preview", str(file), "--model", str(folder), *flags])


def test_a_pipe_is_readable(
    golden: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No escape sequence, whatever the data holds; the packed step is there; a missing row is one line."""
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    folder, file = write_talker(golden, tmp_path / "model"), rows_file(tmp_path)
    assert preview(folder, file, "--packed", "--row", "1", "--row", "2") == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and "⟨U+001B⟩" in said
    assert "row 1:" in said and "row 2:" in said and "⟦" in said
    assert "step 1 of 1 in epoch 1: 2 rows" in said and "cu_seqlens: 0 " in said
    for flags, reason in (
        (("--row", "3"), "row 3 is not there; rows are numbered 1 to 2"),
        (("--packed", "--step", "0"), "--step is 0"),
        (("--packed", "--tokens_per_pack", "0"), "tokens_per_pack is 0"),
        (("--rows", "0"), "--rows is 0"),
        (("--html", str(tmp_path / "no" / "x.html")), "there is no folder"),
    ):
        assert preview(folder, file, *flags) == 2
        fault = capsys.readouterr().err
        assert fault.count("\n") == 1 and reason in fault


def test_a_terminal_has_colours(golden: Callable[[str], Path], tmp_path: Path) -> None:
    """In a terminal of 80 columns: green where it learns, nothing wider than the screen; NO_COLOR brings brackets."""
    pexpect = pytest.importorskip("pexpect")
    folder, file = write_talker(golden, tmp_path / "model"), rows_file(tmp_path)
    said = {}
    for colours in (True, False):
        environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
        environment |= {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1"} | ({} if colours else {"NO_COLOR": "1"})
        command = ["-m", "minitune", "data", "preview", str(file), "--model", str(folder), "--packed"]
        child = pexpect.spawn(
            sys.executable, command, dimensions=(40, 80), encoding="utf-8", cwd=str(ROOT), env=environment, timeout=60
        )
        child.expect(pexpect.EOF)
        said[colours] = child.before
        stripped = re.sub(r"\x1b\[[0-9;]*m", "", child.before)
        assert "\x1b" not in stripped
        assert max(wide(line) for line in stripped.splitlines() if str(tmp_path) not in line) <= 80
    assert "\x1b[32m" in said[True] and "⟦" not in said[True]
    assert "\x1b[32m" not in said[False] and "⟦" in said[False]


class Reader(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.learned: list[str] = []
        self.spans: list[bool] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "span":
            self.spans.append("l" in (dict(attrs).get("class") or "").split())

    def handle_endtag(self, tag: str) -> None:
        if tag == "span":
            self.spans.pop()

    def handle_data(self, data: str) -> None:
        if self.spans and self.spans[-1]:
            self.learned.append(data)


def test_the_page(golden: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One file, no script, nothing fetched, every token of the row with its id; content can't become markup."""
    folder, file, page = write_talker(golden, tmp_path / "model"), rows_file(tmp_path), tmp_path / "out.html"
    assert preview(folder, file, "--packed", "--html", str(page), "--row", "1") == 0
    read = Reader()
    read.feed(page.read_text(encoding="utf-8"))
    names = {name for name, _ in read.tags}
    assert not names & {"script", "link", "img", "iframe"}
    assert not [a for _, attributes in read.tags for a in attributes if a in ("src", "href") or a.startswith("on")]
    capsys.readouterr()
    assert preview(folder, file, "--json") == 0
    asked = json.loads(capsys.readouterr().out.splitlines()[0])
    titles = [a["title"] for name, a in read.tags if name == "span" and "title" in a]
    ids = [int(i) for title in titles for i in str(title).partition("id ")[2].split(", ")]
    assert ids[: len(asked["input_ids"])] == asked["input_ids"]
    assert "⟨U+001B⟩" in "".join(read.learned) and "alert" not in "".join(read.learned)
