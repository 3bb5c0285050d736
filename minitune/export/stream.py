"""The decoder's own forward pass over tensors that are on disk, one layer in memory at a time.

Legend: T tokens of all documents, H hidden, V vocabulary, C rows of the head in a chunk, I a linear's inputs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from minitune.checkpoint.adapter import adapter_parameters
from minitune.checkpoint.shards import Shards
from minitune.checkpoint.weights import EMBED, HEAD, hub_parameters, skeleton
from minitune.model.attention import PackedLayout
from minitune.model.decoder import Decoder, DecoderConfig, Layer, Linear

CHUNK = 8192  # rows of the head at a time


class Stored(Protocol):
    """A model on disk: a decoder on `meta` that says its shapes, and its tensors by hub name."""

    decoder: Decoder

    def get(self, name: str) -> Tensor: ...

    def rows(self, name: str, start: int, end: int) -> Tensor: ...


class Folder:
    """A written hub folder, read anew. `unmap` as `Shards`."""

    def __init__(self, folder: Path):
        self.shards = Shards(folder)
        self.decoder = skeleton(self.shards)

    def get(self, name: str) -> Tensor:
        self.shards.unmap()
        return self.shards.get(name)

    def rows(self, name: str, start: int, end: int) -> Tensor:
        return self.get(name)[start:end]


class Gguf:
    """A written GGUF file, read anew."""

    def __init__(self, path: Path):
        from minitune.checkpoint.gguf import GgufFile

        self.file = GgufFile(path)
        with torch.device("meta"):
            self.decoder = Decoder(DecoderConfig.from_hub(self.file.config))

    def get(self, name: str) -> Tensor:
        return self.file.get(name)

    def rows(self, name: str, start: int, end: int) -> Tensor:
        return self.file.rows(name, start, end)


Watch = Callable[[str, Tensor], None]
See = Callable[[str, Tensor], None]


@torch.no_grad()
def hidden(
    model: Stored,
    documents: Sequence[Sequence[int]],
    adapter: dict[str, Tensor] | None = None,
    watch: Watch | None = None,
    see: See | None = None,
) -> Tensor:
    """The final hidden states [T, H] in float32 of documents, each by itself, as the decoder computes them.

    adapter: the tensors of the adapter that is attached to `model.decoder`, added in use, not merged.
    watch(name, x_TI): is shown what goes into each linear, under the hub name of each of its parts' weights.
    see(name, weight): is shown each weight of the layers and the last norm as it is computed with, in float32.
    """
    decoder = model.decoder.eval()
    lengths = [len(d) for d in documents]
    layout = PackedLayout.of(lengths, torch.device("cpu"), torch.float32)
    ids = [i for d in documents for i in d]
    positions_T = torch.tensor([p for n in lengths for p in range(n)])
    length_T = layout.length_T(len(ids)) if decoder.rope.needs_length else None
    cos, sin = decoder.rope(positions_T, length_T)
    rows = {i: model.rows(EMBED, i, i + 1)[0].float() for i in sorted(set(ids))}
    x_TH = torch.stack([rows[i] for i in ids]) * decoder.config.embedding_multiplier
    for index, layer in enumerate(decoder.layers):
        assert isinstance(layer, Layer)
        _fill(model, index, layer, adapter or {})
        if see is not None:
            for name, weight in _weights(layer, index):
                see(name, weight)
        hooks = _watched(layer, watch) if watch is not None else []
        x_TH = layer(x_TH, cos, sin, layout.for_layer(index), None)
        for hook in hooks:
            hook.remove()
        layer.to("meta")
        give_back()
    decoder.norm.to_empty(device="cpu")
    decoder.norm.weight.copy_(model.get("model.norm.weight"))
    if see is not None:
        see("model.norm.weight", decoder.norm.weight)
    h_TH = decoder.norm(x_TH) / decoder.config.logits_scaling
    decoder.norm.to("meta")
    return h_TH


def give_back() -> None:
    """Asks the allocator for what was freed: glibc keeps some 20 MB a layer of a 2.7B model."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _fill(model: Stored, index: int, layer: Layer, adapter: dict[str, Tensor]) -> None:
    """The layer's tensors, in float32 on the CPU."""
    layer.to_empty(device="cpu").float()
    prefix = f"model.layers.{index}."
    for name, target in hub_parameters(model.decoder).items():
        if name.startswith(prefix):
            target.copy_(model.get(name))
    for name, target in adapter_parameters(model.decoder).items():
        if f".{prefix}" in name:
            target.copy_(adapter[name])


def _weights(layer: Layer, index: int) -> Iterator[tuple[str, Tensor]]:
    """(hub name, float32 weight) of a filled layer, a packed one unpacked."""
    yield f"model.layers.{index}.input_layernorm.weight", layer.attn_norm.weight
    yield f"model.layers.{index}.post_attention_layernorm.weight", layer.mlp_norm.weight
    for linear in (m for m in layer.modules() if isinstance(m, Linear)):
        weight = linear.weight  # of a packed linear, formed anew at each look
        for part, start, end in linear.parts:
            yield f"{linear.hub_name(part)}.weight", weight[start:end]


def _watched(layer: Layer, watch: Watch) -> list[torch.utils.hooks.RemovableHandle]:
    def show(linear: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(linear, Linear)
        for part, _, _ in linear.parts:
            watch(f"{linear.hub_name(part)}.weight", inputs[0])

    return [m.register_forward_pre_hook(show) for m in layer.modules() if isinstance(m, Linear)]


def logits(model: Stored, h_TH: Tensor) -> Tensor:
    """Logits [T, V] of hidden states, the head read in chunks."""
    out = h_TH.new_empty(h_TH.shape[0], model.decoder.config.vocab_size)
    head = EMBED if model.decoder.config.tie_word_embeddings else HEAD
    for start, weight_CH in chunks(model, head):
        out[:, start : start + weight_CH.shape[0]] = F.linear(h_TH, weight_CH)
    return out


def chunks(model: Stored, name: str) -> Iterator[tuple[int, Tensor]]:
    """(first row, float32 rows) of the embedding or the head."""
    for start in range(0, model.decoder.config.vocab_size, CHUNK):
        yield start, model.rows(name, start, start + CHUNK).float()
