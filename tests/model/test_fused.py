"""The fused layers against the plain ones: values, every adapter's gradient, dropout draw for draw, recomputed or not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hand import launches_of
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed (pip install triton runs these in its interpreter)")

from minitune.model import attention_kernels, fused, fused_ops, kernels  # noqa: E402
from minitune.model.attention import PackedLayout  # noqa: E402
from minitune.model.decoder import Decoder, DecoderConfig  # noqa: E402
from minitune.model.fused import FusedStack, strip_width, why_not  # noqa: E402
from minitune.model.fused_compile import launch_all  # noqa: E402
from minitune.model.lora import Dropout, LoraConfig, attach  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTHS = [3, 67, 1]
SHAPE = DecoderConfig(
    vocab_size=97,
    hidden_size=72,
    intermediate_size=104,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=32,
    embedding_multiplier=3.0,
    residual_multiplier=0.7,
    logits_scaling=2.0,
)
QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")


def decoder_of(
    shape: DecoderConfig, targets: tuple[str, ...] | str, dtype: torch.dtype, strips: bool = False
) -> Decoder:
    """Random weights, adapters that are not zero."""
    with torch.device("meta"):
        decoder = Decoder(shape)
    decoder.allocate(DEVICE, dtype, {"attn.qkv": 64, "attn.o": 64} if strips else None)
    generator = torch.Generator().manual_seed(3)
    attach(decoder, LoraConfig(r=5, lora_alpha=7, lora_dropout=0.25, target_modules=targets), seed=1)
    with torch.no_grad():
        for parameter in decoder.parameters():
            values = torch.randn(parameter.shape, generator=generator) * 0.15
            parameter.copy_(values + 1 if parameter.ndim == 1 else values)
    return decoder.train()


def layout_of(kernel: str) -> PackedLayout:
    layout = PackedLayout.of(LENGTHS, DEVICE, torch.float32)
    return replace(layout, kernel=kernel)


def run(decoder: Decoder, layout: PackedLayout, drop: bool, times: int = 1) -> tuple[Tensor, list[Tensor]]:
    """(hidden states, the gradient of each A and B) of a weighted sum, over `times` backward passes."""
    tokens = sum(LENGTHS)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, SHAPE.vocab_size, (tokens,), generator=generator).to(DEVICE)
    weight = torch.randn(tokens, decoder.config.hidden_size, generator=generator).to(DEVICE, decoder.dtype)
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).to(DEVICE)
    step = torch.full((), 9, dtype=torch.int64, device=DEVICE)
    dropout = Dropout.at(4, step, torch.arange(tokens, device=DEVICE), 0.25) if drop else None
    for _ in range(times):
        hidden = decoder.hidden(ids, positions, layout, dropout)
        (hidden * weight).sum().backward()
    loras = [n.lora for n in decoder.linears() if n.lora is not None]
    return hidden.detach(), [p.grad.clone() for lora in loras for p in (lora.A, lora.B) if p.grad is not None]


def far(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize(
    ("targets", "kv_heads", "kernel", "drop", "keep"),
    [
        (QKVO, 4, "short", True, True),
        (QKVO, 2, "short", True, False),
        (("v_proj", "q_proj"), 2, "masked", False, True),
        ("all-linear", 4, "masked", True, False),
        (("down_proj", "gate_proj"), 4, "short", True, True),
    ],
)
def test_fused_layers_are_the_plain_ones(
    targets: tuple[str, ...] | str, kv_heads: int, kernel: str, drop: bool, keep: bool
) -> None:
    """float32: values and gradients of two accumulated passes."""
    decoder = decoder_of(replace(SHAPE, num_key_value_heads=kv_heads), targets, torch.float32)
    want, want_grads = run(copy.deepcopy(decoder), layout_of("masked"), drop, times=2)
    decoder.stack = FusedStack(decoder, keep)
    got, got_grads = run(decoder, layout_of(kernel), drop, times=2)
    assert far(got, want) < 2e-6
    assert len(got_grads) == len(want_grads) and all(g.abs().max() > 0 for g in want_grads)
    assert max(far(g, w) for g, w in zip(got_grads, want_grads, strict=True)) < 5e-6


@pytest.mark.parametrize(
    "dtype",
    # Triton's interpreter multiplies bfloat16 wrongly
    [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)],
)
def test_fused_in_half_precision_is_no_less_exact(dtype: torch.dtype) -> None:
    """Against float64-like float32 of the same rounded weights: the fused error stays within 1.2 times the plain one."""
    decoder = decoder_of(SHAPE, QKVO, dtype)
    exact, exact_grads = run(copy.deepcopy(decoder).float(), layout_of("masked"), True)
    plain, plain_grads = run(copy.deepcopy(decoder), layout_of("masked"), True)
    decoder.stack = FusedStack(decoder)
    fused, fused_grads = run(decoder, layout_of("short"), True)
    assert far(fused, exact) < 1.2 * far(plain, exact)
    for one, other, true in zip(fused_grads, plain_grads, exact_grads, strict=True):
        assert far(one, true) < 1.2 * far(other, true) + 1e-3


def test_refresh_takes_an_update_over() -> None:
    """After the flat parameter changes, values follow only with `refresh`; A and B are its slices."""
    decoder = decoder_of(SHAPE, QKVO, torch.float32, strips=True)
    stack = decoder.stack = FusedStack(decoder)
    before, _ = run(decoder, layout_of("short"), True)
    with torch.no_grad():
        stack.flat.mul_(1.5)
    stale, _ = run(decoder, layout_of("short"), True)
    assert torch.equal(stale, before)
    stack.refresh()
    got, _ = run(decoder, layout_of("short"), True)
    decoder.stack = None
    want, _ = run(decoder, layout_of("masked"), True)
    assert far(got, want) < 2e-6 and far(got, before) > 1e-2


def test_weights_allocated_with_strips_are_the_same_weights() -> None:
    """`allocate(strips=…)` and widening later give equal decoders; the strips begin at zero."""
    plain, wide = (decoder_of(SHAPE, QKVO, torch.float32, strips=s) for s in (False, True))
    for (name, a), (other, b) in zip(plain.named_parameters(), wide.named_parameters(), strict=True):
        assert name == other and torch.equal(a, b)
    assert not wide.strips["attn.qkv"][:, :, SHAPE.hidden_size :].any()
    plain.widen("attn.o", 64)
    assert torch.equal(plain.strips["attn.o"], wide.strips["attn.o"])


def test_what_is_not_fused_is_said() -> None:
    decoder = decoder_of(SHAPE, QKVO, torch.float32)
    assert why_not(decoder) == ""
    decoder.layers[1].attn.o.lora = None
    assert "differ" in why_not(decoder)
    with pytest.raises(ValueError, match="differ"):
        FusedStack(decoder)
    assert [strip_width(n) for n in (0, 1, 64, 65, 200)] == [0, 64, 64, 128, 256]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("targets", [QKVO, "all-linear"])
def test_kernels_compiled_early_are_those_that_run(
    targets: tuple[str, ...] | str, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `fused_compile` launches on `meta` has the constants and dtypes of a pass over real tensors."""
    seen = launches_of((fused_ops, attention_kernels, kernels), monkeypatch)
    decoder = decoder_of(SHAPE, targets, torch.float32)
    assert decoder.lora_config is not None
    decoder.stack = FusedStack(decoder, keep)
    run(decoder, layout_of("short"), True)
    ran = set(seen)
    seen.clear()
    with torch.no_grad():
        launch_all(decoder.config, torch.float32, decoder.lora_config, len(LENGTHS), keep)
    early = {one for one in seen if one[0] != "_cross_entropy"}
    assert ran == early


class Late(fused_ops.Beside):
    """A second stream that does nothing before it is waited for: what the code does not wait for is not there."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(torch.device("cpu"))
        self.waiting: list[Callable[[], Any]] = []

    @contextmanager
    def __call__(self, *held: Tensor) -> Iterator[None]:
        launch, mm = fused_ops.launch, torch.mm
        later = self.waiting.append
        fused_ops.launch = attention_kernels.launch = lambda *a, **k: later(partial(launch, *a, **k))
        torch.mm = lambda *a, **k: later(partial(mm, *a, **k))  # type: ignore[assignment]
        try:
            yield
        finally:
            fused_ops.launch = attention_kernels.launch = launch
            torch.mm = mm  # type: ignore[assignment]

    def join(self) -> None:
        waiting, self.waiting[:] = list(self.waiting), []
        for work in waiting:
            work()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the order of a CPU stands in for a second stream")
@pytest.mark.parametrize("split", [1, fused_ops.SPLIT])
@pytest.mark.parametrize(
    ("targets", "keep", "kernel"),
    [
        (QKVO, True, "masked"),
        (QKVO, False, "masked"),
        (("o_proj",), True, "masked"),
        ("all-linear", True, "masked"),
        (QKVO, True, "short"),
    ],
)
def test_the_second_stream_is_waited_for(
    targets: tuple[str, ...] | str, keep: bool, kernel: str, split: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients are the plain ones even where all work of the second streams comes as late as it may."""
    monkeypatch.setattr(fused, "Beside", Late)
    monkeypatch.setattr(fused_ops, "SPLIT", split)
    decoder = decoder_of(SHAPE, targets, torch.float32)
    _, want = run(copy.deepcopy(decoder), layout_of("masked"), True)
    decoder.stack = FusedStack(decoder, keep)
    _, got = run(decoder, layout_of(kernel), True)
    assert max(far(g, w) for g, w in zip(got, want, strict=True)) < 1e-5
