"""How it is learned. The package can be called: `minitune.train(TrainConfig(...))` is `run.train`."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    # a function beside it of the same name would be hidden as soon as anything imports `minitune.train.…`
    def __call__(self, *args: Any, **settings: Any) -> dict[str, Any]:
        from minitune.train.run import train

        return train(*args, **settings)


sys.modules[__name__].__class__ = _Callable
