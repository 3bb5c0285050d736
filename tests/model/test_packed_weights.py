"""Reordered weights: the same products, and the same bits whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from minitune.checkpoint.weights import load_model
from minitune.model.packed import multiply, pack, packable, packed

CPU = torch.device("cpu")
TYPES = [t for t in (torch.float32, torch.bfloat16) if packable(CPU, t)]

if not TYPES:
    pytest.skip("no oneDNN in this torch", allow_module_level=True)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(960, 576), (576, 1536), (1, 7), (37, 1), (333, 65)])
def test_the_product_and_the_weight_are_the_same(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    assert torch.equal(packed(weight).to_dense(), weight)
    for rows in (1, 2, 5, 64, 200):
        x = torch.randn(rows, shape[1]).to(dtype)
        exact = x.double() @ weight.double().T
        bound = (5e-6 if dtype == torch.float32 else 1e-2) * float(exact.abs().max())
        for got in (multiply(x, packed(weight)), multiply(x, weight)):
            assert got.dtype == dtype and (got.double() - exact).abs().max() <= bound


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(960, 576), (576, 1536), (1200, 5760)])
def test_company_changes_no_bit(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """A row of a product is the same to the last bit in every batch, one row alone included."""
    if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
        pytest.skip("AMX multiplies small batches of bfloat16 otherwise than large ones")
    torch.manual_seed(1)
    weight = packed(torch.randn(shape).to(dtype))
    x = torch.randn(200, shape[1]).to(dtype)
    whole = multiply(x, weight)
    for rows in (1, 2, 3, 7, 8, 16, 33, 64, 128):
        for start in (0, 5, 200 - rows):
            assert torch.equal(multiply(x[start : start + rows], weight), whole[start : start + rows]), rows


@pytest.mark.parametrize("dtype", TYPES)
def test_a_packed_decoder_computes_the_same(golden: Callable[[str], Path], dtype: torch.dtype) -> None:
    """The official logits in float32; twice is once; the embedding stays plain."""
    name = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[dtype]
    decoder = load_model(golden("tiny-1b"), device="cpu", dtype=name)
    official = load_file(golden("tiny-1b") / "expected.safetensors")
    pack(decoder)
    head = decoder.head_packed
    pack(decoder)
    assert head is not None and decoder.head_packed is head
    assert not decoder.embed.weight.is_mkldnn and all(n.weight.is_mkldnn for n in decoder.linears())
    with torch.no_grad():
        got = decoder.logits(official["input_ids"])
    bound = (3e-5 if dtype == torch.float32 else 1e-1) * float(official["logits"].abs().max())
    assert (got.float() - official["logits"]).abs().max() <= bound
    assert F.embedding(torch.tensor([3]), decoder.embed.weight).shape == (1, decoder.config.hidden_size)


def test_what_learns_stays_plain(golden: Callable[[str], Path]) -> None:
    for change in ("train", "grad"):
        decoder = load_model(golden("tiny-1b"), device="cpu", dtype="float32")
        if change == "train":
            decoder.train()
        else:
            decoder.norm.weight.requires_grad_(True)
        pack(decoder)
        assert decoder.head_packed is None and not any(n.weight.is_mkldnn for n in decoder.linears())
