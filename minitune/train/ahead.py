"""What begins before its turn: the card and slow imports beside torch's import; the base weights and the kernels beside
the data."""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from minitune.config import TrainConfig
    from minitune.model.decoder import Decoder

# Reads some two thousand files while it is imported, which other threads need not wait for.
SLOW = "transformers.tokenization_utils_tokenizers"
PATIENCE = 10.0  # seconds for an action that can't be broken off: CUDA's start, a read from a slow disk


_importing: list[threading.Thread] = []


def import_slow() -> None:
    """Imports in a thread what the tokenizer will want. A fault shows where the module is asked for again."""

    def run() -> None:
        with suppress(Exception):
            importlib.import_module(SLOW)

    _importing.append(threading.Thread(target=run, name="imports", daemon=True))
    _importing[-1].start()


def imported() -> None:
    """Waits for `import_slow`, where it was called: a package that replaces itself while it is imported, as
    transformers does, must not be asked for by a second thread meanwhile."""
    while _importing:
        _importing[-1].join()
        _importing.pop()


def wake(device: str) -> None:
    """Begins CUDA's start (its driver, the card's context: a second or more) in a thread: torch, whose import takes
    longer, will find and use the same context. `device` as in the settings (of several processes, each has its own);
    what can't be done is left to torch."""
    own = device.partition(":")[2] or os.environ.get("LOCAL_RANK") or "0"

    def run() -> None:
        with suppress(Exception):
            cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
            number, context = ctypes.c_int(), ctypes.c_void_p()
            _ = (
                cuda.cuInit(0)
                or cuda.cuDeviceGet(ctypes.byref(number), int(own))
                or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), number)
            )

    if device == "auto" or device.startswith("cuda"):
        os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")  # as torch does before it starts CUDA
        threading.Thread(target=run, name="card", daemon=True).start()


class Loading:
    """The base weights, read by a thread, and the kernels, compiled by others. A context manager: leaving it tells the
    reading thread to stop, and waits for that.

    The card is taken into use there too (its context, its first memory), which takes a second by itself.
    """

    def __init__(self, config: TrainConfig, device: torch.device):
        self.config, self.device = config, device
        self._stop, self._done, self._compiled = (threading.Event() for _ in range(3))
        self._compilers = ThreadPoolExecutor(8, thread_name_prefix="compile")
        self._thread: threading.Thread | None = None
        self._decoder: Decoder | None = None
        self.shape: Any = None  # the decoder's, from `begin` on
        self._error: BaseException | None = None

    def begin(self, base: Path) -> None:
        """Checks the names and shapes in `base` now (UserError), and reads from now on."""
        from minitune.checkpoint.shards import Shards
        from minitune.checkpoint.weights import skeleton
        from minitune.config import UserError
        from minitune.model import four_bits

        shards = Shards(base)
        empty = skeleton(shards)
        self.shape = empty.config
        if self.config.method == "qlora":
            try:
                four_bits.make_room(empty)
            except ValueError as error:
                raise UserError(f"{base}: {error}") from None
        self._thread = threading.Thread(target=self._run, args=(shards, empty), name="weights", daemon=True)
        self._thread.start()
        threading.Thread(target=self._compile, args=(empty,), name="kernels", daemon=True).start()

    def _compile(self, empty: Decoder) -> None:
        # What goes wrong here shows where the kernel is launched, and compiled if need be.
        with suppress(BaseException):
            from minitune.train import fast
            from minitune.train.prepare import lora_of, training_dtype

            kind = training_dtype(self.config, self.device)
            if fast.plain_engine(self.config):
                pass  # what would be compiled is not launched
            elif self.config.method == "full":
                fast.compile_full_early(self.config, empty, kind, self.device, self._compilers)
            else:
                lora = lora_of(self.config)
                fast.compile_early(self.config, empty, kind, lora, self.device, self._compilers)
        self._compiled.set()

    def compiled(self) -> None:
        """Waits for the kernels."""
        self._compiled.wait()

    def _run(self, shards: Any, empty: Decoder) -> None:
        try:
            self._decoder = self._load(shards, empty)
        except BaseException as error:
            self._error = error
        finally:
            self._done.set()

    def _load(self, shards: Any, empty: Decoder) -> Decoder:
        import torch

        from minitune.checkpoint.weights import filled
        from minitune.config import UserError
        from minitune.train import fast, foresee
        from minitune.train.prepare import lora_of, training_dtype

        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)  # a thread has a current card of its own
        if foresee.hopeless(self.config, shards.folder, empty.config, self.device):
            raise UserError(f"{shards.folder}: its weights do not fit the card")  # the plan says more, and sooner
        strips = None
        if self.config.method != "full" and not fast.plain_engine(self.config) and not fast.why_not_on(self.device):
            strips = partial(fast.strips_of, lora=lora_of(self.config))
        kind = str(training_dtype(self.config, self.device)).removeprefix("torch.")
        with shards:
            return filled(shards, empty, kind, str(self.device), strips, self._stop.is_set)

    def result(self) -> Decoder:
        """Waits for the weights; raises what went wrong with them."""
        assert self._thread is not None
        self._done.wait()  # not join: a Ctrl-C in that would take the thread for ended (Python 3.11)
        if self._error is not None:
            raise self._error
        assert self._decoder is not None
        return self._decoder

    def __enter__(self) -> Loading:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._compilers.shutdown(wait=False, cancel_futures=True)  # the interpreter waits for what it has begun
        if self._thread is not None:
            self._done.wait(PATIENCE)
        self._decoder = None
