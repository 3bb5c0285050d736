"""Tiles of a decode step of several rows on a card, at MiniCPM-2B's shape: what `decode_rows.TILES` should say.

    python bench/decode_rows.py [--int4] [--rows 64,4] [--seconds 60] [--check] [--answers]

Each product by itself first, forty launches (the layers') in one graph; then its best three in whole steps, one product
after the other, since what a program asks for early pays off only beside the kernel before it. --check and --answers:
those of `decode_card.py`, with the tiles that were found. Everything is printed in microseconds, the best first.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from decode_card import attempt, check, decoder_of, held, microseconds, rate, requests, table_of, tokenizer

from minitune.infer.engine import Engine
from minitune.model import decode, decode_rows, kernels
from minitune.model.decode import DecodeStep, Split
from minitune.model.decode_rows import TILES, Tile
from minitune.model.decoder import Decoder

FOUR = [Tile(n, 0, 1, w, s) for n, w, s in (
    (16, 4, 4), (16, 2, 4), (32, 2, 4), (32, 4, 4), (64, 4, 3), (64, 8, 3), (32, 4, 3), (64, 4, 2),
)]  # fmt: skip
CANDIDATES: dict[str, dict[int, list[Tile]]] = {
    "qkv": {
        1: [Tile(64, 128, warps=8), Tile(64, 256, stages=3), Tile(32, 128, stages=5), Tile(64, 256, 1, 8, 4)],
        32: [Tile(64, 64, stages=8), Tile(64, 128), Tile(32, 128), Tile(64, 256, stages=3), Tile(64, 256, 1, 8, 3),
             Tile(64, 128, stages=6)],
    },
    "o": {
        1: [Tile(32, 128, 3), Tile(64, 128, 3), Tile(32, 128, 2), Tile(64, 64, 4, stages=6)],
        32: [Tile(64, 64, 3, stages=8), Tile(64, 128, 3), Tile(64, 64, 4, stages=5), Tile(64, 256, 3, stages=3)],
    },
    "gate_up": {
        1: [Tile(32, 128), Tile(32, 256, stages=3), Tile(64, 128), Tile(16, 256)],
        32: [Tile(64, 64, stages=5), Tile(64, 64, stages=8), Tile(64, 128, stages=3), Tile(64, 128), Tile(32, 128),
             Tile(32, 128, stages=3), Tile(32, 256, 1, 8, 3), Tile(64, 64, 1, 8, 8)],
    },
    "down": {
        1: [Tile(64, 128, 3), Tile(32, 128, 3), Tile(64, 64, 5, stages=6), Tile(64, 128, 5)],
        32: [Tile(64, 64, 3, stages=8), Tile(64, 128, 3), Tile(64, 128, 3, stages=6), Tile(64, 256, 3, stages=3)],
    },
    "head": {
        1: [Tile(64, 128), Tile(64, 256, stages=3)],
        32: [Tile(64, 64, stages=5)],
    },
    "qkv, 4 bits": {1: FOUR[:6], 32: FOUR[4:]},
    "o, 4 bits": {1: [Tile(n, 0, r) for n in (32, 64) for r in (3, 6)], 32: [Tile(64, 0, r, 4, 3) for r in (3, 6)]},
    "gate_up, 4 bits": {1: FOUR[:6], 32: FOUR[4:]},
    "down, 4 bits": {1: [Tile(n, 0, r) for n in (32, 64) for r in (3, 5)], 32: [Tile(64, 0, r, 4, 3) for r in (3, 5)]},
}  # fmt: skip
EARLY = (0, 256, 1024)
ATTEND = [Split(64, 1, 4), Split(32, 1, 4), Split(16, 1, 2, 3), Split(16, 1, 2, 4), Split(16, 1, 2, 6), Split(16, 1, 2),
          Split(16, 1, 1), Split(32, 1, 2, 2), Split(32, 1, 2, 3), Split(32, 1, 4, 2), Split(64, 1, 4, 2),
          Split(8, 1, 1, 4)]  # fmt: skip


def step_of(decoder: Decoder, rows: int) -> DecodeStep:
    """A step of contexts of 190 tokens."""
    cache, columns = held(decoder, rows, 190)
    step = DecodeStep(decoder, cache, columns, rows, 4096)
    step.slot_B.copy_(torch.arange(rows))
    step._enter()
    columns.position_S[:rows] = 190
    return step


def whole(decoder: Decoder, rows: int) -> float:
    step = step_of(decoder, rows)
    return microseconds(lambda: step.run(False))


def products(step: DecodeStep) -> dict[str, tuple[Callable[[], object], int, float]]:
    """name: (what runs it in every layer, launches, bytes of a launch)."""
    layers, head = step.layers, step.decoder.head_weight

    def all_layers(name: str, part: str, x: torch.Tensor, y: torch.Tensor) -> None:
        for layer in layers:
            linear = getattr(getattr(layer, part), name)
            splits = decode_rows.tile_of(decode_rows.named(name, linear), step.rows).splits
            to = step.parts[:splits] if splits > 1 else y
            decode_rows._multiply(step, name, x, linear, to, silu=name == "gate_up")

    found: dict[str, tuple[Callable[[], object], int, float]] = {}
    for name, part, x, y in (
        ("qkv", "attn", step.n, step.qkv), ("o", "attn", step.y, step.back),
        ("gate_up", "mlp", step.n, step.act), ("down", "mlp", step.act, step.back),
    ):  # fmt: skip
        linear = getattr(getattr(layers[0], part), name)
        size = float(sum(t.numel() * t.itemsize for t in (*linear.parameters(), *linear.buffers())))
        found[decode_rows.named(name, linear)] = partial(all_layers, name, part, x, y), len(layers), size
    run = partial(decode_rows._gemm, step, "head", step.n, head, step.scores, 1.0)
    found["head"] = run, 1, head.numel() * 2.0
    return found


def set_tile(name: str, rows: int, tile: Tile) -> None:
    TILES[name][max(least for least in TILES[name] if least <= rows)] = tile


def compile_all(decoder: Decoder, rows: int, wanted: dict[str, list[Tile]]) -> None:
    """All at once, on all processors."""
    start = time.perf_counter()
    for name, tiles in wanted.items():
        kept = decode_rows.tile_of(name, rows)
        with ThreadPoolExecutor(16) as pool:
            try:
                with kernels.compiling(pool):
                    for tile in tiles:
                        set_tile(name, rows, tile)
                        step = DecodeStep(decoder, *held(decoder, rows, 64), rows, 128)
                        step.layers = step.layers[:1]
                        products(step)[name][0]()
            except Exception as error:  # the one that is at fault is named when it is tried
                print(f"   compiling {name}: {type(error).__name__}: {str(error)[:80]}")
        set_tile(name, rows, kept)
    print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)


def candidates(name: str, rows: int) -> list[Tile]:
    by_rows = CANDIDATES[name]
    return by_rows[max(least for least in by_rows if least <= rows)]


@torch.inference_mode()
def tune(decoder: Decoder, rows: int, seconds: float) -> None:
    names = list(products(step_of(decoder, rows)))
    compile_all(decoder, rows, {name: candidates(name, rows) for name in names})
    start = time.perf_counter()
    print(f"{rows} rows: step {whole(decoder, rows):.0f} us", flush=True)
    best = {name: by_itself(decoder, rows, name) for name in names}
    for name in names:
        choose(decoder, rows, name, best[name][:3], start + seconds)
    early = {}
    for name in names:
        kept = decode_rows.tile_of(name, rows)
        if kept.inputs:
            early[name] = [kept, *(kept._replace(early=inputs) for inputs in EARLY)]
    compile_all(decoder, rows, early)
    for name, tiles in early.items():
        choose(decoder, rows, name, tiles, start + seconds)
    found = {}
    for warps in (4, 8, 16):
        decode_rows.NORM_WARPS = warps
        found[warps] = whole(decoder, rows)
    decode_rows.NORM_WARPS = min(found, key=found.__getitem__)
    print(f"{rows} rows, warps of a norm: {found}")
    print(f"{rows} rows, found: { {name: tuple(decode_rows.tile_of(name, rows)) for name in names} }")


def by_itself(decoder: Decoder, rows: int, name: str) -> list[Tile]:
    """The candidates, the fastest first; it is set."""
    found: dict[Tile, float] = {}
    kept = decode_rows.tile_of(name, rows)
    size = 0.0
    for tile in candidates(name, rows):
        set_tile(name, rows, tile)
        call, count, size = products(step_of(decoder, rows))[name]
        try:
            found[tile] = microseconds(call, count)
        except Exception as error:  # too much shared memory: no candidate
            print(f"   {name} {tuple(tile)}: {type(error).__name__}: {str(error)[:80]}")
    order = sorted(found, key=found.__getitem__) or [kept]
    set_tile(name, rows, order[0])
    print(f"{rows:2d} {name:8s} {size / min(found.values(), default=1.0) / 1e3:5.0f} GB/s; "
          + "  ".join(f"{tuple(t)[:5]}:{found[t]:.1f}" for t in order if t in found), flush=True)  # fmt: skip
    return order


def choose(decoder: Decoder, rows: int, name: str, tiles: list[Tile], end: float) -> None:
    """The one with which whole steps are shortest."""
    found = {}
    for tile in tiles:
        if time.perf_counter() < end or not found:
            set_tile(name, rows, tile)
            found[tile] = whole(decoder, rows)
    order = sorted(found, key=found.__getitem__)
    set_tile(name, rows, order[0])
    print(f"{rows:2d} rows, step by {name}: " + "  ".join(f"{tuple(t)}:{found[t]:.0f}" for t in order), flush=True)


@torch.inference_mode()
def attention(decoder: Decoder, rows: int) -> None:
    """By itself, and whole steps."""
    kept, found = decode.ATTEND, []
    for split in ATTEND:
        decode.ATTEND = {1: split}
        step = step_of(decoder, rows)
        us = microseconds(lambda s=step: [s._attend(i, False) for i in range(len(s.layers))], len(step.layers))
        found.append((whole(decoder, rows), us, split))
    found.sort()
    decode.ATTEND = kept | {rows: found[0][2]}
    print(f"{rows} rows, attend (step, by itself): " + "  ".join(f"{tuple(s)}:{w:.0f},{us:.1f}" for w, us, s in found))


@torch.inference_mode()
def answers(decoder: Decoder) -> None:
    engine = Engine(decoder, tokenizer(), slots=64, cache_tokens=64 * 384)
    start = time.perf_counter()
    while engine._prepare():
        pass
    print(f"all graphs recorded in {time.perf_counter() - start:.1f} s, plain {engine.plainly or 'no'}")
    for count, length, tokens in ((64, 128, 128), (64, 64, 128), (16, 128, 128), (4, 128, 128), (1, 32, 224)):
        rate(engine, requests(count, length, 16, first=2000))
        best = max(rate(engine, requests(count, length, tokens, first=3000 + 100 * turn)) for turn in range(3))
        print(f"{count:2d} at once, prompt {length}, answer {tokens}: {best:8.0f} tok/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="64,4")
    parser.add_argument("--seconds", type=float, default=60.0, help="of whole steps tried, for each number of rows")
    parser.add_argument("--int4", action="store_true", help="four-bit weights")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--answers", action="store_true")
    arguments = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    decoder, name = decoder_of(arguments.int4), "int4" if arguments.int4 else "bf16"
    if arguments.check:
        attempt("check", lambda: check(decoder, name))
    for rows in [int(part) for part in arguments.rows.split(",") if part]:
        attempt(f"attention of {rows}", lambda rows=rows: attention(decoder, rows))
        attempt(f"tune {rows}", lambda rows=rows: tune(decoder, rows, arguments.seconds))
        with torch.inference_mode():
            attempt("table", lambda rows=rows: table_of(step_of(decoder, rows)))
    if arguments.check:
        attempt("check", lambda: check(decoder, name))
    if arguments.answers:
        attempt("answers", lambda: answers(decoder))


if __name__ == "__main__":
    main()
