"""Answering on the CPU: minitune's engine beside `transformers`' generate, same model, prompts and tokens, one run.

    python bench/decode_cpu.py [--threads 2] [--tokens 64] [--repeats 3] [--sides transformers-float32,minitune-float32]

Greedy, EOS not stopping, prompts of equal length (no padding for either). Each side runs in a process of its own,
the sides take turns, and of the repeats the best counts: a neighbour can only make a run slower. Reported: tokens a
second of whole answers (prompt included) to 1 and to 8 questions at once, and the time to the first token of a long
prompt.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time

SIDES = ("transformers-float32", "minitune-float32", "transformers-bfloat16", "minitune-bfloat16")
BATCHES = (1, 8)


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

    def run(count: int, length: int, tokens: int) -> float:
        sampling = Sampling(temperature=0, max_new_tokens=tokens)
        requests = [Request(tuple(ids), sampling) for ids in prompts_of(count, length)]
        started = time.perf_counter()
        handles = answer_all(engine, requests)
        seconds = time.perf_counter() - started
        assert all(len(h.ids) == tokens and h.reused_tokens == 0 for h in handles)
        return seconds

    return measure(run, arguments)


def transformers_side(arguments: argparse.Namespace, dtype: str) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM

    from minitune.checkpoint.gguf import embedded_default

    model = AutoModelForCausalLM.from_pretrained(embedded_default(), dtype=getattr(torch, dtype)).eval()

    def run(count: int, length: int, tokens: int) -> float:
        ids = torch.tensor(prompts_of(count, length))
        started = time.perf_counter()
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
        return time.perf_counter() - started

    return measure(run, arguments)


def measure(run, arguments: argparse.Namespace) -> dict[str, float]:  # type: ignore[no-untyped-def]
    run(1, 8, 4)
    result = {
        f"batch {count}": count * arguments.tokens / run(count, arguments.length, arguments.tokens) for count in BATCHES
    }
    return result | {"first token": run(1, arguments.long, 1)}


def one(arguments: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(arguments.threads)
    side, dtype = arguments.side.split("-")
    result = (minitune_side if side == "minitune" else transformers_side)(arguments, dtype)
    print("RESULT " + json.dumps(result))


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
            environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
            run = subprocess.run(command, capture_output=True, text=True, env=environment)
            lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
            if not lines:
                sys.exit(f"{side} failed:\n{run.stderr[-2000:]}")
            result = json.loads(lines[0].removeprefix("RESULT "))
            print(side, json.dumps(result), flush=True)
            held = best.setdefault(side, result)
            best[side] = {k: (min if k == "first token" else max)(v, held[k]) for k, v in result.items()}
    first = next(iter(best.values()))
    print(f"| side | batch 1 tok/s | batch 8 tok/s | first token of {arguments.long}, s | against the first side |")
    print("|---|---|---|---|---|")
    for side, r in best.items():
        ratios = [
            r["batch 1"] / first["batch 1"],
            r["batch 8"] / first["batch 8"],
            first["first token"] / r["first token"],
        ]
        print(
            f"| {side} | {r['batch 1']:.1f} | {r['batch 8']:.1f} | {r['first token']:.2f} "
            f"| {', '.join(f'{ratio:.2f}' for ratio in ratios)} |"
        )


if __name__ == "__main__":
    main()
