"""A GGUF file as a hub folder: all but the weights written out, the weights read in place."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from minitune.checkpoint import gguf_tokenizer
from minitune.checkpoint.embedded import cache_root
from minitune.checkpoint.gguf import RUN, GgufFile, value
from minitune.checkpoint.shards import GGUF
from minitune.config import UserError


def describe(path: str | Path, folder: Path) -> GgufFile:
    """Writes all but the weights of the GGUF file `path` into `folder`, in the hub's layout."""
    file = GgufFile(path)
    reader = file.reader
    gguf_tokenizer.tokenizer(reader, path).save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", gguf_tokenizer.settings(reader))
    template = value(reader, "tokenizer.chat_template")
    if template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    if run := value(reader, RUN):
        (folder / "run.yaml").write_text(run, encoding="utf-8")
    _write_json(folder / "config.json", file.config)
    ids = {key: file.config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", ids)
    return file


def folder_of(path: Path) -> Path:
    """A hub folder that reads its weights from the GGUF file `path` in place: made once, in the cache.

    The file is known by its place, size and time of change; folders of files that are gone are taken away.
    Raises UserError where it or the cache is no good.
    """
    path, stat = path.resolve(), path.stat()
    known = hashlib.sha256(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = cache_root() / f"gguf-{path.stem}-{known}"
    if (folder / "config.json").is_file():
        return folder
    try:
        cache_root().mkdir(parents=True, exist_ok=True)
        for old in cache_root().glob("gguf-*"):
            if (old / GGUF).is_symlink() and not (old / GGUF).exists():
                shutil.rmtree(old, ignore_errors=True)
        temp = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            describe(path, temp)
            (temp / GGUF).symlink_to(path)
            temp.chmod(0o755)
            os.replace(temp, folder)
        finally:
            shutil.rmtree(temp, ignore_errors=True)
    except OSError as error:
        if not (folder / "config.json").is_file():  # else another process was faster
            raise UserError(f"{folder}: can't be written ({error.strerror or error}); set MINITUNE_CACHE") from None
    return folder


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
