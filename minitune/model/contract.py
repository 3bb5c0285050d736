"""What a recorded CUDA graph rests on: a graph replays addresses, and what was put elsewhere since would silently not
take part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


class Contract:
    """Where each named tensor lies, its shape and its dtype; each is found anew at each check."""

    def __init__(self, places: Sequence[tuple[str, Callable[[], Any]]]):
        self.places = [(name, find, _identity(find())) for name, find in places]

    def check(self) -> None:
        """Raises RuntimeError naming what changed."""
        for name, find, was in self.places:
            now = _identity(find())
            if now != was:
                raise RuntimeError(f"the captured step no longer holds: {name} was {was}, now it is {now}")


def _identity(tensor: Tensor | None) -> tuple[Any, ...]:
    return () if tensor is None else (tensor.data_ptr(), tuple(tensor.shape), tensor.dtype)
