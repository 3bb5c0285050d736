"""Four-bit base weights, in the form that compressed-tensors, vLLM and `transformers` call W4A16.

Symmetric whole numbers of -8 to 7 in groups along a row, one scale a group, no zero point:
weight[o, i] ≈ q[o, i] · scale[o, i // group]. Eight numbers lie in an int32, the lowest bits first, each plus 8.
Legend: T tokens, O outputs, I inputs, G groups in a row.

The linear here is the plain twin: it forms the weight and multiplies. A kernel that reads the packed form stands
beside it where there is one, and is tested against it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitune.model import kernels
from minitune.model.decoder import Decoder, Linear
from minitune.model.lora import Dropout

LOW, HIGH, PER_WORD = -8, 7, 8
PIECE = 1 << 17  # weights searched at a time: what a processor's cache holds, three times as fast as a matrix at once
GROUPS = (128, 64, 32)  # what kernels elsewhere take


def pack(q_OI: Tensor) -> Tensor:
    """int8 of -8 to 7, [O, I] -> int32 [O, I / 8]."""
    pairs = (q_OI + 8).to(torch.uint8).view(q_OI.shape[0], -1, 2)
    return (pairs[..., 0] | pairs[..., 1] << 4).contiguous().view(torch.int32)


def unpack(packed: Tensor) -> Tensor:
    """int32 [O, I / 8] -> int8 of -8 to 7, [O, I]."""
    pairs = packed.contiguous().view(torch.uint8)
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1).to(torch.int8) - 8


def dequantize(packed: Tensor, scale_OG: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The weight [O, I] in `dtype`, by default the scales' own: one product each, as compressed-tensors forms it."""
    dtype = dtype or scale_OG.dtype
    if packed.is_cuda and not kernels.why_not(packed.device):
        return unpacked_by_kernel(packed, scale_OG, dtype)
    q_OGg = unpack(packed).view(*scale_OG.shape, -1)
    return (q_OGg.to(dtype) * scale_OG.to(dtype)[..., None]).flatten(1)


def unpacked_by_kernel(packed: Tensor, scale_OG: Tensor, dtype: torch.dtype) -> Tensor:
    """As `dequantize`, in one pass: a prompt's layers form each weight once."""
    from minitune.model.decode_kernels import _dequantize

    out = torch.empty(packed.shape[0], packed.shape[1] * PER_WORD, dtype=dtype, device=packed.device)
    group, some = out.shape[1] // scale_OG.shape[1], 16
    scale_OG = scale_OG.to(dtype).contiguous()
    _dequantize[(-(-scale_OG.numel() // some),)](
        packed.contiguous().view(torch.uint8), scale_OG, out, out.numel(), GROUP=group, BG=some, num_warps=4
    )
    return out


def quantize(
    weight_OI: Tensor, group: int, scale_dtype: torch.dtype, moments_I: Tensor | None = None, steps: int = 16
) -> tuple[Tensor, Tensor]:
    """(packed [O, I / 8], scales [O, I / group] in `scale_dtype`) of a weight, rounded to nearest.

    Each group's scale is the one of least squared error among those that bring its largest weight just within reach
    (7, or -8 with a scale of the other sign, as GGUF's Q4_0 has it) down to those that cut it, then bettered once by
    least squares. moments_I: the mean square of each input; an error is weighted by it, so that what is kept is the
    output, not the weight. Without it, larger weights count more. Candidates are rounded to `scale_dtype` first: the
    search sees what is stored.
    """
    rows = max(1, PIECE // weight_OI.shape[1])
    found = [_quantize(w_OI, group, scale_dtype, moments_I, steps) for w_OI in weight_OI.split(rows)]
    return torch.cat([packed for packed, _ in found]), torch.cat([scale for _, scale in found])


def _quantize(
    weight_OI: Tensor, group: int, scale_dtype: torch.dtype, moments_I: Tensor | None, steps: int
) -> tuple[Tensor, Tensor]:
    w = weight_OI.float().view(weight_OI.shape[0], -1, group)
    if moments_I is None:
        square = w.square()
        weight = (square.mean(-1, keepdim=True) + square).sqrt_()
    else:
        weight = (moments_I / moments_I.mean() + 1e-6).view(1, -1, group)
    best, scale = torch.full_like(w[..., 0], torch.inf), torch.ones_like(w[..., 0])
    peak = w.gather(-1, w.abs().argmax(-1, keepdim=True))[..., 0]
    reaches = [peak.abs() / (7 + 4 * i / (steps - 1)) for i in range(steps)]
    reaches += [peak / -(8 + 3 * i / (steps - 1)) for i in range(steps)]
    for at in range(len(reaches) + 1):
        if at < len(reaches):
            candidate = reaches[at]
        else:
            q = _round(w, scale)
            candidate = (weight * w * q).sum(-1) / (weight * q.square()).sum(-1).clamp(min=1e-30)
        candidate = _storable(candidate, scale_dtype)
        error = (_round(w, candidate).mul_(candidate[..., None]).sub_(w).square_() * weight).sum(-1)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, candidate, scale)
    return pack(_round(w, scale).to(torch.int8).flatten(1)), scale.to(scale_dtype)


def _round(w: Tensor, scale: Tensor) -> Tensor:
    return (w / scale[..., None]).round_().clamp_(LOW, HIGH)


def _storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to `dtype` and back; never so small that it is zero there."""
    least = torch.finfo(dtype).tiny
    return torch.where(scale.abs() < least, least, scale).to(dtype).float()


def group_size(columns: set[int]) -> int:
    """The largest group that divides every width; ValueError where none does."""
    for size in GROUPS:
        if all(width % size == 0 for width in columns):
            return size
    odd = min(width for width in columns if width % GROUPS[-1])
    raise ValueError(f"int4 needs rows of a multiple of {GROUPS[-1]} weights; this model has rows of {odd}")


class Int4Linear(Linear):
    """A decoder's linear whose weight is packed. `weight_packed` [O, I / 8], `weight_scale` [O, G] are buffers:
    they take no gradient, and a cast of the module casts the scales alone. Carries adapters as its twin does."""

    weight_packed: Tensor
    weight_scale: Tensor

    def __init__(self, like: Linear, group: int):
        nn.Module.__init__(self)
        rows, columns = like.weight.shape
        self.prefix, self.parts, self.lora, self.unmerged = like.prefix, like.parts, None, None
        self.in_features, self.out_features, self.group = columns, rows, group
        self.register_buffer("weight_packed", like.weight.new_empty(rows, columns // PER_WORD, dtype=torch.int32))
        self.register_buffer("weight_scale", like.weight.new_empty(rows, columns // group))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight [O, I], formed anew at each call; writing into it changes nothing."""
        return dequantize(self.weight_packed, self.weight_scale)

    def forward(self, x_TI: Tensor, dropout: Dropout | None = None) -> Tensor:
        y_TO: Tensor = _Product.apply(x_TI, self.weight_packed, self.weight_scale)  # type: ignore[no-untyped-call]
        return y_TO if self.lora is None else self.lora(x_TI, y_TO, dropout)


class _Product(torch.autograd.Function):
    """x Wᵀ; backward forms the weight again, so that none is kept for it."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, packed: Tensor, scale_OG: Tensor) -> Tensor:
        ctx.save_for_backward(packed, scale_OG)
        return F.linear(x_TI, dequantize(packed, scale_OG, x_TI.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        packed, scale_OG = ctx.saved_tensors
        dx = grads[0] @ dequantize(packed, scale_OG, grads[0].dtype) if ctx.needs_input_grad[0] else None
        return dx, None, None


def packed_linears(decoder: Decoder) -> list[Int4Linear]:
    """The linears that have four bits: all of the layers', or none."""
    return [linear for linear in decoder.linears() if isinstance(linear, Int4Linear)]


def is_packed(decoder: Decoder) -> bool:
    """Whether there are any."""
    return bool(packed_linears(decoder))


def quantize_linears(decoder: Decoder, group: int) -> Decoder:
    """Puts an empty `Int4Linear` in the place of each linear of the layers; embedding and head stay as they are."""
    for module in list(decoder.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Linear):
                setattr(module, name, Int4Linear(child, group))
    return decoder


def hub_settings(group: int) -> dict[str, Any]:
    """`quantization_config` of a hub's config.json, as compressed-tensors writes it."""
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group,
        "dynamic": False,
        "observer": "mse",
    }
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def group_of(hub: dict[str, Any]) -> int | None:
    """The group size of a hub config's `quantization_config`; None where there is none, ValueError for another kind."""
    settings = hub.get("quantization_config")
    if not settings:
        return None
    kind = settings.get("quant_method") or settings.get("format") or "?"
    schemes = list((settings.get("config_groups") or {}).values())
    weights = (schemes[0].get("weights") or {}) if len(schemes) == 1 else {}
    plain = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    if settings.get("format") != "pack-quantized" or any(weights.get(k) != v for k, v in plain.items()):
        raise ValueError(f"weights quantised by {kind} in this form are not supported (supported: {FORM})")
    if schemes[0].get("targets") != ["Linear"] or schemes[0].get("input_activations") or weights.get("actorder"):
        raise ValueError(f"a quantisation of some modules, of activations or in another order is not read ({FORM} is)")
    return int(weights["group_size"])


FORM = "compressed-tensors pack-quantized, 4 bits, symmetric, in groups"
