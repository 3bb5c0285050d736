"""Rows from the cache are the rows; what is damaged, full, in use or out of date costs time and a line, never a run."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from talker import write_rows, write_talker, write_tokenizer

from minitune import load_tokenizer
from minitune.checkpoint.embedded import rows_cache
from minitune.config import TemplateConfig, TrainConfig, UserError
from minitune.data import cache, dataset
from minitune.data.store import EncodedFile
from minitune.data.template import Template

TAKEN, DAMAGED, NOT = "taken from the cache", "were damaged", "are not cached"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Template:
    return Template(load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("model"))), TemplateConfig("minicpm"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.json", 30)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were really read and tokenised."""
    done: list[str] = []
    plain = dataset.encode

    def noted(path: str, *settings: Any) -> EncodedFile:
        done.append(Path(path).name)
        return plain(path, *settings)

    monkeypatch.setattr(dataset, "encode", noted)
    return done


def load(file: Path, template: Template, root: Path, most: int = 20) -> dataset.Dataset:
    """The rows, compared with those of a load without a cache."""
    data = dataset.load(str(file), template, most, kept=root)
    plain = dataset.load(str(file), template, most)
    assert list(data.rows) == list(plain.rows) and data.numbers == plain.numbers and data.cut == plain.cut
    assert data.rows.digest() == plain.rows.digest() and data.rows.supervised.tolist() == plain.rows.supervised.tolist()
    assert data.form == plain.form and [n for n in data.notes if "cache" not in n] == plain.notes
    return data


def says(data: dataset.Dataset, what: str) -> bool:
    return any(what in note for note in data.notes)


def entries(root: Path) -> list[Path]:
    return sorted(meta.parent for meta in root.glob("*/meta.json"))


def test_a_second_load_reads_arrays(file: Path, template: Template, tmp_path: Path, encoded: list[str]) -> None:
    """The same rows without tokenising, under another length, another name and another time; and it says so."""
    root = tmp_path / "cache"
    assert not says(load(file, template, root), "cache")
    encoded.clear()
    for most in (20, 18, 500):
        data = dataset.load(str(file), template, most, kept=root)
        assert says(data, TAKEN) and any(str(root) in note for note in data.notes)
    other = tmp_path / "sub" / "other.json"
    other.parent.mkdir()
    shutil.copyfile(file, other)
    os.utime(other, (1, 1))
    assert says(dataset.load(str(other), template, 20, kept=root), TAKEN)
    assert encoded == [] and len(entries(root)) == 1
    load(other, template, root)
    assert [p.name for p in root.glob(".*")] == []


def test_a_note_names_the_present_file(template: Template, tmp_path: Path) -> None:
    """What was said of a file's name is said of the name it has now."""
    root, line = tmp_path / "cache", json.dumps({"instruction": "q", "output": "a"})
    for name in ("one.json", "two.json"):
        (tmp_path / name).write_text(line + "\n" + line, encoding="utf-8")
        data = load(tmp_path / name, template, root)
        assert [n.split()[0] for n in data.notes if "is named" in n] == [name]
    assert says(data, TAKEN)


def test_everything_that_decides_the_ids_is_in_the_key(
    file: Path, template: Template, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another byte, ending, setting, tokenizer, chat template, day (where it is asked for) or line of code: another key."""
    seen = {cache.key(file, template)}

    def new(path: Path, changed: Template) -> None:
        found = cache.key(path, changed)
        assert found not in seen and cache.key(path, changed) == found
        seen.add(found)

    for settings in ({"bos": False}, {"strip": False}, {"join": " "}):
        new(file, Template(template.tokenizer, TemplateConfig("minicpm", **settings)))  # type: ignore[arg-type]
    changed = tmp_path / "changed.json"
    changed.write_bytes(file.read_bytes() + b"\n")
    new(changed, template)
    new(Path(shutil.copyfile(file, tmp_path / "rows.jsonl")), template)
    special = write_tokenizer(tmp_path / "special", ("<|x|>",))
    new(file, Template(load_tokenizer(special), TemplateConfig("minicpm")))
    eos = write_tokenizer(tmp_path / "eos", eos_token="<unk>")
    new(file, Template(load_tokenizer(eos), TemplateConfig("minicpm")))
    chats = [
        "{% for m in messages %}{{ m['content'] }}{% endfor %}",
        "{{ strftime_now('%d') }}{{ messages[0]['content'] }}",
    ]
    chat = [
        Template(load_tokenizer(write_tokenizer(tmp_path / f"chat{i}", chat_template=text)), TemplateConfig("model"))
        for i, text in enumerate(chats)
    ]
    new(file, chat[0])
    new(file, chat[1])
    monkeypatch.setattr(time, "strftime", lambda *_: "another day")
    new(file, chat[1])
    for same in (template, chat[0]):
        assert cache.key(file, same) in seen
    code = tmp_path / "code"
    code.mkdir()
    for name in cache.CODE:
        shutil.copyfile(Path(cache.__file__).with_name(f"{name}.py"), code / f"{name}.py")
    monkeypatch.setattr(cache, "__file__", str(code / "cache.py"))
    assert cache.key(file, template) in seen
    with (code / "forms.py").open("a") as source:
        source.write("# another line\n")
    new(file, template)


def test_the_code_in_the_key_is_all_that_makes_rows() -> None:
    """A module of ours that tokenising imports is in the key, or is one of those that are known to decide no id."""
    import ast

    folder = Path(cache.__file__).parent
    found, left = set(), ["dataset"]
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("minitune.data"):
                inner = node.module.removeprefix("minitune.data").removeprefix(".")
                left += [inner] if inner else [alias.name for alias in node.names]
    assert found - {"dataset"} == set(cache.CODE)


@pytest.mark.parametrize("name", [*cache.ARRAYS, cache.META])
@pytest.mark.parametrize("how", ["cut", "flipped", "longer", "gone", "emptied"])
def test_a_damaged_entry_is_made_again(
    file: Path, template: Template, tmp_path: Path, encoded: list[str], name: str, how: str
) -> None:
    """Any file of it, damaged in any way: the right rows, one line, and the next load finds a good entry."""
    root = tmp_path / "cache"
    load(file, template, root)
    victim = entries(root)[0] / name
    data = victim.read_bytes()
    if how == "gone":
        victim.unlink()
    elif name == cache.META and how == "longer":
        victim.write_bytes(data + b"}")
    else:
        flipped = data[:9] + bytes([data[9] ^ 1]) + data[10:]
        victim.write_bytes({"cut": data[:-3], "flipped": flipped, "longer": data + b"\0" * 8, "emptied": b""}[how])
    encoded.clear()
    again = dataset.load(str(file), template, 20, kept=root)
    if name == cache.META and how == "flipped" and encoded == []:
        pytest.skip("a letter of a name")  # nothing that the rows depend on
    assert says(again, DAMAGED) and encoded == [file.name]
    encoded.clear()
    last = load(file, template, root)
    assert says(last, TAKEN) and encoded == [file.name]  # the one of load's own comparison


def test_a_full_disk_costs_one_line(
    file: Path, template: Template, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is written, or in the midst of it: the rows, one note, nothing half-written."""
    root = tmp_path / "cache"
    usage = shutil.disk_usage(tmp_path)._replace(free=cache.SPARE)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        data = load(file, template, root)
    assert sum(NOT in note for note in data.notes) == 1 and says(data, "of the disk are free")
    plain = Path.write_bytes

    def full(self: Path, data: Any) -> int:
        if self.name == "supervised":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return plain(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        data = load(file, template, root)
    assert sum(NOT in note for note in data.notes) == 1 and says(data, "no space left on device")
    assert [p.name for p in root.iterdir() if not p.name.startswith("lock-")] == []
    assert not says(load(file, template, root), "cache") and says(load(file, template, root), TAKEN)


def test_a_cache_that_can_t_be_used_costs_one_line(file: Path, template: Template, tmp_path: Path) -> None:
    """A file where the folder should be: the rows and one note; and what is wrong with the data is still said."""
    (tmp_path / "cache").write_text("not a folder")
    data = load(file, template, tmp_path / "cache")
    assert sum(NOT in note for note in data.notes) == 1
    for root in (tmp_path / "cache", tmp_path / "new"):
        with pytest.raises(UserError, match="no such file"):
            dataset.load(str(tmp_path / "absent.json"), template, 20, kept=root)
    bad = tmp_path / "bad.json"
    bad.write_text('[{"instruction": "q", "output": ""}]', encoding="utf-8")
    for _ in range(2):
        with pytest.raises(UserError, match="row 1: `output` is empty"):
            dataset.load(str(bad), template, 20, kept=tmp_path / "new")
    assert entries(tmp_path / "new") == []


def test_a_file_that_changes_while_it_is_read_is_not_kept(
    file: Path, template: Template, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bytes would not be those of its name."""
    plain = dataset.encode

    def changing(path: str, *settings: Any) -> EncodedFile:
        found = plain(path, *settings)
        Path(path).write_bytes(Path(path).read_bytes() + b"\n")
        return found

    monkeypatch.setattr(dataset, "encode", changing)
    dataset.load(str(file), template, 20, kept=tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


def test_one_makes_the_entry_and_the_others_wait(
    file: Path, template: Template, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four at once: the file is tokenised once, and all have its rows."""
    plain, made, results, faults = dataset.encode, [], [], []
    start = threading.Barrier(4)

    def slow(path: str, *settings: Any) -> EncodedFile:
        made.append(path)
        time.sleep(0.3)
        return plain(path, *settings)

    monkeypatch.setattr(dataset, "encode", slow)

    def one() -> None:
        try:
            start.wait(10)
            results.append(dataset.load(str(file), template, 20, kept=tmp_path / "cache"))
        except Exception as error:  # noqa: BLE001
            faults.append(error)

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert faults == [] and len(made) == 1
    assert len({data.rows.digest() for data in results}) == 1 and sum(says(data, TAKEN) for data in results) == 3


def test_what_was_not_used_for_longest_makes_room(
    template: Template, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By bytes and by number; the newest stays whatever it needs; what a kill left goes after a day."""
    root = tmp_path / "cache"
    files = [write_rows(tmp_path / f"{i}.json", 20, start=100 * i) for i in range(4)]
    names = []
    for i, file in enumerate(files):
        dataset.load(str(file), template, 20, kept=root)
        names += [e.name for e in entries(root) if e.name not in names]
        os.utime(root / names[-1] / cache.META, (1000 + i, 1000 + i))
    assert says(dataset.load(str(files[0]), template, 20, kept=root), TAKEN)  # used: the youngest now
    for name, age in ((".killed.x", 2 * cache.DAY), (".at work.y", 60)):
        (root / name).mkdir()
        os.utime(root / name, (time.time() - age,) * 2)
    size = sum(f.stat().st_size for f in (root / names[0]).iterdir())
    monkeypatch.setattr(cache, "LIMIT", int(3.5 * size))
    more = write_rows(tmp_path / "more.json", 20, start=900)
    dataset.load(str(more), template, 20, kept=root)
    left = {e.name for e in entries(root)}
    assert len(left) == 3 and {names[0], names[3]} < left
    assert [p.name for p in root.glob(".*")] == [".at work.y"]
    monkeypatch.setattr(cache, "LIMIT", 4 << 30)
    monkeypatch.setattr(cache, "ENTRIES", 2)
    dataset.load(str(files[1]), template, 20, kept=root)
    assert len(entries(root)) == 2 and names[1] in {e.name for e in entries(root)}
    monkeypatch.setattr(cache, "LIMIT", 10)
    assert says(dataset.load(str(files[2]), template, 20, kept=root), "they need")


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder of its own, or beside the embedded model."""
    monkeypatch.setenv("MINITUNE_ROWS_CACHE", str(tmp_path / "r"))
    assert rows_cache() == tmp_path / "r"
    monkeypatch.delenv("MINITUNE_ROWS_CACHE")
    monkeypatch.setenv("MINITUNE_CACHE", str(tmp_path / "m"))
    assert rows_cache() == tmp_path / "m" / "rows"


def test_a_second_run_says_where_its_rows_came_from(
    golden: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two runs on one file: the same losses, and the second one's rows came from the cache."""
    from minitune.train.run import train

    monkeypatch.setenv("MINITUNE_ROWS_CACHE", str(tmp_path / "cache"))
    model, file = write_talker(golden, tmp_path / "model"), write_rows(tmp_path / "rows.json", 12)
    summaries = []
    for name in ("one", "two"):
        config = TrainConfig(
            str(model), str(file), str(tmp_path / name), max_steps=2, eval_fraction=0.2, dtype="float32"
        )
        summaries.append(train(config))
        assert (TAKEN in "".join(capsys.readouterr())) == (name == "two")
    assert summaries[0]["loss"] == summaries[1]["loss"] and summaries[0]["eval_loss"] == summaries[1]["eval_loss"]
