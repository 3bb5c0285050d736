"""Each way to compute packed attention against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitune.model.attention import PackedLayout, choose_kernel, document_ids, reference

CPU = torch.device("cpu")


def tensors(tokens: int, heads: int, kv: int, width: int = 16, device: torch.device = CPU) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((tokens, heads, width), (tokens, kv, width), (tokens, kv, width))
    return [torch.randn(s, generator=generator).to(device).requires_grad_(True) for s in shapes]


def layout(lengths: list[int], kernel: str, slots: int = 0) -> PackedLayout:
    cu = torch.tensor([0, *lengths, *[0] * slots], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return PackedLayout(cu, max(lengths), tuple(lengths), kernel)  # type: ignore[arg-type]


def formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], scale: float) -> torch.Tensor:
    """Token by token and head by head, with plain loops: what `reference` itself must equal."""
    out, base = torch.zeros_like(q), 0
    for length in lengths:
        for at in range(length):
            for head in range(q.shape[1]):
                own = head // (q.shape[1] // k.shape[1])
                seen = slice(base, base + at + 1)
                weight = torch.softmax(k[seen, own].double() @ q[base + at, head].double() * scale, 0)
                out[base + at, head] = weight @ v[seen, own].double()
        base += length
    return out


def test_reference_is_the_formula() -> None:
    """The plain twin against plain loops, with grouped heads and a scale that is not 1/√D."""
    with torch.no_grad():
        q, k, v = tensors(9, 4, 2)
        torch.testing.assert_close(reference(q, k, v, [2, 6, 1], 0.4), formula(q, k, v, [2, 6, 1], 0.4))
        torch.testing.assert_close(reference(q, k, v, [9]), formula(q, k, v, [9], 0.25))


@pytest.mark.parametrize("kernel", ["documents", "masked"])
@pytest.mark.parametrize("kv", [4, 2, 1])
@pytest.mark.parametrize("lengths", [[1], [5, 11, 8], [1, 1, 30, 2]])
def test_kernel_equals_reference(kernel: str, kv: int, lengths: list[int]) -> None:
    """Outputs and gradients of q, k and v, MHA and GQA."""
    ours, theirs = (tensors(sum(lengths), 4, kv) for _ in range(2))
    got, want = layout(lengths, kernel).attend(*ours, 0.31), reference(*theirs, lengths, 0.31)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    for output in (got, want):
        (output * weight).sum().backward()
    for name, a, b in zip("qkv", ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=5e-6, rtol=1e-5, msg=name)


def test_masked_with_padding() -> None:
    """A static shape: the last `cu_seqlens` repeated and tokens behind it change nothing, and nothing is nan."""
    q, k, v = tensors(20, 4, 2)
    with torch.no_grad():
        padded = layout([5, 9], "masked", slots=3).attend(q, k, v, 0.25)
        torch.testing.assert_close(padded[:14], reference(q[:14], k[:14], v[:14], [5, 9], 0.25), atol=2e-6, rtol=1e-5)
        assert padded.isfinite().all()


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    slots=st.integers(0, 3),
    pad=st.integers(0, 4),
)
def test_document_ids_and_lengths(lengths: list[int], slots: int, pad: int) -> None:
    """Each token knows its document and that document's length; padding belongs to no document."""
    packed = layout(lengths, "masked", slots)
    tokens = sum(lengths)
    want = [i for i, n in enumerate(lengths) for _ in range(n)]
    ids = document_ids(packed.cu_seqlens, tokens + pad).tolist()
    assert ids[:tokens] == want
    assert len(set(ids[tokens:])) <= 1 and not set(ids[tokens:]) & set(want)
    assert packed.length_T(tokens + pad)[:tokens].tolist() == [lengths[i] for i in want]


def test_kernel_choice_on_the_cpu() -> None:
    """No card, no card's kernel; a layout says so."""
    assert choose_kernel(CPU, torch.bfloat16) == choose_kernel(CPU, torch.float32) == "documents"
    assert PackedLayout.of([3, 4], CPU, torch.float32).kernel == "documents"


@pytest.mark.gpu
@pytest.mark.parametrize("kv", [4, 2, 1])
def test_varlen_equals_reference(kv: int) -> None:
    """Flash attention over variable lengths in bf16: outputs, gradients, repeated `cu_seqlens`."""
    card, lengths = torch.device("cuda"), [5, 130, 64, 1]
    base = [t.detach().bfloat16() for t in tensors(sum(lengths), 4, kv, 64, card)]
    ours = [t.clone().requires_grad_(True) for t in base]
    theirs = [t.float().requires_grad_(True) for t in base]
    packed = layout(lengths, "varlen", slots=2)
    packed = PackedLayout(packed.cu_seqlens.to(card), 130, packed.lengths, "varlen")
    got, want = packed.attend(*ours, 0.11), reference(*theirs, lengths, 0.11)
    torch.testing.assert_close(got.float(), want, atol=2e-2, rtol=2e-2)
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(1)).to(card)
    (got.float() * weight).sum().backward()
    (want * weight).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        assert (a.grad.float() - b.grad).norm() <= 2e-2 * b.grad.norm()
