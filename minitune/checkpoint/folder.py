"""Folders written whole or not at all, and what stands beside the weights in one."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from minitune.checkpoint.weights import hub_tensors, read_json
from minitune.checkpoint.writing import write_safetensors
from minitune.config import UserError
from minitune.model.decoder import Decoder

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


@contextmanager
def whole(folder: Path, named: Path | None = None) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place at the end; on any failure nothing is left.

    A kill leaves at most the temporary folder, which the next write removes. A full disk is a UserError, which
    names `named` where a person knows the folder by another name.
    """
    with _part(folder.with_name(f".{folder.name}.part"), named or folder) as part:
        yield part
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.replace(folder, old)
        os.replace(part, folder)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def moved_into(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files move into an existing `folder` at the end, when all of them are written."""
    with _part(folder / ".part", folder) as part:
        yield part
        for file in sorted(part.iterdir()):
            os.replace(file, folder / file.name)
            file.unlink(missing_ok=True)  # two links to one file: POSIX leaves both where they are
        part.rmdir()


@contextmanager
def _part(part: Path, folder: Path) -> Iterator[Path]:
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if is_full_disk(error):
            raise UserError(f"{folder}: no space left on the disk; free some and start again") from None
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all. A full disk is a UserError."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if is_full_disk(error):
            raise UserError(f"{path}: no space left on the disk; free some and start again") from None
        raise


def is_full_disk(error: BaseException) -> bool:
    """Whether this is a full disk, also in the words of safetensors (no errno) and torch."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error).lower()
    return "no space left" in text or "os error 28" in text or "file write failed" in text


def copy_tokenizer(base: Path, folder: Path) -> None:
    """The tokenizer's files, as they are."""
    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)


def save_hub_folder(
    decoder: Decoder, base: Path, folder: Path, tensors: Iterable[tuple[str, Tensor]] | None = None
) -> None:
    """The weights in `base`'s own layout and architecture, with its config and tokenizer beside them. tensors: (hub
    name, tensor) of each, where the decoder does not hold them whole."""
    config = read_json(base / "config.json")
    config.pop("auto_map", None)  # names code that is not here
    config["tie_word_embeddings"] = decoder.config.tie_word_embeddings
    config.pop("dtype", None)
    config["torch_dtype"] = str(decoder.dtype).removeprefix("torch.")
    write_safetensors(folder, hub_tensors(decoder) if tensors is None else tensors)
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
    if (base / "generation_config.json").is_file():
        shutil.copyfile(base / "generation_config.json", folder / "generation_config.json")
    copy_tokenizer(base, folder)
