"""Answering on the CPU: minitune's engine beside `transformers`' generate, same model, prompts and tokens, one run.

    python bench/decode_cpu.py [--threads 2] [--tokens 64] [--repeats 3] [--sides transformers-float32,minitune-float32]

Greedy, EOS not stopping, prompts of equal length (no padding for either). Each side runs in a process of its own,
the sides take turns, and of the repeats the best counts: a neighbour can only make a run slower. Reported: tokens a
second of whole answers (prompt included) to 1 and to 8 questions at once, the time to the first token of a long
prompt, and how much faster than the first side that is, by the clock and by the processor's time.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

from sides import give, take

SIDES = ("transformers-float32", "minitune-float32", "transformers-bfloat16", "minitune-bfloat16")


def prompts_of(count: int, length: int) -> list[list[int]]:
    """Prompts of which no two begin alike, so that minitune's prefix cache has no say."""
    first = 1000 + 37 * length + 1000 * count
    return [[first + 101 * row + place for place in range(length)] for row in range(count)]


def minitune_side(arguments: argparse.Namespace, dtype: str) -> dict[str, float]:
    from minitune.infer.engine import answer_all
    from minitune.infer.request import Request
    from minitune.infer.sampling import Sampling
    from minitune.infer.session import open_model

    engine = open_model("smollm2", dtype=dtype, device="cpu", slots=8).engine

    def run(count: int, length: int, tokens: int) -> None:
        sampling = Sampling(temperature=0, max_new_tokens=tokens)
        requests = [Request(tuple(ids), sampling) for ids in prompts_of(count, length)]
        handles = answer_all(engine, requests)
        assert all(len(h.ids) == tokens and h.reused_tokens == 0 for h in handles)

    return measure(run, arguments)


def transformers_side(arguments: argparse.Namespace, dtype: str) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM

    from minitune.checkpoint.gguf import embedded_default

    model = AutoModelForCausalLM.from_pretrained(embedded_default(), dtype=getattr(torch, dtype)).eval()

    def run(count: int, length: int, tokens: int) -> None:
        ids = torch.tensor(prompts_of(count, length))
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                pad_token_id=0,
            )
        assert out.shape[1] == length + tokens

    return measure(run, arguments)


def measure(run: Callable[[int, int, int], None], arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of each measurement, and of them in the processor."""

    def timed(name: str, *sizes: int) -> None:
        wall, processor = time.perf_counter(), time.process_time()
        run(*sizes)
        seconds[name], seconds[f"{name}, cpu"] = time.perf_counter() - wall, time.process_time() - processor

    seconds: dict[str, float] = {}
    run(1, 8, 4)
    timed("batch 1", 1, arguments.length, arguments.tokens)
    timed("batch 8", 8, arguments.length, arguments.tokens)
    timed("first token", 1, arguments.long, 1)
    return seconds


def one(arguments: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(arguments.threads)
    side, dtype = arguments.side.split("-")
    result = (minitune_side if side == "minitune" else transformers_side)(arguments, dtype)
    give(result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--length", type=int, default=40, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--long", type=int, default=512, help="tokens of the prompt whose first token is timed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        return one(arguments)
    best: dict[str, dict[str, float]] = {}
    for _ in range(arguments.repeats):
        for side in arguments.sides.split(","):
            result = take(side, arguments.threads) or sys.exit(1)
            held = best.setdefault(side, result)
            best[side] = {name: min(value, held[name]) for name, value in result.items()}
    first = next(iter(best.values()))
    answered = {"batch 1": arguments.tokens, "batch 8": 8 * arguments.tokens}
    print(f"| side | batch 1 tok/s | batch 8 tok/s | first token of {arguments.long}, s | against the first side |")
    print("|---|---|---|---|---|")
    for side, r in best.items():
        cells = [f"{tokens / r[name]:.1f}" for name, tokens in answered.items()] + [f"{r['first token']:.2f}"]
        names = [*answered, "first token"]
        ratios = ", ".join(f"{first[name] / r[name]:.2f}" for name in names)
        by_processor = ", ".join(f"{first[f'{name}, cpu'] / r[f'{name}, cpu']:.2f}" for name in names)
        print(f"| {side} | {' | '.join(cells)} | {ratios} (processor time: {by_processor}) |")


if __name__ == "__main__":
    main()
