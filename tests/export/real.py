"""The real llama.cpp, in processes of its own (it aborts on a fault): logits through cyllama, a server through xllamacpp."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

LOGITS = """
import json, sys
import numpy as np
from cyllama.llama import llama_cpp as c
c.disable_logging()
class Model(c.LlamaModel):
    n_vocab = property(lambda self: self.get_vocab().n_vocab)  # get_logits_ith of 0.2.18 asks the model for it
asked = json.load(sys.stdin)
model = Model(path_model=asked["path"], params=c.LlamaModelParams())
vocab = model.get_vocab()
rows = []
for ids in asked["documents"]:
    settings = c.LlamaContextParams()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = asked["context"]
    settings.n_threads = settings.n_threads_batch = 1
    context = c.LlamaContext(model, settings)
    batch = c.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
    batch.set_batch(ids, n_past=0, logits_all=True)
    context.decode(batch)
    rows += [context.get_logits_ith(i) for i in range(len(ids))]
if rows:
    np.save(asked["out"], np.array(rows, np.float32))
plain = [list(vocab.tokenize(t, False, False)) for t in asked["plain"]]
parsed = [list(vocab.tokenize(t, False, True)) for t in asked["parsed"]]
ends = [i for i in range(vocab.n_vocab) if vocab.is_eog(i)]
facts = {"bos": vocab.token_bos(), "eos": vocab.token_eos(), "add_bos": bool(vocab.get_add_bos()), "ends": ends}
print(json.dumps({"plain": plain, "parsed": parsed, **facts}))
"""

SERVE = """
import json, sys, urllib.request
import xllamacpp as x
asked = json.load(sys.stdin)
params = x.CommonParams()
params.model.path, params.n_ctx, params.warmup = asked["path"], asked["context"], False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = x.Server(params)
def ask(path, body):
    address = server.listening_address + path
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)
print("ANSWERS" + json.dumps([ask(path, body) for path, body in asked["requests"]]))
"""


def _run(program: str, asked: dict[str, Any], package: str) -> str:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"no llama.cpp here: {package} is not installed")
    done = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(asked), capture_output=True, encoding="utf-8", timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def logits(path: Path, documents: list[list[int]], out: Path, context: int = 256) -> Tensor:
    """What llama.cpp computes: [tokens of all documents, vocabulary]."""
    asked = {"path": str(path), "documents": documents, "out": str(out), "context": context, "plain": [], "parsed": []}
    _run(LOGITS, asked, "cyllama")
    return torch.from_numpy(np.load(out))


def tokens(path: Path, plain: list[str] = [], parsed: list[str] = []) -> dict[str, Any]:  # noqa: B006  never changed
    """The ids of texts, and what the vocabulary says of itself; parsed: special tokens in the text count as such."""
    asked = {"path": str(path), "documents": [], "out": "", "context": 64, "plain": plain, "parsed": parsed}
    return json.loads(_run(LOGITS, asked, "cyllama").splitlines()[-1])


def serve(path: Path, requests: list[tuple[str, dict[str, Any]]], context: int = 512) -> list[Any]:
    """The answers of llama.cpp's own HTTP server to POST requests."""
    said = _run(SERVE, {"path": str(path), "requests": requests, "context": context}, "xllamacpp")
    return json.loads(next(line for line in said.splitlines() if line.startswith("ANSWERS"))[7:])
