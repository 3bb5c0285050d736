"""minitune: make a MiniCPM-class chat model your own, on the hardware you have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["TrainConfig", "UserError", "__version__", "load_model", "load_tokenizer", "train"]

if TYPE_CHECKING:
    from minitune.checkpoint.tokenizer import load_tokenizer
    from minitune.checkpoint.weights import load_model
    from minitune.config import TrainConfig, UserError
    from minitune.train.run import train

_HOME = {
    "TrainConfig": "minitune.config",
    "UserError": "minitune.config",
    "load_model": "minitune.checkpoint.weights",
    "load_tokenizer": "minitune.checkpoint.tokenizer",
}


def __getattr__(name: str) -> Any:  # lazy: `minitune --help` must not wait for torch
    if name == "train":  # the package itself, which can be called
        import minitune.train

        return minitune.train
    if name not in _HOME:
        raise AttributeError(f"module 'minitune' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
