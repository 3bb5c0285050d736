"""Hub layout <-> our parameters, both ways, strict. Memory-mapped, one tensor at a time; no checkpoint code is run.

Two other forms are read through the same names: 4-bit weights of compressed-tensors (`model.quantized`), and a GGUF
file in a folder that `gguf_folder` made.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minitune.config import UserError
from minitune.model import kernels
from minitune.model.decoder import Decoder, DecoderConfig, Layer
from minitune.model.quantized import Int4Linear, group_of, quantize_linears

if TYPE_CHECKING:
    from minitune.checkpoint.gguf import GgufFile

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
GGUF = "model.gguf"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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


def read_config(folder: str | Path) -> DecoderConfig:
    """The decoder's shape from `config.json`; UserError for an architecture that is not supported."""
    path = Path(folder) / "config.json"
    try:
        return DecoderConfig.from_hub(read_json(path))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def choose_device(device: str = "auto") -> torch.device:
    """`auto`: the card where there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"device {device!r}: give cuda, cuda:1 or cpu") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {device!r}: this machine has no usable card; give --device cpu")
    return chosen


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 on cards that multiply it (float16 on older ones), float32 on the CPU."""
    if dtype == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if kernels.ampere(device) else torch.float16
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}: give auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


class Shards:
    """The tensors of a hub folder by name, read lazily. A context manager: files stay mapped while it is open."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._bins: dict[Path, dict[str, Tensor]] = {}
        self._safe: dict[Path, Any] = {}
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
        if shape is not None and tensor.shape != shape:
            raise UserError(f"{path}: {name} is {list(tensor.shape)}, config.json says {list(shape)}")
        return tensor

    def names(self) -> list[str]:
        """Names file by file, so that each shard is opened once."""
        return sorted(self.where, key=lambda n: (self.where[n], n))


def hub_parameters(decoder: Decoder) -> dict[str, Tensor]:
    """{hub name: our tensor, or the rows of the fused one that hold it}: the one mapping, used both ways."""
    out = {EMBED: decoder.embed.weight, "model.norm.weight": decoder.norm.weight}
    if decoder.lm_head is not None:
        out[HEAD] = decoder.lm_head.weight
    for i, layer in enumerate(decoder.layers):
        assert isinstance(layer, Layer)
        out[f"model.layers.{i}.input_layernorm.weight"] = layer.attn_norm.weight
        out[f"model.layers.{i}.post_attention_layernorm.weight"] = layer.mlp_norm.weight
    for linear in decoder.linears():
        for name, start, end in linear.parts:
            hub = f"{linear.hub_name(name)}.weight"
            if isinstance(linear, Int4Linear):
                out[f"{hub}_packed"], out[f"{hub}_scale"] = (
                    t[start:end] for t in (linear.weight_packed, linear.weight_scale)
                )
            else:
                out[hub] = linear.weight[start:end]
    return out


def _resolve_tie(config: DecoderConfig, shards: Shards) -> DecoderConfig:
    """A head in the file that differs from the embedding wins over `tie_word_embeddings`, and is said."""
    if not config.tie_word_embeddings or HEAD not in shards.where or EMBED not in shards.where:
        return config
    head, embed = shards.get(HEAD), shards.get(EMBED)
    step = 8192
    if head.shape == embed.shape and all(
        torch.equal(head[i : i + step], embed[i : i + step]) for i in range(0, head.shape[0], step)
    ):
        return config
    print(f"{shards.folder}: lm_head.weight differs from the embedding: loaded untied", file=sys.stderr)
    return config.untied()


def _check_names(shards: Shards, wanted: dict[str, Tensor], tied: bool) -> None:
    have = {n for n in shards.where if not n.endswith(("rotary_emb.inv_freq", ".weight_shape"))}
    if tied:
        have.discard(HEAD)
    for kind, names in (
        ("is missing", wanted.keys() - have),
        ("is not part of this architecture", have - wanted.keys()),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(f"{shards.folder}: tensor {min(names)} {kind}{more}")


def _int4_group(folder: Path) -> int | None:
    path = folder / "config.json"
    try:
        return group_of(read_json(path))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def skeleton(shards: Shards) -> Decoder:
    """The decoder of the folder of `shards` on `meta`: its shapes and checked names, no memory, no values."""
    config = read_config(shards.folder)
    with torch.device("meta"):
        decoder = Decoder(_resolve_tie(config, shards))
    if group := _int4_group(shards.folder):
        quantize_linears(decoder, group)
    _check_names(shards, hub_parameters(decoder), decoder.config.tie_word_embeddings)
    return decoder


@torch.no_grad()
def load_decoder(
    folder: str | Path,
    dtype: str = "auto",
    device: str = "auto",
    strips: Callable[[Decoder], dict[str, int]] | None = None,
) -> Decoder:
    """The decoder of a hub folder, its parameters frozen. strips: what to widen (`Decoder.allocate`), told from the
    empty decoder.

    One tensor at a time is cast and copied from the mapped file into its fused place, so that neither a second
    copy of the model nor a float32 copy of a float32 checkpoint exists.
    """
    place = choose_device(device)
    kind = choose_dtype(dtype, place)
    with Shards(folder) as shards:
        decoder = skeleton(shards)
        decoder.allocate(place, kind, strips(decoder) if strips else None)
        wanted = hub_parameters(decoder)
        for name in shards.names():
            if name in wanted:
                wanted[name].copy_(shards.get(name, wanted[name].shape))
    return decoder.eval()


def load_model(
    folder: str | Path, adapter: str | Path | None = None, dtype: str = "auto", device: str = "auto"
) -> Decoder:
    """The decoder of `folder` (a folder, a hub name, or smollm2), with a PEFT adapter attached where one is given.

    dtype, device: `auto` takes the card and bfloat16 where there is one, else the CPU and float32.
    Raises UserError, one line, for anything that is missing, misshapen or not supported.
    """
    from minitune.checkpoint import adapter as adapters
    from minitune.checkpoint import hub

    decoder = load_decoder(hub.resolve(str(folder)), dtype, device)
    if adapter is not None:
        adapters.load_adapter(decoder, adapter)
    return decoder


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """One safetensors file, with its folder's permissions: the library makes it readable by its owner alone."""
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)


def write_safetensors(folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int = 1 << 30) -> None:
    """Writes a stream of (hub name, tensor) as one file, or as shards with an index; holds one shard at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    held: dict[str, Tensor] = {}
    parts: list[tuple[Path, list[str]]] = []
    size = total = 0

    def flush() -> None:
        nonlocal held, size
        part = folder / f"part-{len(parts)}.safetensors"
        save_tensors(held, part)
        parts.append((part, list(held)))
        held, size = {}, 0

    for name, tensor in tensors:
        plain = tensor.detach().to("cpu").contiguous()
        bytes_ = plain.numel() * plain.element_size()
        if held and size + bytes_ > max_shard_bytes:
            flush()
        held[name] = plain
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


def hub_tensors(decoder: Decoder, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """(hub name, tensor) of every parameter, in `dtype` where one is given; a tied head is left out."""
    for name, tensor in hub_parameters(decoder).items():
        yield name, tensor.detach().to(dtype or decoder.dtype)
