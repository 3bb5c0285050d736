"""The chunked cross-entropy against torch's own, with torch's own autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minitune.train import loss
from minitune.train.loss import cross_entropy_sum

H, V = 24, 53


def case(rows: int, seed: int = 0, ignored: float = 0.3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(rows, H, generator=generator)
    weight = torch.randn(V, H, generator=generator)
    targets = torch.randint(0, V, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < ignored] = -100
    return h, weight, targets


@pytest.mark.parametrize("learns", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(("rows", "chunk"), [(32, 8), (33, 8), (5, 8), (7, 1), (33, 2048)])
def test_loss_and_gradients(rows: int, chunk: int, learns: tuple[bool, bool]) -> None:
    """Value, d hidden and d weight, scaled by what comes from above; chunks that do and do not divide the rows."""
    h, weight, targets = case(rows)
    own = [t.clone().requires_grad_(on) for t, on in zip((h, weight), learns, strict=True)]
    other = [t.clone().requires_grad_(on) for t, on in zip((h, weight), learns, strict=True)]
    total = cross_entropy_sum(own[0], own[1], targets, chunk)
    want = F.cross_entropy(other[0] @ other[1].T, targets, ignore_index=-100, reduction="sum")
    assert total.shape == () and total.dtype == torch.float32
    torch.testing.assert_close(total, want)
    (total * 0.37).backward()
    (want * 0.37).backward()
    for a, b in zip(own, other, strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 40),
    chunk=st.integers(1, 45),
    seed=st.integers(0, 99),
    ignored=st.sampled_from([0, 0.5, 1]),
)
def test_chunks_change_nothing(rows: int, chunk: int, seed: int, ignored: float) -> None:
    """Any chunk size gives the loss of one chunk, with and without gradients, empty and all-ignored input too."""
    h, weight, targets = case(rows, seed, ignored)
    want = F.cross_entropy(h @ weight.T, targets, ignore_index=-100, reduction="sum") if rows else torch.zeros(())
    h.requires_grad_(True)
    total = cross_entropy_sum(h, weight, targets, chunk)
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy_sum(h, weight, targets, chunk), want, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(total, want, atol=1e-4, rtol=1e-5)
    total.backward()
    assert h.grad is not None and h.grad.shape == h.shape
    assert not h.grad[targets < 0].any()


def test_tied_weight_gets_both_gradients() -> None:
    """hidden = f(embedding), head = embedding: the two uses add up."""
    _, weight, targets = case(12)
    ids = torch.arange(12)
    a, b = (weight.clone().requires_grad_(True) for _ in range(2))
    cross_entropy_sum(torch.tanh(a[ids]), a, targets, 5).backward()
    F.cross_entropy(torch.tanh(b[ids]) @ b.T, targets, ignore_index=-100, reduction="sum").backward()
    torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)


def test_a_head_without_rows_behind_it_is_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A width that the matrix units don't take: a copy with zero rows gives the same loss and gradients."""
    h, weight, targets = case(20)
    monkeypatch.setattr(loss, "unit_of", lambda device: 8)
    assert loss.head_of(weight, 0, 8).shape == (56, H)
    assert loss.head_of(weight, 0, 1).data_ptr() == weight.data_ptr()
    own, other = [[t.clone().requires_grad_(True) for t in (h, weight)] for _ in range(2)]
    ours = cross_entropy_sum(*own, targets, 8)
    want = F.cross_entropy(other[0] @ other[1].T, targets, ignore_index=-100, reduction="sum")
    torch.testing.assert_close(ours, want)
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy_sum(*own, targets, 8), want)
    ours.backward()
    want.backward()
    for a, b in zip(own, other, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)


def test_large_logits_stay_finite() -> None:
    """Logits of hundreds do not overflow: the softmax is shifted."""
    h, weight, targets = case(9)
    h = (h * 100).requires_grad_(True)
    total = cross_entropy_sum(h, weight, targets, 4)
    torch.testing.assert_close(total, F.cross_entropy(h @ weight.T, targets, ignore_index=-100, reduction="sum"))
    total.backward()
    assert h.grad is not None and h.grad.isfinite().all()


def test_bf16_sums_in_float32() -> None:
    """bf16 hidden states and head: the loss is a float32 of float32 log-softmax; gradients come in bf16."""
    h, weight, targets = (t.bfloat16() if t.is_floating_point() else t for t in case(200))
    h.requires_grad_(True)
    total = cross_entropy_sum(h, weight, targets, 64)
    logits = F.linear(h.detach(), weight).double()
    want = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    assert total.dtype == torch.float32 and total.item() == pytest.approx(want.item(), rel=1e-5)
    total.backward()
    assert h.grad is not None and h.grad.dtype == torch.bfloat16
    exact = h.detach().float().requires_grad_(True)
    F.cross_entropy(exact @ weight.float().T, targets, ignore_index=-100, reduction="sum").backward()
    assert (h.grad.float() - exact.grad).norm() < 1e-2 * exact.grad.norm()
