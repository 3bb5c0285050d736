"""The files of a hub folder and the tensors in them by name, read lazily: .safetensors, .bin (weights only), whole or
sharded, and a GGUF file in a folder that `gguf_folder` made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minitune.checkpoint import filling
from minitune.config import UserError

if TYPE_CHECKING:
    from minitune.checkpoint.gguf import GgufFile

GGUF = "model.gguf"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint; UserError names the file and the place."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; download the file again") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}, column {error.colno}: not JSON ({error.msg})") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: not a JSON object")
    return loaded


class Shards:
    """The tensors of a hub folder by name, read lazily. A context manager: files stay mapped while it is open."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._bins: dict[Path, dict[str, Tensor]] = {}
        self._safe: dict[Path, Any] = {}
        self._entries: dict[Path, dict[str, filling.Entry]] = {}
        self.where: dict[str, Path] = {}
        self._gguf: GgufFile | None = None
        for stem in ("model.safetensors", "pytorch_model.bin"):  # the order in which transformers looks
            path, index = self.folder / stem, self.folder / f"{stem}.index.json"
            if path.is_file():
                self.where = dict.fromkeys(self._names(path), path)
                return
            if index.is_file():
                self._read_index(index)
                return
        if (path := self.folder / GGUF).is_file():
            from minitune.checkpoint.gguf import GgufFile

            self._gguf = GgufFile(path)
            self.where = dict.fromkeys(self._gguf.names(), path)
            return
        raise UserError(f"{self.folder}: no weights (model.safetensors or pytorch_model.bin, whole or sharded)")

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *error: object) -> None:
        self.unmap()

    def unmap(self) -> None:
        """Lets go of the open file: what was read of it leaves this process's memory with the last tensor of it."""
        self._bins.clear()
        self._safe.clear()

    def _read_index(self, index: Path) -> None:
        weight_map = read_json(index).get("weight_map")
        entries = weight_map if isinstance(weight_map, dict) else {}
        if not entries or not all(isinstance(f, str) and Path(f).name == f for f in entries.values()):
            raise UserError(f"{index}: weight_map does not name files of this folder; download it again")
        self.where = {name: self.folder / file for name, file in entries.items()}
        files = sorted(set(self.where.values()))
        missing = [f.name for f in files if not f.is_file()]
        if missing:
            raise UserError(
                f"{self.folder}: shard {missing[0]} is missing ({len(missing)} of {len(files)}); download it again"
            )

    def _handle(self, path: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        if path not in self._safe:
            try:
                self._safe = {path: safe_open(path, framework="pt")}  # one at a time: the others are unmapped
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: damaged ({str(error).splitlines()[0]}); download it again") from None
        return self._safe[path]

    def _bin(self, path: Path) -> dict[str, Tensor]:
        if path not in self._bins:
            self._bins.clear()  # one pickle at a time
            try:
                held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except Exception as error:  # torch raises many kinds for a damaged or unsafe pickle
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise UserError(f"{path}: can't be read as plain weights ({reason[:120]})") from None
            if not isinstance(held, dict) or not all(isinstance(t, Tensor) for t in held.values()):
                raise UserError(f"{path}: holds something else than tensors by name")
            self._bins[path] = held
        return self._bins[path]

    def _names(self, path: Path) -> list[str]:
        return list(self._bin(path) if path.suffix == ".bin" else self._handle(path).keys())

    def get(self, name: str, shape: torch.Size | None = None) -> Tensor:
        """The tensor, on the CPU; memory-mapped where the format allows. `shape`: what config.json asks for."""
        path = self.where[name]
        try:
            if self._gguf is not None:
                tensor = self._gguf.get(name)
            else:
                tensor = self._bin(path)[name] if path.suffix == ".bin" else self._handle(path).get_tensor(name)
        except UserError:
            raise
        except Exception:
            raise UserError(f"{path}: tensor {name}, named by the index, is not in it") from None
        if shape is not None:
            self._same_shape(name, tensor.shape, shape)
        return tensor

    def entry(self, name: str, shape: torch.Size) -> filling.Entry | None:
        """Where the tensor lies in its file; None where that takes `get` (.bin, GGUF, a rare dtype)."""
        found = self._entry(name)
        if found is not None:
            self._same_shape(name, found.shape, shape)
        return found

    def _entry(self, name: str) -> filling.Entry | None:
        path = self.where[name]
        if path.suffix != ".safetensors":
            return None
        if path not in self._entries:
            self._handle(path)  # checks the header
            self._entries[path] = filling.entries(path)
        return self._entries[path].get(name)

    def entries(self) -> list[filling.Entry]:
        """Every tensor's place, of .safetensors files without scalars."""
        found = [self._entry(name) for name in self.where]
        return [entry for entry in found if entry is not None]

    def _same_shape(self, name: str, have: torch.Size, want: torch.Size) -> None:
        if have != want:
            raise UserError(f"{self.where[name]}: {name} is {list(have)}, config.json says {list(want)}")

    def names(self) -> list[str]:
        """Names file by file, so that each shard is opened once."""
        return sorted(self.where, key=lambda n: (self.where[n], n))
