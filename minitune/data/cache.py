"""Encoded rows on disk, by content: a second run on the same file and tokenizer reads arrays instead of text.

An entry is a folder with an array a file and a digest of each. It is written beside its place and moved there, compared
with its digests when it is read, and made again where anything differs. Nothing here stops a run: what can't be kept
costs a note.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from minitune.data.store import EncodedFile, EncodedRows
from minitune.data.template import Template

FORMAT = 1  # raise it when what write() writes changes
LIMIT, ENTRIES = 4 << 30, 200  # bytes and number of all entries; the oldest make room
SPARE = 1 << 30  # bytes that stay free on the disk: checkpoints need them more
DAY = 86400
META = "meta.json"
ARRAYS = {"ids": np.int32, "learned": np.bool_, "lengths": np.int64, "supervised": np.int64, "numbers": np.int64}
# What decides a row's ids: the code that makes rows, and the libraries under it.
CODE = ("bulk", "cache", "forms", "json_rows", "records", "rows", "source", "store", "template")
LIBRARIES = ("tokenizers", "transformers", "jinja2", "sentencepiece")


def remembered(root: Path, path: Path, template: Template, make: Callable[[], EncodedFile]) -> EncodedFile:
    """The rows of `path`: from `root` where they were made before, else what `make` gives, kept there.

    Safe with several processes: one makes an entry, the others wait and read it.
    """
    try:
        before = path.stat()
        entry = root / key(path, template)
        root.mkdir(parents=True, exist_ok=True)
        held = lock(root, entry)
    except OSError as error:
        file = make()  # says what is wrong with the file itself
        file.notes.append(f"{path}: rows are not cached in {root}: {reason(error)}")
        return file
    with held:
        found, damaged = read(entry, path)
        if found:
            return found
        file = make()
        if damaged:
            file.notes.append(f"{path}: its cached rows were damaged and were made again")
        try:
            after = path.stat()
            if (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, after.st_size):
                write(entry, file, path.name)
                with suppress(OSError):  # another process makes room too
                    make_room(root, entry)
        except OSError as error:
            file.notes.append(f"{path}: rows are not cached in {root}: {reason(error)}")
        return file


def reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def lock(root: Path, entry: Path) -> ExitStack:
    """Held while an entry is looked for and made; 16 files serve all entries. OSError where `root` can't be written."""
    from filelock import FileLock

    held = ExitStack()
    with suppress(NotImplementedError):  # a file system without locks
        held.enter_context(FileLock(root / f"lock-{entry.name[0]}"))
    return held


def key(path: Path, template: Template) -> str:
    """Names the rows by everything that decides them: the file's bytes, tokenizer, template, code. OSError as open."""
    tokenizer, config = template.tokenizer, template.config
    if tokenizer.is_fast:
        model = tokenizer.backend_tokenizer.to_str().encode("utf-8")
    else:
        model = tokenizer.sp_model.serialized_model_proto()
    chat = tokenizer.chat_template if config.name == "model" else ""
    facts = {
        "format": FORMAT,
        "suffix": path.suffix.lower(),
        "template": asdict(config),
        "chat": chat,
        "today": time.strftime("%Y-%m-%d") if "strftime_now" in str(chat) else "",
        "tokenizer": hashlib.sha256(model).hexdigest(),
        "added": {i: repr(token) for i, token in tokenizer.added_tokens_decoder.items()},
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "eos": template.eos_id,
        "code": [hashlib.sha256(Path(__file__).with_name(f"{name}.py").read_bytes()).hexdigest() for name in CODE],
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "python": [sys.version_info[:2], sys.byteorder, unicodedata.unidata_version],
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    with path.open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def read(entry: Path, path: Path) -> tuple[EncodedFile | None, bool]:
    """(the entry's rows or None, whether there was one that can't be used)."""
    if not entry.is_dir():
        return None, False
    try:
        meta = json.loads((entry / META).read_text(encoding="utf-8"))
        arrays: dict[str, Any] = {name: np.fromfile(entry / name, kind) for name, kind in ARRAYS.items()}
        if any(digest_of(array) != meta["digests"][name] for name, array in arrays.items()):
            return None, True
        starts = np.cumsum(arrays["lengths"]) - arrays["lengths"]
        notes = [note.replace(f"{meta['name']} is named", f"{path.name} is named") for note in meta["notes"]]
        os.utime(entry / META)  # the newest stay longest
    except (OSError, ValueError, KeyError, TypeError, MemoryError):
        return None, True
    notes.append(f"{path}: rows taken from the cache, where an earlier run put them ({entry})")
    return EncodedFile(EncodedRows(starts=starts, **arrays), meta["form"], notes), False


def write(entry: Path, file: EncodedFile, name: str) -> None:
    """Puts an entry in its place, whole. OSError where it can't."""
    rows = file.rows
    arrays: dict[str, Any] = {each: np.ascontiguousarray(getattr(rows, each), kind) for each, kind in ARRAYS.items()}
    size = sum(array.nbytes for array in arrays.values())
    free = shutil.disk_usage(entry.parent).free
    if size > LIMIT or free < size + SPARE:
        raise OSError(0, f"they need {size >> 20:,} MiB, and {free >> 20:,} MiB of the disk are free")
    part = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", dir=entry.parent))
    try:
        for each, array in arrays.items():
            (part / each).write_bytes(memoryview(array).cast("B") if array.size else b"")
        digests = {each: digest_of(array) for each, array in arrays.items()}
        meta = {"name": name, "rows": len(rows), "form": file.form, "notes": file.notes, "digests": digests}
        (part / META).write_text(json.dumps(meta, ensure_ascii=False, indent=1), encoding="utf-8")
        shutil.rmtree(entry, ignore_errors=True)
        os.replace(part, entry)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def digest_of(array: Any) -> str:
    return hashlib.blake2b(memoryview(array).cast("B") if array.size else b"", digest_size=16).hexdigest()


def make_room(root: Path, kept: Path) -> None:
    """Removes what was not used for longest, until the entries are few and small enough, and what a kill left."""
    now = time.time()
    for part in root.glob(".*"):
        if now - part.stat().st_mtime > DAY:
            shutil.rmtree(part, ignore_errors=True)
    found = [(meta.stat().st_mtime, meta.parent) for meta in root.glob(f"*/{META}") if meta.parent != kept]
    total = sum(file.stat().st_size for file in kept.iterdir())
    for place, (_, entry) in enumerate(sorted(found, reverse=True), 2):
        total += sum(file.stat().st_size for file in entry.iterdir())
        if total > LIMIT or place > ENTRIES:
            shutil.rmtree(entry, ignore_errors=True)
