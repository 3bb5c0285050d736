"""The Triton kernels against their plain twins: on a card as they are, elsewhere in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (pip install triton runs these in its interpreter)")

from minitune.model import attention_kernels, kernels  # noqa: E402
from minitune.model.attention import reference  # noqa: E402
from minitune.model.rope import Rope, rotate  # noqa: E402
from minitune.model.rope_attention import rope_attention  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "lengths"),
    [
        *((4, kv, 32, lengths) for kv in (4, 2) for lengths in ([1], [64, 65], [5, 130, 17, 0, 44], [63, 2, 200])),
        (2, 2, 64, [64, 100]),
        (8, 1, 32, [20, 65]),
        (2, 1, 128, [30, 70]),
        (4, 4, 32, [100, 3] * 13),
    ],
)
def test_rope_attention_is_rotate_then_attend(
    heads: int, kv_heads: int, width: int, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients equal float64 attention over rotated q and k; an empty document is no document. The last has
    more blocks than programs."""
    monkeypatch.setattr(attention_kernels, "STRIDES", (23,))
    generator, tokens = torch.Generator().manual_seed(1), sum(lengths)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * width, generator=generator).to(DEVICE, DTYPE)
    weight = torch.randn(tokens, heads * width, generator=generator).to(DEVICE, DTYPE)
    positions = torch.cat([torch.arange(n) for n in lengths]).to(DEVICE)
    cos, sin = Rope(width, 10000.0, 4096, None)(positions)
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(DEVICE)

    ours = qkv.clone().requires_grad_()
    out, _ = rope_attention(ours, cos[:, 0].contiguous(), sin[:, 0].contiguous(), cu, heads, kv_heads, 0.2)
    (out * weight).sum().backward()

    plain = qkv.double().requires_grad_()
    q, k, v = plain.view(tokens, -1, width).split((heads, kv_heads, kv_heads), dim=1)
    spin = [_rotate64(t, cos, sin) for t in (q, k)]
    want = reference(*spin, v, [n for n in lengths if n], 0.2).reshape(tokens, -1)
    (want * weight.double()).sum().backward()
    close = 2e-2 if torch.bfloat16 == DTYPE else 2e-6
    assert ours.grad is not None and plain.grad is not None
    assert _relative(out, want) < close
    assert _relative(ours.grad, plain.grad) < close
    assert rotate(q.float(), cos, sin).shape == q.shape  # the twin that serves everywhere else


def _rotate64(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def _relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("vocab", [7, 4096, 5003])
def test_cross_entropy_in_place(vocab: int) -> None:
    """Loss and gradient equal torch's; padding columns and rows that do not count get no gradient."""
    generator, width = torch.Generator().manual_seed(2), -(-vocab // 64) * 64
    logits = torch.randn(6, width, generator=generator).to(DEVICE, DTYPE) * 3
    targets = torch.randint(0, vocab, (6,), generator=generator).to(DEVICE)
    targets[2] = -100
    plain = logits[:, :vocab].double().requires_grad_()
    want = torch.nn.functional.cross_entropy(plain, targets, reduction="none")
    want.sum().backward()
    got = kernels.cross_entropy_(logits, targets, vocab, grad=True)
    close = 1e-2 if torch.bfloat16 == DTYPE else 1e-5
    assert _relative(got, want) < close
    assert plain.grad is not None and _relative(logits[:, :vocab], plain.grad) < close
    assert not logits[:, vocab:].any() and not logits[2].any()
