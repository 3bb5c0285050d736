"""Four-bit linears: the packed form is compressed-tensors', the scales are the best there are, the linear is its twin."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from minitune.model import quantized
from minitune.model.decoder import Decoder, DecoderConfig, Linear
from minitune.model.lora import LoraConfig, attach
from minitune.model.quantized import Int4Linear, dequantize, pack, quantize, quantize_linears, unpack


def rtn(weight: torch.Tensor, group: int) -> torch.Tensor:
    """Plain rounding, the largest weight within reach: what the search is to better."""
    w = weight.view(weight.shape[0], -1, group)
    scale = w.abs().amax(-1, keepdim=True) / 7
    return ((w / scale).round().clamp(-8, 7) * scale).flatten(1)


def test_packed_as_compressed_tensors_packs() -> None:
    """Every value in every place of a word, both ways."""
    helpers = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers", reason="compressed-tensors is not installed"
    )
    q = torch.stack([torch.arange(-8, 8, dtype=torch.int8).roll(i).repeat(4) for i in range(16)])
    assert torch.equal(pack(q), helpers.pack_to_int32(q, 4))
    assert torch.equal(unpack(pack(q)), q)
    assert torch.equal(unpack(helpers.pack_to_int32(q, 4)), q)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_are_better_than_plain_ones(scale_dtype: torch.dtype) -> None:
    """Least squares: a fifth less error than the largest weight gives; weighted by what comes in, less in the output."""
    torch.manual_seed(0)
    weight, moments = torch.randn(64, 256), torch.rand(256) ** 8 * 100
    x = torch.randn(512, 256) * moments.sqrt()
    plain = rtn(weight, 64)
    found, weighted = (
        dequantize(*quantize(weight, 64, scale_dtype, m), dtype=torch.float32) for m in (torch.ones(256), moments)
    )
    assert (found - weight).square().sum() < 0.8 * (plain - weight).square().sum()
    error = [(F.linear(x, w) - F.linear(x, weight)).square().sum().item() for w in (plain, found, weighted)]
    assert error[2] < error[1] < error[0]


def test_what_four_bits_hold_comes_back_exactly() -> None:
    """Sixteen levels times a power of two, the lowest or the highest missing, zeros alone: no error at all."""
    torch.manual_seed(1)
    q = torch.randint(-8, 8, (8, 128))
    q[:, ::32], q[3] = -8, 0
    for sign in (1, -1):
        weight = q * sign * 0.25
        packed, scale = quantize(weight, 32, torch.bfloat16)
        assert torch.equal(dequantize(packed, scale, torch.float32), weight)
        assert torch.isfinite(scale).all()


def small(group: int) -> tuple[Decoder, Decoder]:
    """A decoder in four bits, and one in float32 whose weights are the same numbers."""
    config = DecoderConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, residual_multiplier=0.4, logits_scaling=2.0,
    )  # fmt: skip
    torch.manual_seed(2)
    plain = Decoder(config).requires_grad_(False)
    for parameter in plain.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2 if parameter.ndim > 1 else torch.ones_like(parameter)
    packed = Decoder(config).requires_grad_(False)
    packed.load_state_dict(plain.state_dict())
    quantize_linears(packed, group)
    for mine, twin in zip(packed.linears(), plain.linears(), strict=True):
        assert isinstance(mine, Int4Linear)
        mine.weight_packed, mine.weight_scale = quantize(twin.weight, group, torch.float32)
        twin.weight.copy_(mine.weight)
    return packed, plain


def test_a_packed_decoder_computes_its_twin() -> None:
    """The same logits, the same adapters, parts and names; casts leave the packed words alone."""
    packed, plain = small(32)
    ids = torch.arange(24).view(2, 12)
    assert torch.equal(packed.logits(ids), plain.logits(ids))
    assert [x.parts for x in packed.linears()] == [x.parts for x in plain.linears()]
    for model in (packed, plain):
        attach(model, LoraConfig(r=2, lora_dropout=0.0, target_modules="all-linear"))
        for linear in model.linears():
            assert linear.lora is not None
            torch.manual_seed(linear.lora.B.numel())
            linear.lora.B.data.normal_()
    assert torch.equal(packed.logits(ids), plain.logits(ids))
    words = packed.linears()[0].weight_packed.clone()
    packed.to(torch.bfloat16)
    assert torch.equal(packed.linears()[0].weight_packed, words) and packed.linears()[0].weight.dtype == torch.bfloat16
    assert not any(isinstance(p, Linear) and p.weight.requires_grad for p in packed.modules())


def test_groups() -> None:
    """The largest that divides every row; a row that none divides is said."""
    assert quantized.group_size({2304, 5760}) == 128
    assert quantized.group_size({576, 1536}) == 64
    assert quantized.group_size({96, 160}) == 32
    with pytest.raises(ValueError, match="multiple of 32 weights; this model has rows of 112"):
        quantized.group_size({64, 112})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quant_method": "gptq", "format": None, "config_groups": None}, "gptq"),
        ({"format": "float-quantized"}, "not supported"),
        ({"config_groups": {}}, "not supported"),
    ],
)
def test_other_quantisations_are_refused(change: dict, words: str) -> None:
    """One line, and what is read."""
    settings = quantized.hub_settings(128) | change
    with pytest.raises(ValueError, match=words) as caught:
        quantized.group_of({"quantization_config": settings})
    assert quantized.FORM in str(caught.value) and "\n" not in str(caught.value)
    assert (
        quantized.group_of({}) is None and quantized.group_of({"quantization_config": quantized.hub_settings(64)}) == 64
    )
