"""A base in four bits: the search for scales on any device, and layers by hand over such weights."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hand import launches_of
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed (pip install triton runs these in its interpreter)")

from test_fused import DEVICE, LENGTHS, QKVO, SHAPE, Late, far, layout_of, run  # noqa: E402

from minitune.model import attention_kernels, four_bits, fused, fused_ops, kernels  # noqa: E402
from minitune.model.decoder import Decoder  # noqa: E402
from minitune.model.fused import FusedStack, why_not  # noqa: E402
from minitune.model.fused_compile import launch_all  # noqa: E402
from minitune.model.lora import LoraConfig, attach  # noqa: E402
from minitune.model.quantized import Int4Linear, dequantize, quantize, unpack  # noqa: E402

WIDE = dict(SHAPE.__dict__, hidden_size=128, intermediate_size=192)  # rows that groups of 64 divide, tiles don't


def weights(kind: torch.dtype) -> Tensor:
    """Rows of all sorts: normal, zero, tiny, one outlier a group, one group of zeros, values that are none."""
    w = torch.randn(16, 256, generator=torch.Generator().manual_seed(0)) * 0.03
    w[3], w[4, :64], w[6, ::61] = 0, w[4, :64] * 1e-4, 0.5
    w[7] *= 1e-20
    w[8, 5], w[9, 200], w[10, 70] = torch.nan, torch.inf, -torch.inf
    return w.to(kind)


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_the_kernel_finds_the_same_bits(kind: torch.dtype, group: int) -> None:
    """Words and scales of kernel and twin are equal, bit for bit: a base is the same on every device."""
    want = four_bits._nearest(weights(kind).float().view(16, -1, group))
    got = four_bits.nearest_by_kernel(weights(kind).to(DEVICE), group)
    assert torch.equal(got[0].cpu(), want[0]) and torch.equal(got[1].cpu().nan_to_num(9), want[1].nan_to_num(9))
    assert want[1].isnan().sum() == 3 and not want[1][:8].isnan().any()


@pytest.mark.parametrize("group", [32, 64, 128])
def test_the_search_finds_small_errors(group: int) -> None:
    """As small as the search in floating point with its weights, within a hundredth; never above plain rounding's in
    any group, each counted as that search counts."""
    w = torch.randn(64, 512, generator=torch.Generator().manual_seed(1))
    packed, scale = four_bits.nearest(w, group)
    assert scale.dtype == torch.bfloat16 and int(unpack(packed).max()) <= 7
    groups = w.view(64, -1, group)
    share = (groups.square().mean(-1, keepdim=True) + groups.square()).sqrt()

    def counted(found: Tensor) -> Tensor:
        return ((found.view_as(groups) - groups).square() * share).sum(-1)

    error = counted(dequantize(packed, scale, torch.float32))
    other = counted(dequantize(*quantize(w, group, torch.bfloat16), torch.float32))
    assert error.sum() < 1.01 * other.sum()
    reach = (groups.abs().amax(-1, keepdim=True) / 7).bfloat16().float()
    plain = counted((groups / reach).round().clamp(-8, 7) * reach)
    assert (error <= plain * 1.02).all() and error.sum() < 0.8 * plain.sum()


def test_what_four_bits_hold_comes_back_exactly() -> None:
    """Sixteen levels times a power of two, the lowest or the highest missing, zeros alone: no error at all."""
    q = torch.randint(-8, 8, (8, 128), generator=torch.Generator().manual_seed(2))
    q[:, ::32], q[3] = -8, 0
    for sign in (1, -1):
        weight = q * sign * 0.25
        packed, scale = four_bits.nearest(weight, 32)
        assert torch.equal(dequantize(packed, scale, torch.float32), weight)


def packed_decoder(
    targets: tuple[str, ...] | str, group: int = 64, dtype: torch.dtype = torch.float32
) -> tuple[Decoder, Decoder]:
    """A decoder in four bits with adapters, and its plain twin over the same numbers."""
    shape = type(SHAPE)(**WIDE)
    with torch.device("meta"):
        packed, plain = four_bits.make_room(Decoder(shape), group), Decoder(shape)
    generator = torch.Generator().manual_seed(3)
    for decoder in (packed, plain):
        decoder.allocate(DEVICE, dtype)
        attach(decoder, LoraConfig(r=5, lora_alpha=7, lora_dropout=0.25, target_modules=targets), seed=1)
    with torch.no_grad():
        for linear in packed.linears():
            assert isinstance(linear, Int4Linear)
            w = torch.randn(linear.out_features, linear.in_features, generator=generator) * 0.15
            four_bits.Rounding(linear.weight_packed, linear.weight_scale).copy_(w)
        twins = dict(plain.named_parameters())
        for name, parameter in packed.named_parameters():
            values = torch.randn(parameter.shape, generator=generator) * 0.15
            parameter.copy_(values + 1 if parameter.ndim == 1 else values)
            twins[name].copy_(parameter)
        for one, other in zip(packed.linears(), plain.linears(), strict=True):
            other.weight.copy_(one.weight)
    return packed.train(), plain.train()


@pytest.mark.parametrize(
    ("targets", "kernel", "keep", "group", "late"),
    [
        (QKVO, "short", False, 64, False),
        (QKVO, "masked", False, 32, True),
        ("all-linear", "masked", True, 64, True),
        (("down_proj", "gate_proj"), "masked", False, 64, False),
    ],
)
def test_layers_by_hand_over_four_bits(
    targets: tuple[str, ...] | str, kernel: str, keep: bool, group: int, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32: values and gradients are those of plain layers over the same numbers. late: also where all work of the
    second stream comes as late as it may."""
    packed, plain = packed_decoder(targets, group)
    want, want_grads = run(plain, layout_of("masked"), True)
    if late and DEVICE.type != "cuda":
        monkeypatch.setattr(fused, "Beside", Late)
        monkeypatch.setattr(fused_ops, "SPLIT", 1)
    packed.stack = FusedStack(packed, keep)
    got, got_grads = run(packed, layout_of(kernel), True)
    assert far(got, want) < 5e-6
    assert max(far(g, w) for g, w in zip(got_grads, want_grads, strict=True)) < 1e-5


def test_plain_layers_over_four_bits() -> None:
    """Values and gradients of plain layers, which form each weight again for backward, and keep none."""
    packed, plain = packed_decoder(QKVO)
    want, want_grads = run(plain, layout_of("masked"), True)
    got, got_grads = run(packed, layout_of("masked"), True)
    assert far(got, want) < 5e-6
    assert max(far(g, w) for g, w in zip(got_grads, want_grads, strict=True)) < 5e-6
    linear = packed.linears()[0]
    held: list[Tensor] = []
    x = torch.randn(3, linear.in_features, device=DEVICE, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        linear.lora = None
        y = linear(x)
    assert torch.equal(y, F.linear(x, linear.weight))
    assert all(t.shape != linear.weight.shape for t in held)


def test_an_update_reaches_the_next_pass() -> None:
    """What was formed in an earlier pass, with an earlier B beside it, is not taken for this one's."""
    packed, plain = packed_decoder(QKVO)
    stack = packed.stack = FusedStack(packed, keep=False)
    run(packed, layout_of("masked"), True)  # leaves the first layer's weights behind
    with torch.no_grad():
        stack.flat.mul_(1.5)
        for linear in plain.linears():
            if linear.lora is not None:
                linear.lora.A.mul_(1.5)
                linear.lora.B.mul_(1.5)
    stack.refresh()
    got, _ = run(packed, layout_of("masked"), True)
    want, _ = run(plain, layout_of("masked"), True)
    assert far(got, want) < 5e-6


@pytest.mark.parametrize("targets", [QKVO, "all-linear"])
def test_kernels_compiled_early_are_those_that_run(
    targets: tuple[str, ...] | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `fused_compile` launches on `meta` has the constants and dtypes of a pass over real tensors."""
    decoder, _ = packed_decoder(targets)
    assert decoder.lora_config is not None
    seen = launches_of((four_bits, fused_ops, attention_kernels, kernels), monkeypatch)
    decoder.stack = FusedStack(decoder, keep=False)
    run(decoder, layout_of("short"), True)
    ran = set(seen)
    seen.clear()
    with torch.no_grad():
        launch_all(decoder.config, torch.float32, decoder.lora_config, len(LENGTHS), False, decoder.rounded)
    assert ran == {one for one in seen if one[0] != "_cross_entropy"}
    assert any(one[0] == "_form" for one in ran)


def test_what_is_not_done_by_hand_is_said() -> None:
    """Groups that the kernels' tiles don't hold."""
    decoder, _ = packed_decoder(QKVO)
    assert why_not(decoder) == ""
    for linear in decoder.linears():
        linear.group = 192
    assert "groups" in why_not(decoder)


@pytest.mark.gpu
def test_half_precision_on_a_card() -> None:
    """bfloat16: no further from float32 over the same numbers than plain layers are."""
    packed, plain = packed_decoder(QKVO, dtype=torch.bfloat16)
    exact, exact_grads = run(copy.deepcopy(plain).float(), layout_of("masked"), True)
    near, near_grads = run(plain, layout_of("masked"), True)
    packed.stack = FusedStack(packed, keep=False)
    got, got_grads = run(packed, layout_of("short"), True)
    assert far(got, exact) < 1.2 * far(near, exact)
    for one, other, true in zip(got_grads, near_grads, exact_grads, strict=True):
        assert far(one, true) < 1.2 * far(other, true) + 1e-3
