"""Times the fused kernels of a LoRA layer on a card, tile by tile: what `fused_ops.TILES` should say.

    python bench/tune_kernels.py [--tokens 832] [--lengths ../shared/bench/huanhuan_lengths.json]

Each candidate runs forty times (a model's layers) in one CUDA graph; microseconds a launch are printed, the best
marked. Then the multiplications of a layer, with and without strips, for the share that is theirs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import torch

from minitune.model import attention_kernels, fused_ops
from minitune.model.decoder import Linear, RMSNorm
from minitune.model.fused import row_table
from minitune.model.fused_ops import TILES, Slot, Tile
from minitune.model.lora import Lora, LoraConfig

H, F, HEADS, D = 2304, 5760, 36, 64
LENGTHS = Path(__file__).resolve().parents[2] / "shared" / "bench" / "huanhuan_lengths.json"
CANDIDATES = {
    "norm_in": [Tile(1, 0, w) for w in (2, 4, 8)],
    "strip": [Tile(r, c, w) for r in (16, 32) for c in (64, 128, 256) for w in (2, 4, 8)],
    "norm_back": [Tile(r, c, w) for r in (16, 32, 64) for c in (64, 128, 256) for w in (2, 4, 8)],
    "input_back": [Tile(r, 0, w) for r in (16, 32, 64) for w in (2, 4)],
    "silu_mul": [Tile(1, c, w) for c in (512, 1024, 2048) for w in (2, 4, 8)],
    "silu_mul_back": [Tile(r, c, w) for r in (1, 4, 16) for c in (128, 512, 1024) for w in (4, 8)],
    "grads": [Tile(r, c, w) for r in (32, 64, 128) for c in (16, 32, 64, 128) for w in (4, 8)],
}


def slot_of(parts: dict[str, int], inputs: int) -> Slot:
    linear = Linear(inputs, parts, "x").to("cuda", torch.bfloat16)
    linear.lora = Lora(linear.parts, sum(parts.values()), inputs, LoraConfig(), 7).cuda()
    wide = torch.randn(sum(parts.values()), inputs + 64, device="cuda", dtype=torch.bfloat16) * 0.02
    slot = Slot(linear, wide, row_table(linear))
    slot.a = torch.randn(linear.lora.A.shape, device="cuda", dtype=torch.bfloat16)
    slot.da, slot.db = torch.zeros_like(linear.lora.A.data), torch.zeros_like(linear.lora.B.data)
    return slot


def microseconds(call: Callable[[], object], times: int = 40) -> float:
    """A launch's time inside a graph of `times` of them."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            call()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    start.record()
    for _ in range(5):
        graph.replay()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) * 1e3 / times / 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=832)
    parser.add_argument("--lengths", default=str(LENGTHS))
    arguments = parser.parse_args()
    T = arguments.tokens
    print(torch.cuda.get_device_name(), f"{T} tokens")

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    qkv = slot_of({"q_proj": H, "k_proj": H, "v_proj": H}, H)
    o, bare = (
        slot_of({"o_proj": H}, H),
        Slot(Linear(H, {"up_proj": 2 * F}, "x").to("cuda", torch.bfloat16), made(1, H), None),
    )
    down = Slot(Linear(F, {"down_proj": H}, "x").to("cuda", torch.bfloat16), made(1, F), None)
    norm = RMSNorm(H, 1e-5).to("cuda", torch.bfloat16)
    drop = torch.randint(-(2**31), 2**31 - 1, (2 + T,), device="cuda", dtype=torch.int32)
    drop[0], drop[1] = int(0.1 * 2**32) - 2**31, torch.tensor(1 / 0.9).view(torch.int32)
    x, y, n, wide_y, gate_up, act = made(T, H), made(T, H), made(T, H + 64), made(T, 3 * H), made(T, 2 * F), made(T, F)
    counts = fused_ops.Counts(torch.device("cuda"))
    rstd, along = torch.rand(T, device="cuda"), torch.rand(1, T, device="cuda")
    calls: dict[str, Callable[[], object]] = {
        "norm_in": lambda: fused_ops.norm_in(x, y, 0.2, norm, qkv),
        "strip": lambda: fused_ops.strip(n, o, drop, counts),
        "norm_back": lambda: fused_ops.norm_back(y, n, qkv, drop, x, rstd, norm, along),
        "input_back": lambda: fused_ops.input_back(n, n, o, drop, 0.2, D),
        "silu_mul": lambda: fused_ops.silu_mul(gate_up, down),
        "silu_mul_back": lambda: fused_ops.silu_mul_back(gate_up, act, down, None, 0.2, False),
        "grads": lambda: fused_ops.grads(wide_y, n, n, qkv, drop, 1.0),
    }
    total = 0.0
    for name, call in calls.items():
        kept, found = TILES[name], {}
        for tile in CANDIDATES[name]:
            TILES[name] = tile
            try:
                found[tile] = microseconds(call)
            except Exception as error:  # too much shared memory: not a candidate
                print(f"  {name} {tile}: {type(error).__name__}")
        TILES[name] = kept
        best = min(found, key=found.__getitem__)
        total += found[best]
        print(f"{name:14s} now {found.get(kept, float('nan')):6.1f}  best {found[best]:6.1f} us {tuple(best)}")
        print("   " + "  ".join(f"{tuple(t)}:{us:.1f}" for t, us in sorted(found.items(), key=lambda p: p[1])[:6]))
    lora_free = {
        "norm_in, no adapter": lambda: fused_ops.norm_in(x, y, 0.2, norm, bare),
        "norm_back, no adapter": lambda: fused_ops.norm_back(y, made_h, bare, None, x, rstd, norm, None),
        "grads of o": lambda: fused_ops.grads(y, n, n, o, drop, 0.2),
    }
    made_h = made(T, H)
    for name, call in lora_free.items():
        print(f"{name:22s} {microseconds(call):6.1f} us")
    attention(arguments, wide_y)
    for name, rows, inputs, outputs in (
        ("qkv", T, H, 3 * H), ("o", T, H, H), ("gate_up", T, H, 2 * F), ("down", T, F, H),
        ("qkv strip", T, H + 64, 3 * H), ("o strip", T, H + 64, H),
    ):  # fmt: skip
        a, w, dy = made(rows, inputs), made(outputs, inputs), made(rows, outputs)
        there, back = microseconds(lambda a=a, w=w: torch.mm(a, w.t())), microseconds(lambda d=dy, w=w: torch.mm(d, w))
        if "strip" in name:
            out, at = made(rows, inputs), inputs - 64

            def apart(d: torch.Tensor = dy, w: torch.Tensor = w, out: torch.Tensor = out, at: int = at) -> None:
                torch.mm(d, w[:, :at], out=out[:, :at])
                torch.mm(d, w[:, at:], out=out[:, at:])

            print(f"mm {name:10s} backward in two parts {microseconds(apart):6.1f} us")
        flops = 2 * rows * inputs * outputs / 1e6
        speed = f"{flops / there:4.0f} and {flops / back:4.0f} TFLOP/s"
        print(f"mm {name:10s} forward {there:6.1f}  backward {back:6.1f} us, {speed}")


def attention(arguments: argparse.Namespace, qkv: torch.Tensor) -> None:
    """Both directions over documents of the real lengths, for each tile height."""
    T = arguments.tokens
    lengths, left = [], T
    for prompt, answer in json.loads(Path(arguments.lengths).read_text(encoding="utf-8")):
        lengths.append(min(left, prompt + answer))
        left -= lengths[-1]
        if not left:
            break
    cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).cuda()
    cos = torch.rand(T, D // 2, device="cuda")
    out, dout = (torch.empty(T, HEADS * D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    delta = torch.rand(HEADS, T, device="cuda")
    kept = attention_kernels.BLOCK, dict(attention_kernels.OPTIONS)
    for block, warps, registers in product((32, 64), (2, 4, 8), (0, 128, 168)):
        options = {"num_warps": warps, "num_stages": 1} | ({"maxnreg": registers} if registers else {})
        attention_kernels.BLOCK, attention_kernels.OPTIONS = block, {"forward": options, "backward": options}

        def forward() -> torch.Tensor:
            return attention_kernels.attend_forward(qkv, cos, cos, cu, out, HEADS, HEADS, 0.125)

        def backward(lse: torch.Tensor) -> object:
            return attention_kernels.attend_backward(dout, qkv, cos, cos, cu, delta, lse, HEADS, HEADS, 0.125)

        try:
            lse = forward()
            there, back = microseconds(forward), microseconds(partial(backward, lse))
            print(f"attention {block:4d} {options}: forward {there:6.1f}  backward {back:6.1f} us")
        except Exception as error:
            print(f"attention {block} {options}: {type(error).__name__}")
    attention_kernels.BLOCK, attention_kernels.OPTIONS = kept


if __name__ == "__main__":
    main()
