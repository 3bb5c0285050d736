"""A decode step of several rows: seven launches a layer, products by hand where the card has room for their tiles.

`DecodeStep.run` calls `run` for what lies between the embedding and the scores. Products are `_gemm`'s in half
precision on cards with enough shared memory, the library's elsewhere, and `_gemm4`'s with four-bit weights. Legend as
in `decode`; R parts of a product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from minitune.model import decode_rows_kernels as rk
from minitune.model import kernels
from minitune.model.decoder import Linear
from minitune.model.fused_ops import next_power_of_2
from minitune.model.quantized import Int4Linear

if TYPE_CHECKING:
    from minitune.model.decode import DecodeStep

HEAD_ROWS = 32  # from which on the library's wider tiles read the head faster
NORM_WARPS = 16
ROOM = 200 << 10  # bytes of shared memory that the largest tile takes


class Tile(NamedTuple):
    """Outputs and inputs of a program's tile (0: a group of four-bit weights), programs that share the inputs (of `o`
    and `down` alone), warps, stages under way, and inputs asked for early. `bench/decode_rows.py` compares them on a
    card."""

    outputs: int
    inputs: int = 0
    splits: int = 1
    warps: int = 4
    stages: int = 4
    early: int = 512


# By rows, the largest that is not above.
TILES: dict[str, dict[int, Tile]] = {
    "qkv": {1: Tile(64, 128, warps=8, early=0), 32: Tile(64, 64, stages=8, early=0)},
    "o": {1: Tile(32, 128, 3, early=0), 32: Tile(64, 128, 3, early=256)},
    "gate_up": {1: Tile(32, 128, early=1024), 32: Tile(64, 64, stages=5, early=0)},
    "down": {1: Tile(64, 128, 3, early=0), 32: Tile(64, 128, 3, stages=6, early=256)},
    "head": {1: Tile(64, 128, early=0), 32: Tile(64, 64, stages=5, early=0)},
    "qkv, 4 bits": {1: Tile(32, warps=2), 32: Tile(32, stages=3)},
    "o, 4 bits": {1: Tile(64, 0, 6), 32: Tile(64, 0, 6, stages=3)},
    "gate_up, 4 bits": {1: Tile(32, warps=2), 32: Tile(32, stages=3)},
    "down, 4 bits": {1: Tile(32, 0, 5), 32: Tile(64, 0, 5, stages=3)},
}


def own(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products are computed by `_gemm` (off a card, where tests run, always)."""
    if device.type != "cuda":
        return True
    room = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)
    return dtype.itemsize == 2 and room >= ROOM


def tile_of(name: str, rows: int) -> Tile:
    table = TILES[name]
    return table[max(least for least in table if least <= rows)]


def most_parts(rows: int) -> int:
    return max(tile_of(name, rows).splits for name in TILES)


def run(step: DecodeStep, long: bool, adapters: bool) -> None:
    """x [B, H], the embeddings -> `logits`."""
    decoder = step.decoder
    back: Tensor | None = None
    for index, layer in enumerate(step.layers):
        _add_norm(step, back, layer.attn_norm)
        _product(step, "qkv", layer.attn.qkv, step.n, step.qkv, adapters)
        step._attend(index, long)
        back = _back(step, "o", layer.attn.o, step.y, adapters)
        _add_norm(step, back, layer.mlp_norm)
        if _ours(step, layer.mlp.gate_up, adapters):
            _multiply(step, "gate_up", step.n, layer.mlp.gate_up, step.act, silu=True)
        else:
            _product(step, "gate_up", layer.mlp.gate_up, step.n, step.gate_up, adapters)
            step._silu_mul()
        back = _back(step, "down", layer.mlp.down, step.act, adapters)
    _add_norm(step, back, decoder.norm)
    head, scaling = decoder.head_weight, decoder.config.logits_scaling
    if step.own and step.rows < HEAD_ROWS:
        _gemm(step, "head", step.n, head, step.scores, 1 / scaling)
    else:
        torch.div(step.n, scaling, out=step.h)
        torch.mm(step.h, kernels.with_padding(head, decoder.padding).t(), out=step.logits)


def _ours(step: DecodeStep, linear: Linear, adapters: bool) -> bool:
    """Whether a kernel of ours gives the final value of a product: no adapter is added to it."""
    return (step.own or isinstance(linear, Int4Linear)) and not (adapters and linear.lora is not None)


def _add_norm(step: DecodeStep, back: Tensor | None, norm: Any) -> None:
    """x += the residual multiplier · the sum of back [R, B, H]; n = norm(x)."""
    hidden, parts = step.x.shape[1], 0 if back is None else back.shape[0]
    kernels.launch(
        rk._add_norm, (step.rows,),
        step.x, step.x if back is None else back, norm.weight, step.n, step.rows,
        step.decoder.config.residual_multiplier, norm.eps,
        H=hidden, BH=next_power_of_2(hidden), PARTS=parts, PDL=step.pdl, num_warps=NORM_WARPS, **step.more,
    )  # fmt: skip


def _back(step: DecodeStep, name: str, linear: Linear, x: Tensor, adapters: bool) -> Tensor:
    """x wᵀ [R, B, H], with each row's adapter, in as many parts as it was computed in."""
    splits = tile_of(named(name, linear), step.rows).splits
    if splits > 1 and _ours(step, linear, adapters):
        _multiply(step, name, x, linear, step.parts[:splits])
        return step.parts[:splits]
    _product(step, name, linear, x, step.back, adapters)
    return step.back[None]


def _product(step: DecodeStep, name: str, linear: Linear, x: Tensor, y: Tensor, adapters: bool) -> None:
    """y = x wᵀ, with each row's adapter."""
    if step.own or isinstance(linear, Int4Linear):
        _multiply(step, name, x, linear, y)
    else:
        torch.mm(x, linear.weight.t(), out=y)
    if adapters and linear.lora is not None:
        stacked: Callable[[Tensor, Tensor], Tensor] = linear.lora  # type: ignore[assignment]
        # by a kernel: in a recorded graph, what is to start early has to follow one, not a memory copy
        torch.mul(stacked(x, y), 1, out=y)


def named(name: str, linear: Linear) -> str:
    """A product in `TILES`."""
    return f"{name}, 4 bits" if isinstance(linear, Int4Linear) else name


def _multiply(step: DecodeStep, name: str, x: Tensor, linear: Linear, y: Tensor, silu: bool = False) -> None:
    """y [B, O] = x wᵀ, or with silu silu(gate) · up; y [R, B, O]: in R parts."""
    if not isinstance(linear, Int4Linear):
        return _gemm(step, name, x, linear.weight, y, 1.0, silu)
    tile, (rows, outputs), splits, most = _sizes(step, named(name, linear), y)
    kernels.launch(
        rk._gemm4, (-(-outputs // tile.outputs), splits),
        x, linear.weight_packed, linear.weight_scale, y, rows, outputs, y.stride(-2),
        FULL=rows == most, X=x.shape[1], GROUP=x.shape[1] // linear.weight_scale.shape[1], SILU=silu, SPLITS=splits,
        BM=most, BN=tile.outputs, PDL=step.pdl, num_warps=tile.warps, num_stages=tile.stages, **step.more,
    )  # fmt: skip


def _sizes(step: DecodeStep, name: str, y: Tensor) -> tuple[Tile, tuple[int, int], int, int]:
    """The tile, (B, O), parts, and the rows of a tile."""
    rows, outputs = y.shape[-2:]
    return tile_of(name, step.rows), (rows, outputs), y.shape[0] if y.ndim == 3 else 1, max(16, next_power_of_2(rows))


def _gemm(step: DecodeStep, name: str, x: Tensor, weight: Tensor, y: Tensor, gain: float, silu: bool = False) -> None:
    """As `_multiply`, times gain, by a weight that is no linear's."""
    tile, (rows, outputs), splits, most = _sizes(step, name, y)
    kernels.launch(
        rk._gemm, (-(-outputs // tile.outputs), splits),
        x, weight, y, weight.stride(0), rows, outputs, y.stride(-2), gain,
        FULL=rows == most, X=x.shape[1], SILU=silu, SPLITS=splits, BM=most, BN=tile.outputs,
        BK=tile.inputs, EARLY=min(tile.early, next_power_of_2(x.shape[1])), PDL=step.pdl,
        num_warps=tile.warps, num_stages=tile.stages, **step.more,
    )  # fmt: skip
