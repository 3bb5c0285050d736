"""safetensors files. What lies on a card is written by several threads, each a file of its own, through one pinned
piece of memory: the card's copies, the files' pages and the disk are busy at once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from threading import Semaphore
from typing import BinaryIO

import torch
from torch import Tensor

from minitune.checkpoint.filling import DTYPES

PIECE = 32 << 20  # bytes between the card and a file
THREADS = 6
NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.bool: "BOOL"}


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """One safetensors file, of tensors on any device, with its folder's permissions. OSError where the disk is full."""
    # as the library orders them: each tensor is then aligned to its own size
    order = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in order:
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    device = next((t.device for t in tensors.values() if t.is_cuda), None)
    host = None if device is None else torch.empty(PIECE, dtype=torch.uint8, pin_memory=True)
    stream = nullcontext() if device is None else torch.cuda.stream(torch.cuda.Stream(device))
    with path.open("wb", buffering=0) as file, stream:
        _write(file, memoryview(len(text).to_bytes(8, "little") + text))
        for _, tensor in order:
            for piece in _pieces(tensor, host):
                _write(file, piece)
    path.chmod(path.parent.stat().st_mode & 0o666)


def _pieces(tensor: Tensor, host: Tensor | None) -> Iterator[memoryview]:
    """The tensor's bytes; what lies on a card comes through `host`, where each piece stands until the next."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if host is None or flat.device.type == "cpu":
        yield flat.numpy().data
        return
    for part in flat.split(PIECE):
        host[: part.numel()].copy_(part)
        yield host[: part.numel()].numpy().data


def _write(file: BinaryIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]


def write_safetensors(folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int = 1 << 30) -> None:
    """Writes a stream of (hub name, tensor) as one file, or as shards with an index. Holds one shard at a time, of
    tensors on a card several: they should be there anyway."""
    folder.mkdir(parents=True, exist_ok=True)
    held: dict[str, Tensor] = {}
    parts: list[tuple[Path, list[str]]] = []
    size = total = 0
    with _Writers() as writers:

        def flush() -> None:
            nonlocal held, size
            part = folder / f"part-{len(parts)}.safetensors"
            parts.append((part, list(held)))
            writers.write(held, part)
            held, size = {}, 0

        for name, tensor in tensors:
            bytes_ = tensor.numel() * tensor.element_size()
            if held and size + bytes_ > max_shard_bytes:
                flush()
            held[name] = tensor
            size, total = size + bytes_, total + bytes_
        if held:
            flush()
    # an older model's files would be read in place of these, by us or by others
    for old in (*folder.glob("model-*-of-*.safetensors"), *folder.glob("model.safetensors*")):
        old.unlink()
    if len(parts) == 1:
        parts[0][0].replace(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for i, (part, names) in enumerate(parts):
        file = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        part.replace(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


class _Writers:
    """Files written: of tensors on a card by threads, of others at once. Leaving it waits for all; the first fault is
    raised, at the latest then."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(THREADS, thread_name_prefix="files")
        self.free = Semaphore(THREADS)
        self.begun: list[Future[None]] = []

    def write(self, tensors: dict[str, Tensor], path: Path) -> None:
        if not any(t.is_cuda for t in tensors.values()):
            save_tensors(tensors, path)
            return
        device = next(t.device for t in tensors.values() if t.is_cuda)
        torch.cuda.current_stream(device).synchronize()  # the threads' copies are on other streams
        self.free.acquire()
        for future in self.begun:
            if future.done():
                future.result()  # a full disk ends this before all is gathered
        self.begun.append(self.pool.submit(self._save, tensors, path))

    def _save(self, tensors: dict[str, Tensor], path: Path) -> None:
        try:
            save_tensors(tensors, path)
        finally:
            self.free.release()

    def __enter__(self) -> _Writers:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self.pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            for future in self.begun:
                future.result()
