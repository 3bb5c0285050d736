"""Weights in the order in which a CPU multiplies them fastest, for a decoder that only answers.

torch hands float32 to MKL, which leaves half of an AMD processor unused and reorders small batches badly, and lets
oneDNN reorder a bfloat16 weight at each call. oneDNN with weights reordered once is faster in both, and computes each
row by itself: a row's result has the same bits in any batch (tests/model/test_packed_weights.py). The operator has no
gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from minitune.model.decoder import Decoder

ROWS = 8  # the batch that oneDNN is told to expect; it hardly matters


def multiply(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """x · weightᵀ -> [T, O]."""
    if weight_OI.is_mkldnn:
        if x_TI.shape[0] == 1:  # one row is summed in another order; two take no longer
            return multiply(x_TI.expand(2, -1), weight_OI)[:1]
        return torch.ops.mkldnn._linear_pointwise(x_TI, weight_OI, None, "none", [], "")
    return F.linear(x_TI, weight_OI)


def packable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies this dtype here."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def packed(weight_OI: Tensor) -> Tensor:
    """The same weight, reordered; `to_dense()` gives it back exactly."""
    return torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), ROWS)


@torch.no_grad()
def pack(decoder: Decoder) -> None:
    """Reorders the linears' weights, which can't be cut or changed afterwards; the head gets a second, packed copy,
    since the embedding needs the plain one. Does nothing where it does not apply, nor to a decoder that learns."""
    if not packable(decoder.device, decoder.dtype) or decoder.training or decoder.head_packed is not None:
        return
    if any(p.requires_grad for p in decoder.parameters()):
        return
    for linear in decoder.linears():
        if "weight" in linear._parameters:  # a quantised one forms its weight anew at each look
            linear.weight = nn.Parameter(packed(linear.weight), requires_grad=False)
    decoder.head_packed = packed(decoder.head_weight)
