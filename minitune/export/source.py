"""What is exported: the base's tensors with the adapter added, one at a time, the model never in memory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from minitune.checkpoint import adapter as adapters
from minitune.checkpoint.shards import Shards
from minitune.checkpoint.weights import DTYPES, EMBED, hub_parameters, skeleton
from minitune.config import UserError
from minitune.model.decoder import Decoder
from minitune.model.four_bits import nearest
from minitune.model.quantized import dequantize


class Source:
    """A base and its adapter. `decoder` has the shapes and names on `meta`, the adapter attached. Where the adapter
    learned over a base of 4 bits, that is the base: the weights `rounded` names are those numbers, `group` their group.

    A context manager: the base's files are mapped while it is open, and let go of after each tensor.
    Raises UserError for an adapter of another model, or a base whose weights are not plain floating point.
    """

    def __init__(self, base: Path, run: Path | None):
        self.shards = Shards(base)
        self.decoder: Decoder = skeleton(self.shards)
        self.adapter = adapters.attach_saved(self.decoder, run) if run is not None else {}
        self.group = adapters.base_group(run) if run is not None else 0
        parts = [linear.hub_name(n) for linear in self.decoder.linears() for n, _, _ in linear.parts]
        self.rounded = {f"{name}.weight" for name in parts} if self.group else set()
        self.shapes = {name: tensor.shape for name, tensor in hub_parameters(self.decoder).items()}
        self.kinds: dict[str, torch.dtype] = {}
        for name in self.names():
            packed = self.shards.where[name].suffix == ".gguf"  # dequantised as they are read
            kind = torch.float32 if packed else self.shards.get(name).dtype
            if kind not in DTYPES.values():
                raise UserError(
                    f"{self.shards.where[name]}: {name} is {str(kind).removeprefix('torch.')}; "
                    f"export needs a base in {', '.join(DTYPES)}"
                )
            self.kinds[name] = kind
        self.shards.unmap()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *error: object) -> None:
        self.shards.unmap()

    @property
    def dtype(self) -> torch.dtype:
        """The embedding's, which stands for the file."""
        return self.kinds[EMBED]

    def names(self) -> list[str]:
        """Hub names, file by file; a redundant head and rotary tables are left out."""
        return [name for name in self.shards.names() if name in self.shapes]

    def get(self, name: str) -> Tensor:
        """A tensor of the base as it is stored; mapped where the format allows. A rounded one in float32."""
        if name in self.rounded:
            return dequantize(*self.packed(name), torch.float32).cpu()
        return self._stored(name)

    def _stored(self, name: str) -> Tensor:
        self.shards.unmap()
        return self.shards.get(name, self.shapes[name])

    def packed(self, name: str) -> tuple[Tensor, Tensor]:
        """A rounded weight's 4 bits and scales, found as training found them; on the card where there is one."""
        tensor = self._stored(name)
        return nearest(tensor.cuda() if torch.cuda.is_available() else tensor, self.group)

    def rows(self, name: str, start: int, end: int) -> Tensor:
        """Rows of the base's tensor."""
        return self.get(name)[start:end]

    def is_merged(self, name: str) -> bool:
        """Whether the adapter changes this tensor."""
        return f"{adapters.PREFIX}{name.removesuffix('.weight')}.lora_A.weight" in self.adapter

    def merged(self, name: str) -> Tensor:
        """The weight with the adapter's part added: the sum in float32, not rounded yet. Others as stored."""
        tensor = self.get(name)
        if not self.is_merged(name):
            return tensor
        assert self.decoder.lora_config is not None
        module = adapters.PREFIX + name.removesuffix(".weight")
        a, b = (self.adapter[f"{module}.lora_{x}.weight"].float() for x in "AB")
        return tensor.float() + self.decoder.lora_config.scale * b @ a
