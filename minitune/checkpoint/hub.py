"""A model's name or folder -> a local folder in the hub's layout, checked as far as that costs nothing.

Nothing that runs is ever downloaded: no `.py`, no custom code; see `sources.wanted`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minitune.checkpoint import sources
from minitune.config import UserError

EMBEDDED = "smollm2"
HUB_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w][\w.-]*", re.ASCII)
RECEIPT = ".minitune.json"  # {file: bytes}, written into a snapshot once all that was asked for is there


def resolve(
    name: str | os.PathLike[str],
    *,
    source: str = "modelscope",
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    quiet: bool = False,
    weights: bool = True,
) -> Path:
    """The folder of a model: `name` itself where it is one, the embedded `smollm2`, or a hub's snapshot.

    A snapshot that is whole on disk needs no network. Otherwise `source` ("modelscope" or "huggingface") is
    asked first and the other hub where that one has it not, which a line on stderr says. `cache_dir` replaces
    the hubs' own caches; `quiet` drops the progress bars and nothing else; without `weights` config.json and the
    tokenizer are enough, and nothing else is downloaded. Raises UserError.
    """
    name = os.fspath(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        verify(folder, weights=weights)
        return folder
    if folder.is_file():
        if folder.suffix == ".gguf":
            from minitune.checkpoint.gguf_folder import folder_of

            return folder_of(folder)
        raise UserError(f"{name}: is a file; give the folder that holds config.json and the weights")
    if name == EMBEDDED:
        from minitune.checkpoint import gguf

        return gguf.embedded_default()
    if not HUB_NAME.fullmatch(name):
        raise UserError(
            f"{name}: no such folder, and not a hub name of the form owner/name; "
            f"give a folder, a name such as openbmb/MiniCPM-2B-sft-bf16, or {EMBEDDED}"
        )
    hubs: dict[str, sources.Source]
    hubs = {"modelscope": sources.ModelScope(), "huggingface": sources.HuggingFace()}
    if source not in hubs:
        raise UserError(f"source is {source!r}; it takes {', '.join(hubs)}")
    order = [hubs.pop(source), *hubs.values()]
    say = functools.partial(print, file=sys.stderr, flush=True)
    with contextlib.redirect_stderr(io.StringIO()) if quiet else contextlib.nullcontext():
        return _snapshot(name, order, revision, Path(cache_dir).expanduser() if cache_dir else None, say, weights)


def _snapshot(
    name: str,
    order: list[sources.Source],
    revision: str | None,
    cache_dir: Path | None,
    say: Callable[[str], None],
    weights: bool,
) -> Path:
    cached: list[Path | None] = []
    for hub in order:
        cached.append(hub.cached(name, revision, cache_dir))
        if (found := cached[-1]) and _whole(found, weights):
            verify(found, weights=weights)
            return found
    reasons: list[str] = []
    for hub in order:
        try:
            folder, files = hub.fetch(name, revision, cache_dir, weights)
        except sources.Unavailable as reason:
            if not reasons:
                say(f"minitune: {hub.title} {reason}; asking {order[-1].title}")
            reasons.append(f"{hub.title} {reason}")
            continue
        verify(folder, weights=weights)
        _sign(folder, files)
        return folder
    # Another program's download leaves no receipt: nothing proves it whole; without a hub it is what we have.
    for found in filter(None, cached):
        with contextlib.suppress(UserError):
            verify(found, tokenizer=True, weights=weights)
            say(f"minitune: {' and '.join(reasons)}; taking {found} as it is, not known to be whole")
            return found
    where = f" at revision {revision}" if revision else ""
    raise UserError(
        f"{name}{where}: {' and '.join(reasons)}; check the name and the network, or give a folder that holds the model"
    )


def _sign(folder: Path, files: list[str]) -> None:
    with contextlib.suppress(OSError):  # a cache that can only be read: then the hub is asked each time
        sizes = {file: (folder / file).stat().st_size for file in files}
        temp = folder / f"{RECEIPT}.{os.getpid()}"
        temp.write_text(json.dumps(sizes, ensure_ascii=False), encoding="utf-8")
        os.replace(temp, folder / RECEIPT)


def _whole(folder: Path, weights: bool) -> bool:
    """Whether all that was downloaded is there still, and weights among it where they are needed."""
    try:
        sizes = json.loads((folder / RECEIPT).read_text(encoding="utf-8"))
        there = all((folder / file).stat().st_size == size for file, size in sizes.items())
        return there and (not weights or any(file not in sources.SMALL_FILES for file in sizes))
    except (OSError, ValueError, AttributeError):
        return False


def download(
    name: str | os.PathLike[str],
    *,
    source: str = "modelscope",
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    quiet: bool = False,
) -> Path:
    """`minitune download`: resolves, verifies, and prints the size and the folder."""
    folder = resolve(name, source=source, revision=revision, cache_dir=cache_dir, quiet=quiet)
    sizes = [file.stat().st_size for file in folder.iterdir() if file.is_file() and file.name[0] != "."]
    total = sum(sizes)
    size = f"{total / 2**30:.2f} GiB" if total >= 2**30 else f"{total / 2**20:.1f} MiB"
    print(f"{os.fspath(name)}: {size} in {len(sizes)} files")
    print(folder)
    try:
        verify(folder, tokenizer=True)
    except UserError as error:
        print(f"minitune: note: {error}", file=sys.stderr)
    return folder


def verify(folder: str | os.PathLike[str], *, tokenizer: bool = False, weights: bool = True) -> None:
    """UserError where `folder` cannot be loaded: what is missing, empty or cut short. Reads no weights, and without
    `weights` does not look for them."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(f"{folder}: is an adapter; give its base as --model and this folder as --adapter")
        raise UserError(f"{folder}: has no config.json; give the folder of a model, as the hub lays it out")
    _json(folder / "config.json")
    for path in _weight_files(folder) if weights else ():
        if path.suffix == ".safetensors":
            _check_safetensors(path)
        else:
            _check_pickle(path)
    if tokenizer and not any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer.model")):
        raise UserError(f"{folder}: has no tokenizer.json and no tokenizer.model; copy the model's own there")


def _weight_files(folder: Path) -> list[Path]:
    """The files that a loader reads, in the order in which loaders look; each is there and not empty."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        single = folder / f"{stem}.{suffix}"
        index = folder / f"{stem}.{suffix}.index.json"
        if single.is_file():
            if not single.stat().st_size:
                raise UserError(f"{single}: is empty; download it again")
            return [single]
        if index.is_file():
            return _shards(folder, index)
    if (folder / "model.gguf").is_file():  # a folder of `gguf_folder`; the file itself was looked at there
        return []
    raise UserError(
        f"{folder}: has no weights (model.safetensors, pytorch_model.bin, or an index and its shards); "
        "download the model again"
    )


def _shards(folder: Path, index: Path) -> list[Path]:
    weight_map = _json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: names no shards (weight_map); download it again")
    names = sorted({str(shard) for shard in weight_map.values()})
    for shard in names:
        if Path(shard).name != shard or shard.startswith("."):
            raise UserError(f"{index}: the shard {shard!r} lies outside the folder; download the model again")
    lost = [s for s in names if not (folder / s).is_file() or not (folder / s).stat().st_size]
    if lost:
        state = "is empty" if (folder / lost[0]).is_file() else "is missing"
        raise UserError(
            f"{folder / lost[0]}: {state} ({len(lost)} of the {len(names)} shards of {index.name} "
            "are missing); download the model again, it fetches what is not there"
        )
    return [folder / shard for shard in names]


def _check_safetensors(path: Path) -> None:
    """The header's own account of the file's length against its size on disk."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        _no_pointer(path, head)
        if size < 8 or length > size - 8:
            raise UserError(f"{path}: is cut short within its header ({size} bytes); download it again")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            ends = [tensor["data_offsets"][1] for key, tensor in header.items() if key != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise UserError(f"{path}: is not a safetensors file; download it again") from None
    if size != expected:
        state = "is cut short" if size < expected else "is too long"
        raise UserError(f"{path}: {state}, {size} of {expected} bytes; download it again")


def _check_pickle(path: Path) -> None:
    """A torch file is a zip archive, whose directory stands at its end: a cut file has none."""
    with open(path, "rb") as file:
        head = file.read(8)
    _no_pointer(path, head)
    if head.startswith(b"PK") and not zipfile.is_zipfile(path):
        raise UserError(f"{path}: is cut short ({path.stat().st_size} bytes); download it again")


def _no_pointer(path: Path, head: bytes) -> None:
    if head == b"version ":
        raise UserError(f"{path}: is a git-lfs pointer, not the weights; run `git lfs pull` in its folder")


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; download it again") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: line {error.lineno}, column {error.colno}: not JSON ({error.msg}); download it again"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object; download it again")
    return content
