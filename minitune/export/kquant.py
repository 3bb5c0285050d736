"""K-quants (q4_k_m and its kin) through a llama.cpp library: `gguf` reads them but can't write them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from minitune.config import UserError
from minitune.export.report import Report

FILE_TYPES = {"q4_k_m": 15, "q5_k_m": 17, "q6_k": 18}  # gguf.LlamaFileType
SUPER_BLOCK = 256  # weights that share their scales' scale
# In a process of its own: the library prints what it does, aborts on a fault, and keeps its memory.
PROGRAM = """
import sys
from cyllama.llama import llama_cpp
params = llama_cpp.LlamaModelQuantizeParams()
params.ftype, params.nthread = int(sys.argv[3]), int(sys.argv[4])
llama_cpp.model_quantize(sys.argv[1], sys.argv[2], params)
"""


def check() -> None:
    """UserError where the library is not installed."""
    import importlib.util

    if importlib.util.find_spec("cyllama") is None:
        raise UserError("K-quants need a llama.cpp library: pip install 'minitune[llama]', or use --quant q4_0 or q8_0")


def quantize(plain: Path, file: Path, quant: str, report: Report) -> None:
    """Writes `file` from the f16 file `plain`. UserError, one line, where the library fails."""
    check()
    threads = str(os.cpu_count() or 1)
    command = [sys.executable, "-c", PROGRAM, str(plain), str(file), str(FILE_TYPES[quant]), threads]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    if done.returncode or not file.is_file():
        full = next((line for line in said if "No space left" in line), None)
        if full:
            raise OSError(28, "No space left on device")
        raise UserError(f"{quant}: llama.cpp's quantiser failed ({(said or ['it said nothing'])[-1][:200]})")
    _note_fallbacks(file, report)


def _note_fallbacks(file: Path, report: Report) -> None:
    """Rows that are no multiple of 256 get another type from llama.cpp, which makes the file larger."""
    from collections import Counter

    from minitune.checkpoint.gguf import open_reader

    tensors = open_reader(file).tensors
    odd = Counter(t.tensor_type.name for t in tensors if len(t.shape) > 1 and t.shape[0] % SUPER_BLOCK)
    if odd:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(odd.items()))
        report.notes.append(f"{sum(odd.values())} tensors have rows that are no multiple of {SUPER_BLOCK}: {kinds}")
